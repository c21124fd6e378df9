// Products of bfloat16 with bfloat16, two columns at a time (AVX512-BF16), where there are no matrix units: x is that, and
// so are integers and small floats as they are; values of other tables are rounded to it. Sums are in float32.

#ifdef __AVX512BF16__
#define FXQUANT_BFLOAT16

#include <algorithm>

namespace {

// 32 floats in bfloat16.
inline Z rounded_pair(F low, F high) { return (Z)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

// Whether bfloat16 with these magnitudes, as bits, are multiplied as they should be: products of what is smaller than 2^-126,
// or their sums, become zeros, so that it has to be small beside the largest; and no number is infinite.
inline bool are_moderate(Z magnitudes) {
    const uint32_t largest = _mm512_reduce_max_epu32(_mm512_max_epu32(_mm512_slli_epi32(magnitudes, 16), magnitudes));
    if (largest < 1 << 16) return true; // zeros; below there is another's half
    return largest >= as<uint32_t>(0x1p-80f) && largest < as<uint32_t>(0x1p100f);
}

// Float8 in the lower bytes of 16 bits, as bfloat16 with more exponents; what has none of its own is in a table, by its
// last 5 bits. `values` has those of all codes.
template <bool E4M3> struct SmallFloats {
    static constexpr int BITS = E4M3 ? 3 : 2, FIRST = 1 << BITS, LAST = E4M3 ? 0x7e : 0x7b, BIAS = 127 - (E4M3 ? 7 : 15);
    Z others;

    explicit SmallFloats(const float* values) {
        float found[32];
        for (int i = 0; i < 32; i++) found[i] = values[i < 16 ? i : 0x60 + i];
        others = rounded_pair(load(found), load(found + LANES));
    }

    Z operator()(Z codes) const {
        const auto all = [](int bits) { return _mm512_set1_epi16((short)bits); };
        const Z size = _mm512_and_si512(codes, all(0x7f));
        const __mmask32 other = _mm512_cmpgt_epu16_mask(_mm512_sub_epi16(size, all(FIRST)), all(LAST - FIRST));
        const Z more = _mm512_add_epi16(_mm512_slli_epi16(size, 7 - BITS), all(BIAS << 7));
        const Z found = _mm512_mask_permutexvar_epi16(more, other, size, others);
        return _mm512_or_si512(found, _mm512_and_si512(_mm512_slli_epi16(codes, 8), all(0x8000)));
    }
};

struct FloatWords : Panels {
    static constexpr int64_t PANEL = 128, WORDS = PANEL / 2; // columns, and words of them
    static constexpr int QUARTERS = 4;

    static constexpr int64_t TOGETHER = 1; // panels

    const int64_t panels;
    const int64_t step, per; // columns whose sums meet a scale, and how many such steps a panel has
    const int64_t stride;    // bytes of a panel of a turn: words; where there are offsets, of every step the sums of x
    const int64_t units;     // of a turn
    static constexpr bool ADDS_OFFSETS = true; // times the sum of x
    const bool plain;        // there are none
    Z low, high;             // of up to 64 values, in bfloat16

    explicit FloatWords(const Product& j)
        : Panels(j), panels((j.columns + PANEL - 1) / PANEL), step(step_of(j)), per(PANEL / step),
          stride((WORDS + (j.zero ? per : 0)) * TOKENS * 4), units((panels * stride + 63) / 64), plain(j.zero == 0) {
        const auto value = [&](int i) { return j.values[i % std::max(1 << j.bits, LANES)]; };
        float of[64];
        for (int i = 0; i < 64; i++) of[i] = j.bits < 8 ? value(i) : 0;
        low = rounded_pair(load(of), load(of + 16)), high = rounded_pair(load(of + 32), load(of + 48));
    }

    static bool takes(const Product& job) { return job.x_type == 1 && !job.x_codes; }

    static int64_t step_of(const Product& job) {
        int64_t step = PANEL;
        while (job.block < job.columns && job.block % step) step /= 2;
        return step;
    }

    // False where products would be zeros that are none, or infinite. Rows of x, in the order in which codes come out of words of a row: of 4 bits, of every 8 columns the first and the
    // fifth, the second and the sixth, and so on; of others, of every 4 the first and the third, the second and the fourth.
    bool spread(const int64_t* slots, int64_t count, float* to) const {
        const Z by_4 = repeated_bytes(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
        const Z by_2 = repeated_bytes(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
        const Z places = job.bits == 4 ? by_4 : by_2;
        for (int64_t panel = 0; panel < panels; panel++) {
            uint32_t* const words = (uint32_t*)((char*)to + panel * stride);
            float* const sums = (float*)(words + WORDS * TOKENS);
            if (job.zero) std::fill_n(sums, per * TOKENS, 0.0f);
            for (int64_t t = 0; t < count; t++) {
                Z top{};
                for (int64_t i = 0; i < PANEL; i += 2 * LANES) {
                    const int64_t at = panel * PANEL + i, here = std::max<int64_t>(std::min<int64_t>(job.columns - at, 2 * LANES), 0);
                    const uint16_t* const from = (const uint16_t*)job.x + slots[t] / job.picks * job.x_stride + at;
                    const Z x = _mm512_maskz_loadu_epi16((__mmask32)((1ull << here) - 1), from);
                    top = _mm512_max_epu16(top, _mm512_and_si512(x, _mm512_set1_epi16(0x7fff)));
                    alignas(64) uint32_t found[LANES];
                    _mm512_store_si512(found, _mm512_shuffle_epi8(x, places));
                    for (int64_t w = 0; w < LANES; w++) words[(i / 2 + w) * TOKENS + t] = found[w];
                    for (int half = 0; job.zero && half < 2; half++)
                        sums[(i + half * LANES) / step * TOKENS + t] += sum(half_of(x, half));
                }
                if (!are_moderate(top)) return false;
            }
        }
        return true;
    }

    static Z repeated_bytes(char a, char b, char c, char d, char e, char f, char g, char h, char i, char j, char k, char l,
                            char m, char n, char o, char p) {
        return _mm512_broadcast_i32x4(_mm_setr_epi8(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p));
    }

    // 16 of 32 bfloat16.
    static F half_of(Z v, int half) {
        const __m256i own = half ? _mm512_extracti64x4_epi64(v, 1) : _mm512_castsi512_si256(v);
        return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(own), 16);
    }

    // `sum += w x`
    static __attribute__((always_inline)) void add(Z& sum, Z w, Z x) {
        asm volatile("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    }

    // What the sums of a step begin with.
    static Z start(const char*, int64_t, int64_t) { return Z{}; }

    // The total and a plain sum.
    static F added(F total, Z sum, F scale) { return multiply_add((F)sum, scale, total); }

    static F sum_of_x(const char* x, int64_t s, int64_t t) { return all(((const float*)x)[(WORDS + s) * TOKENS + t]); }

    // Zeros become offsets behind scales.
    void prepare(Scratch& scratch) const {
        for (int64_t i = 0; job.zero == 1 && i < blocks * AT_ONCE; i += LANES)
            store(scratch.offsets_by_block.data + i,
                  -load(scratch.offsets_by_block.data + i) * load(scratch.scales_by_block.data + i));
    }

    static void finish(const char*, int64_t, const float*, float*) {}

    // How codes become values: by a table of 32 at most, or of 64, as float8, or as integers.
    enum Values { NIBBLES, FEW, MANY, E4M3, E5M2, SIGNED, UNSIGNED };

    void decode(int64_t panel, const Scratch& scratch, Z* to_panel, Ahead& ahead) const {
        if (job.bits == 4) decode<NIBBLES>(panel, scratch, to_panel, ahead);
        else if (job.bits < 6) decode<FEW>(panel, scratch, to_panel, ahead);
        else if (job.bits == 6) decode<MANY>(panel, scratch, to_panel, ahead);
        else if (job.kind == 2) decode<E4M3>(panel, scratch, to_panel, ahead);
        else if (job.kind == 3) decode<E5M2>(panel, scratch, to_panel, ahead);
        else if (job.low) decode<SIGNED>(panel, scratch, to_panel, ahead);
        else decode<UNSIGNED>(panel, scratch, to_panel, ahead);
    }

    template <Values VALUES> __attribute__((noinline)) void decode(int64_t panel, const Scratch& scratch, Z* to_panel, Ahead& ahead) const {
        constexpr int PER = VALUES == NIBBLES ? 4 : 2; // words that are made of one
        const SmallFloats<VALUES == E4M3> floats(job.values);
        for (int v = 0; v < VECTORS; v++)
            for (int64_t part = 0; part < QUARTERS; part += PER) {
                Z words[16];
                read_words(scratch, v, panel * PANEL + part * 32, words);
                Z* const to = to_panel + part * WORDS / QUARTERS * VECTORS + v;
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) {
                    if (part == 0 && i % (16 / Ahead::PER_VECTOR) == 0) ahead.ask();
#pragma GCC unroll 4
                    for (int j = 0; j < PER; j++) to[(i * PER + j) * VECTORS] = values<VALUES>(words[i], j, floats);
                }
            }
    }

    // Two values of each row: of 4 bits, those that are j and j + 4 in words, of bytes j and j + 2.
    template <Values VALUES, class Floats> Z values(Z word, int j, const Floats& floats) const {
        if (VALUES == NIBBLES) return _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4 * j), low);
        if (VALUES == SIGNED || VALUES == UNSIGNED) {
            const auto value = [&](int byte) {
                const Z top = _mm512_slli_epi32(word, 24 - 8 * byte);
                return (Z)_mm512_cvtepi32_ps(VALUES == SIGNED ? _mm512_srai_epi32(top, 24) : _mm512_srli_epi32(top, 24));
            };
            return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(value(j), 16), value(j + 2));
        }
        const Z codes = j ? _mm512_srli_epi16(word, 8) : _mm512_and_si512(word, _mm512_set1_epi16(255));
        if (VALUES == FEW) return _mm512_permutexvar_epi16(codes, low);
        if (VALUES == MANY) return _mm512_permutex2var_epi16(low, codes, high);
        return floats(codes);
    }
};

} // namespace

#endif
