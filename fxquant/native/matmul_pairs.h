// Pairs of values in bfloat16, as products of them (AVX512-BF16) take them: integers and small floats as they are, values of
// other tables rounded. Where there are matrix units, which are faster, none of this is compiled.

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__) && defined(FXQUANT_BYTES) && defined(FXQUANT_CODES)
#define FXQUANT_BFLOAT16

namespace {

// Whether bfloat16 with these magnitudes, as bits, are multiplied as they should be: products of what is smaller than
// 2^-126, or their sums, become zeros, so that it has to be small beside the largest; and no number is infinite.
inline bool are_moderate(Z magnitudes) {
    const uint32_t largest = _mm512_reduce_max_epu32(_mm512_max_epu32(_mm512_slli_epi32(magnitudes, 16), magnitudes));
    if (largest < 1 << 16) return true; // zeros; below there is another's half
    return largest >= as<uint32_t>(0x1p-80f) && largest < as<uint32_t>(0x1p100f);
}

// `sum += w x`, of pairs of floats. In the order in which it is written, and so is what is loaded: moved, they take registers
// from sums.
inline __attribute__((always_inline)) void add_pairs(Z& sum, Z w, Z x) {
    asm volatile("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
}

inline __attribute__((always_inline)) Z loaded_in_order(const Z* p) {
    Z to;
    asm volatile("vmovdqa64 %1, %0" : "=v"(to) : "m"(*p));
    return to;
}

// How codes become values: by tables of 32, in words of 4 bits or in bytes, of 64, or of 256, of which those of floats
// differ by a sign from one half to the other.
enum class Values { NIBBLES, FEW, SOME, MANY, SIGNED };

// `function` with how it is done, as a constant.
template <class Function> inline void with_values(const Product& job, const Function& function) {
    if (job.bits == 4) function(std::integral_constant<Values, Values::NIBBLES>{});
    else if (job.bits < 6) function(std::integral_constant<Values, Values::FEW>{});
    else if (job.bits == 6) function(std::integral_constant<Values, Values::SOME>{});
    else if (job.kind) function(std::integral_constant<Values, Values::SIGNED>{});
    else function(std::integral_constant<Values, Values::MANY>{});
}

struct PairTables {
    Z low, high;   // of up to 64 values
    Z bytes[2][4]; // of 256: their lower bytes, and their higher ones

    explicit PairTables(const Product& job) {
        uint16_t all[256];
        for (int i = 0; i < 256; i += 2 * LANES) {
            float of[2 * LANES];
            for (int l = 0; l < 2 * LANES; l++) of[l] = value(job, i + l);
            _mm512_storeu_si512(all + i, rounded_pair(load(of), load(of + LANES)));
        }
        low = _mm512_loadu_si512(all), high = _mm512_loadu_si512(all + 32);
        for (int part = 0; part < 4; part++) {
            uint8_t of[2][64];
            for (int i = 0; i < 64; i++) of[0][i] = all[64 * part + i] & 255, of[1][i] = all[64 * part + i] >> 8;
            for (int half = 0; half < 2; half++) bytes[half][part] = _mm512_loadu_si512(of[half]);
        }
    }

    // Two values of every word: of 4 bits, those that are j and j + 4 in it, of bytes j and j + 2.
    template <Values VALUES> Z two(Z word, int j) const {
        if (VALUES == Values::NIBBLES) return _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4 * j), low);
        if (VALUES == Values::MANY || VALUES == Values::SIGNED) {
            constexpr __mmask64 ODD = 0xaaaaaaaaaaaaaaaa;
            const Z lower = bytes_of<VALUES>(word, bytes[0]), higher = bytes_of<VALUES>(word, bytes[1]);
            if (j) return _mm512_mask_blend_epi8(ODD, _mm512_srli_epi16(lower, 8), with_signs<VALUES>(higher, word));
            return _mm512_mask_blend_epi8(ODD, lower, _mm512_slli_epi16(with_signs<VALUES>(higher, word), 8));
        }
        const Z codes = j ? _mm512_srli_epi16(word, 8) : _mm512_and_si512(word, _mm512_set1_epi16(255));
        return VALUES == Values::FEW ? _mm512_permutexvar_epi16(codes, low) : _mm512_permutex2var_epi16(low, codes, high);
    }

  private:
    // What a code stands for, and again and again.
    static float value(const Product& job, int code) {
        if (job.bits < 8 || job.kind) return job.values[code % std::max(1 << job.bits, LANES)];
        return job.low ? (int8_t)code : code;
    }

    // By code, one byte of each value; of floats without their signs.
    template <Values VALUES> static Z bytes_of(Z codes, const Z* table) {
        const Z first = _mm512_permutex2var_epi8(table[0], codes, table[1]);
        if (VALUES == Values::SIGNED) return first;
        const Z second = _mm512_permutex2var_epi8(table[2], codes, table[3]);
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), first, second);
    }

    // `a | (b & 0x80)` where values are of floats.
    template <Values VALUES> static Z with_signs(Z a, Z b) {
        return VALUES == Values::SIGNED ? _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi8((char)0x80), 0xf8) : a;
    }
};

} // namespace

#endif
