// Products of bfloat16 with bfloat16, two columns at a time (AVX512-BF16), where there are no matrix units: x is that, and
// so are integers and small floats as they are; values of other tables are rounded to it. Sums are in float32. With many
// rows weights meet scales of short blocks, and offsets that change often, before, and are rounded.

#ifdef FXQUANT_BFLOAT16

#include <algorithm>

namespace {

struct FloatWords : Panels {
    static constexpr int64_t PANEL = 128, WORDS = PANEL / 2; // columns, and words of them
    static constexpr int OF_NIBBLES = 4;                     // words that are made of one of 4 bits
    static constexpr int64_t NUMBERS = 1;                    // of a step of a row of x, where there are offsets: its sum
    static constexpr bool ADDS_OFFSETS = true;               // to sums of a step, times the sum of x

    static constexpr int64_t FEW_ROWS = 32;                  // of x, with which weights are not rounded

    const int64_t panels;
    const bool rounded;      // weights are, with their scales
    const int64_t step, per; // columns whose sums meet a scale, and how many such steps a panel has
    const int64_t stride;    // bytes of a panel of a turn: words; where there are offsets, of every step the sums of x
    const int64_t units;     // of a turn
    const bool plain;        // there are no offsets
    const PairTables tables;
    const InTurn in_turn;

    explicit FloatWords(const Product& j)
        : Panels(j), panels((j.columns + PANEL - 1) / PANEL), rounded(rounds(j)), step(rounded ? PANEL : step_of(j)),
          per(PANEL / step), stride((WORDS + (rounded || !j.zero ? 0 : per * NUMBERS)) * TOKENS * 4),
          units((panels * stride + 63) / 64), plain(rounded || !j.zero), tables(j) {}

    // With many rows of x it takes longer to bring sums and scales together than to round weights, where they meet often.
    static bool rounds(const Product& job) {
        if (job.block >= job.columns || (job.bits == 8 && !job.kind)) return false; // such integers would lose too much
        const int64_t long_enough = (job.zero ? PANEL : PANEL / 2) / (job.bits == 4 ? 1 : 2);
        return step_of(job) < long_enough && job.slots > FEW_ROWS * job.experts;
    }

    // Rows of x, in the order in which codes come out of words of a row: of 4 bits, of every 8 columns the first and the
    // fifth, the second and the sixth, and so on; of others, of every 4 the first and the third, the second and the fourth.
    // False where products would be zeros that are none, or infinite.
    bool spread(const int64_t* slots, int64_t count, float* to) const {
        const Z by_4 = repeated_bytes(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
        const Z by_2 = repeated_bytes(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
        const Z places = job.bits == 4 ? by_4 : by_2;
        for (int64_t panel = 0; panel < panels; panel++) {
            uint32_t* const words = (uint32_t*)((char*)to + panel * stride);
            float* const sums = (float*)(words + WORDS * TOKENS);
            if (!plain) std::fill_n(sums, per * TOKENS, 0.0f);
            Z tops[TOKENS] = {};
            for (int64_t i = 0; i < PANEL; i += 2 * LANES) {
                const int64_t at = panel * PANEL + i, rest = std::max<int64_t>(job.columns - at, 0);
                const __mmask32 here = _bzhi_u32(~0u, std::min<int64_t>(rest, 2 * LANES));
                Z rows[TOKENS] = {};
                for (int64_t t = 0; t < count; t++) {
                    const uint16_t* const from = (const uint16_t*)job.x + slots[t] / job.picks * job.x_stride + at;
                    const Z x = _mm512_maskz_loadu_epi16(here, from);
                    tops[t] = _mm512_max_epu16(tops[t], _mm512_and_si512(x, _mm512_set1_epi16(0x7fff)));
                    rows[t] = _mm512_shuffle_epi8(x, places);
                    for (int half = 0; !plain && half < 2; half++)
                        sums[(i + half * LANES) / step * TOKENS + t] += sum(half_of(x, half));
                }
                in_turn(rows, words + i / 2 * TOKENS);
            }
            for (int64_t t = 0; t < count; t++)
                if (!are_moderate(tops[t])) return false;
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

    static __attribute__((always_inline)) void add(Z& sum, Z w, Z x) { add_pairs(sum, w, x); }

    // What sums of a step lack.
    static Z missing(const char*, int64_t) { return Z{}; }

    // The total and a plain sum.
    static F added(F total, Z sum, Z, F scale) { return multiply_add((F)sum, scale, total); }

    static F sum_of_x(const char* of_step, int64_t t) { return all(((const float*)of_step)[t]); }

    // Zeros become offsets behind scales.
    void prepare(Scratch& scratch) const {
        for (int64_t i = 0; job.zero == 1 && !rounded && i < blocks * AT_ONCE; i += LANES)
            store(scratch.offsets_by_block.data + i,
                  -load(scratch.offsets_by_block.data + i) * load(scratch.scales_by_block.data + i));
    }

    static void finish(const char*, int64_t, const float*, float*) {}

    Z key() const { return tables.low; }

    // Two values of each word, of codes that are I and I + 4 in it. In the order in which it is written, as products are.
    template <int I> static __attribute__((always_inline)) Z of_nibbles(const Z* word, Z table) {
        Z codes, to;
        if constexpr (I == 0) codes = loaded_in_order(word);
        else asm volatile("vpsrlw %2, %1, %0" : "=v"(codes) : "m"(*word), "i"(4 * I));
        asm volatile("vpermw %2, %1, %0" : "=v"(to) : "v"(codes), "v"(table));
        return to;
    }

    // Whether lines are turned first, and whether panels are decoded before they are multiplied.
    bool turns() const { return job.bits == 4; }
    bool decodes() const { return job.bits != 4 || rounded; }

    // From words of lines that are turned, or else from what is read.
    void decode(int64_t panel, const Z* words, const Scratch& scratch, Z* to_panel) const {
        with_values(job, [&](auto values) {
            if constexpr (values != Values::NIBBLES) decode<values>(panel, scratch, to_panel);
        });
        if (rounded) with_constant<3>(job.zero + 1, [&](auto n) {
            if (job.bits == 4) round<n - 1>(panel, words, scratch, to_panel);
            else round<n - 1>(panel, scratch, to_panel);
        });
    }

    template <Values VALUES>
    __attribute__((noinline)) void decode(int64_t panel, const Scratch& scratch, Z* to_panel) const {
        const int64_t first = panel * PANEL;
        for (int v = 0; v < VECTORS; v++)
            for (int64_t half = 0; half < 2; half++) {
                Z words[16];
                const int64_t column = first + half * PANEL / 2;
                const int64_t next = half == 0 ? column + PANEL / 2 : v + 1 < VECTORS ? first : first + PANEL;
                read_words(scratch, v, column, half == 0 ? v : (v + 1) % VECTORS, next * job.bits / 8, words);
                Z* const to = to_panel + half * WORDS / 2 * VECTORS + v;
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++)
                    for (int j = 0; j < 2; j++) to[(2 * i + j) * VECTORS] = tables.two<VALUES>(words[i], j);
            }
    }

    // 8 weights of each row from a word of 4 bits.
    template <int ZERO>
    __attribute__((noinline)) void round(int64_t panel, const Z* words, const Scratch& scratch, Z* to_panel) const {
        const F of_codes = load(job.values);
        for (int i = 0; i < 16; i++)
            for (int v = 0; v < VECTORS; v++) {
                const U word = (U)words[i * VECTORS + v];
                const auto weight = weights<ZERO>(panel * PANEL + 8 * i, v, scratch);
                const auto value = [&](int j) __attribute__((always_inline)) {
                    return look_up_low(of_codes, word >> (uint32_t)(4 * j));
                };
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
                    to_panel[(4 * i + j) * VECTORS + v] = rounded_halves(weight(value(j)), weight(value(j + 4)));
            }
    }

    // 4 weights of each row from two words, which are their values.
    template <int ZERO> __attribute__((noinline)) void round(int64_t panel, const Scratch& scratch, Z* words) const {
        for (int i = 0; i < WORDS / 2; i++)
            for (int v = 0; v < VECTORS; v++) {
                const auto weight = weights<ZERO>(panel * PANEL + 4 * i, v, scratch);
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++) {
                    Z& word = words[(2 * i + j) * VECTORS + v];
                    const Z higher = _mm512_and_si512(word, _mm512_set1_epi32(0xffff0000));
                    word = rounded_halves(weight((F)_mm512_slli_epi32(word, 16)), weight((F)higher));
                }
            }
    }

    // What values stand for in 16 rows, from a column on, with zeros of this kind.
    template <int ZERO>
    __attribute__((always_inline)) auto weights(int64_t column, int v, const Scratch& scratch) const {
        const int64_t block = std::min(column / job.block, blocks - 1) * AT_ONCE + v * LANES;
        const F scale = load(scratch.scales_by_block.data + block);
        const F offset = ZERO ? load(scratch.offsets_by_block.data + block) : F{};
        return [=](F value) __attribute__((always_inline)) {
            if (ZERO == 0) return value * scale;
            return ZERO == 1 ? (value - offset) * scale : multiply_add(value, scale, offset);
        };
    }

    // Pairs in bfloat16. Halves go away from zero, since that takes fewer steps than to even.
    static __attribute__((always_inline)) Z rounded_halves(F first, F second) {
        const Z numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const Z higher = _mm512_add_epi32(_mm512_mullo_epi32(numbers, _mm512_set1_epi32(0x20002)), _mm512_set1_epi32(0x210001));
        const auto up = [](F weight) { return _mm512_add_epi32((Z)weight, _mm512_set1_epi32(0x8000)); };
        return _mm512_permutex2var_epi16(up(first), higher, up(second));
    }
};

} // namespace

#endif
