// Units: 16 weights in a row, that is 2 bytes for every bit of a field, decoded into one vector. Their order in it
// makes it cheap to take fields apart; rows of x are brought into the same order.

namespace {

typedef uint64_t Words __attribute__((vector_size(64)));

#if defined(FXQUANT_AVX512) && defined(__AVX512VBMI__) && defined(__AVX512VL__)
#define FXQUANT_BYTES // go from anywhere to anywhere in one step

// The bytes of every lane, from the one that its field begins in.
template <class Unit> struct Places {
    alignas(64) uint8_t bytes[64];

    constexpr Places() : bytes() {
        for (int i = 0; i < 64; i++) bytes[i] = Unit::SPAN / 2 * Unit::column(i / 4) / 8 + i % 4;
    }
};
#endif

// Fields of B bits from the lowest bits of 16 lanes on. `SPAN` bytes are read. Lane l has column `column(l)`.
template <int B> struct Unit {
    static constexpr int SPAN = 2 * B;
    static constexpr int LONGS = B <= 2 ? 1 : B <= 4 ? 2 : B < 8 ? 4 : 16; // words of 32 bits to shift fields out of
    static constexpr int column(int lane) { return 16 / LONGS * (lane % LONGS) + lane / LONGS; }

    static U fields(const uint8_t* p) {
        if constexpr (B == 8) return as<U>(widen(read<U8>(p)));
#ifdef FXQUANT_BYTES
        else if constexpr (B > 4) {
            static constexpr Places<Unit> places{};
            const __m512i bytes = _mm512_castsi128_si512(_mm_maskz_loadu_epi8((1 << SPAN) - 1, p));
            return (U)_mm512_permutexvar_epi8(_mm512_load_si512(places.bytes), bytes) >> rests();
        }
#endif
        else if constexpr (B <= 2) return (U{} + (B == 1 ? read<uint16_t>(p) : read<uint32_t>(p))) >> shifts();
        else if constexpr (B <= 4) {
            const uint64_t high = B == 3 ? read<uint32_t>(p + 2) >> 8 : read<uint32_t>(p + 4);
            return (U)(Words{} + (B == 4 ? read<uint64_t>(p) : high << 32 | read<uint32_t>(p))) >> shifts();
        } else return quarters(p) >> shifts();
    }

  private:
#ifdef FXQUANT_BYTES
    static U rests() {
        U to;
        for (int l = 0; l < LANES; l++) to[l] = B * column(l) % 8;
        return to;
    }
#endif

    static U shifts() {
        U to;
        for (int l = 0; l < LANES; l++)
            to[l] = B * (l / LONGS) + (B == 5 || B == 6 ? 8 * skip(l % 4) + rest(l % 4) : 0);
        return to;
    }

    // Four fields begin B / 2 bytes further on than the four before them; the last word ends with the unit.
    static constexpr int start(int i) { return i == 3 ? SPAN - 4 : 4 * B * i / 8; }
    static constexpr int skip(int i) { return 4 * B * i / 8 - start(i); }
    static constexpr int rest(int i) { return 4 * B * i % 8; }

    static U quarters(const uint8_t* p) {
        const auto at = [&](int i) { return read<uint32_t>(p + start(i)); };
#ifdef FXQUANT_AVX512
        return (U)_mm512_broadcast_i32x4(_mm_setr_epi32(at(0), at(1), at(2), at(3)));
#else
        const uint32_t a = at(0), b = at(1), c = at(2), d = at(3);
        return U{a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d};
#endif
    }
};

// How weights of a block are made of fields. Each has a state per row, which a block sets.

// Up to 4 bits: the weights of all fields are in a table, made for each block.
template <int B> struct Few : Unit<B> {
    struct Block { F table; };
    F values;
    int zero;

    explicit Few(const Product& job) : values(load(job.values)), zero(job.zero) {}
    Block block(float scale, float offset) const {
        if (zero == 0) return {values * scale};
        return {zero == 1 ? (values - offset) * scale : multiply_add(values, all(scale), all(offset))};
    }
    F weights(const Block& block, const uint8_t* p) const { return look_up_low(block.table, Unit<B>::fields(p)); }
};

// More: values, then zero, scale and bias for each weight; only a scale where the others are 0.
template <int B, class Derived, bool AFFINE> struct Many : Unit<B> {
    struct Block { F scale, zero, bias; };
    int kind;

    explicit Many(const Product& job) : kind(job.zero) {}
    Block block(float scale, float offset) const {
        return {all(scale), all(kind == 1 ? offset : 0), all(kind == 2 ? offset : 0)};
    }
    F weights(const Block& block, const uint8_t* p) const {
        const F v = ((const Derived*)this)->value(p);
        return AFFINE ? multiply_add(v - block.zero, block.scale, block.bias) : v * block.scale;
    }
};

template <int B, bool AFFINE> struct Wide : Many<B, Wide<B, AFFINE>, AFFINE> {
    int low;

    explicit Wide(const Product& job) : Wide::Many(job), low(job.low) {}
    F value(const uint8_t* p) const {
        return __builtin_convertvector(as<I>(Unit<B>::fields(p) & (U{} + ((1u << B) - 1))) + low, F);
    }
};

template <bool AFFINE> struct Signed8 : Many<8, Signed8<AFFINE>, AFFINE> {
    explicit Signed8(const Product& job) : Signed8::Many(job) {}
    F value(const uint8_t* p) const {
#ifdef FXQUANT_AVX512
        return (F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(read<__m128i>(p)));
#else
        return __builtin_convertvector(widen(read<U8>(p) ^ (uint8_t)0x80) - 128, F);
#endif
    }
};

struct Table6 : Many<6, Table6, false> {
    alignas(64) float values[64];

    explicit Table6(const Product& job) : Many(job) { memcpy(values, job.values, sizeof values); }
    F value(const uint8_t* p) const { return look_up<64>(values, as<I>(Unit<6>::fields(p) & (U{} + 63u))); }
};

// Float8 by way of float16: e5m2 is the upper half of one, e4m3 has fewer exponents.
template <bool E4M3> struct Float8 : Many<8, Float8<E4M3>, false> {
    const float* values;

    explicit Float8(const Product& job) : Float8::Many(job), values(job.values) {}
    F value(const uint8_t* p) const {
#ifdef FXQUANT_AVX512
        if (!E4M3) return (F)_mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(read<__m128i>(p)), 8));
        const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(read<__m128i>(p)), 7);
        const __m256i half = _mm256_and_si256(wide, _mm256_set1_epi16((short)0xbfff));
        const __m256i size = _mm256_and_si256(wide, _mm256_set1_epi16(0x3f80));
        const __mmask16 nan = _mm256_cmpeq_epi16_mask(size, _mm256_set1_epi16(0x3f80));
        return (F)_mm512_cvtph_ps(_mm256_mask_set1_epi16(half, nan, 0x7fff)) * 256.0f;
#else
        F v;
        for (int l = 0; l < LANES; l++) v[l] = values[p[l]];
        return v;
#endif
    }
};

} // namespace
