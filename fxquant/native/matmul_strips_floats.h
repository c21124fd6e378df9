// Products of few rows of bfloat16 with values in bfloat16 (AVX512-BF16), as `matmul_words_floats.h` has them, in strips:
// the columns of a lane whose distance is half of theirs are multiplied together.

#ifdef FXQUANT_BFLOAT16

namespace {

// A row of x in a strip; of every lane the sum of its columns.
template <int64_t COLUMNS> struct alignas(64) FloatLanes {
    static constexpr int WORDS = COLUMNS / LANES / 2;
    Z words[WORDS];
    F sums;
};

template <Values VALUES> constexpr int64_t STRIP = VALUES == Values::NIBBLES ? 128 : 64; // columns

template <Values VALUES>
struct FloatStrips : StripsOf<FloatStrips<VALUES>, FloatLanes<STRIP<VALUES>>, 4, STRIP<VALUES>> {
    using Lanes = FloatLanes<STRIP<VALUES>>;
    using Base = StripsOf<FloatStrips, Lanes, 4, STRIP<VALUES>>;
    using Base::job;
    static constexpr int WORDS = Lanes::WORDS;

    const PairTables tables;
    const Panels::Fields fields;
    Z places[WORDS]; // of the columns of a word, in 64

    explicit FloatStrips(const Product& j) : Base(j), tables(j), fields(j.bits, 64) {
        for (int w = 0; w < WORDS; w++) {
            uint16_t of[2 * LANES];
            for (int i = 0; i < 2 * LANES; i++) of[i] = i / 2 * Base::UNITS + i % 2 * WORDS + w;
            places[w] = read<Z>(of);
        }
    }

    // False where products would be zeros that are none, or infinite.
    bool spread(int64_t row, float* to) const {
        const uint16_t* const from = (const uint16_t*)job.x + row * job.x_stride;
        for (int64_t s = 0; s < this->strips; s++) {
            Z x[WORDS]; // as it lies in memory
            for (int i = 0; i < WORDS; i++) {
                const int64_t at = s * Base::WIDTH + 2 * i * LANES, rest = std::max<int64_t>(job.columns - at, 0);
                x[i] = _mm512_maskz_loadu_epi16((__mmask32)_bzhi_u32(~0u, std::min<int64_t>(rest, 2 * LANES)), from + at);
            }
            Lanes& lanes = ((Lanes*)to)[s];
            lanes.sums = F{};
            Z top{};
            for (int w = 0; w < WORDS; w++) {
                Z found = _mm512_permutex2var_epi16(x[0], places[w], x[1]);
                if constexpr (WORDS == 4) {
                    const Z later = _mm512_permutex2var_epi16(x[2], places[w], x[3]);
                    found = _mm512_inserti64x4(found, _mm512_castsi512_si256(later), 1);
                }
                lanes.words[w] = found;
                lanes.sums += (F)_mm512_slli_epi32(found, 16) + (F)_mm512_and_si512(found, _mm512_set1_epi32(0xffff0000));
                top = _mm512_max_epu16(top, _mm512_and_si512(found, _mm512_set1_epi16(0x7fff)));
            }
            if (!are_moderate(top)) return false;
        }
        return true;
    }

    // Rows of x with ROWS of the weight, one of each stream.
    template <int M, bool PARTS, bool ZERO>
    __attribute__((noinline)) void add_up(const Task& task, int64_t row, const Lanes* const* xs, const float* scales,
                                          const float* offsets, F (&to)[M][ROWS]) const {
        constexpr int TOGETHER = M > 3 ? 2 : 1; // rows of the weight that x is loaded once for
        F totals[M][ROWS] = {};
        const auto strip = [&](int64_t s, auto&& codes, auto&& scale, auto&& offset) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int first = 0; first < ROWS; first += TOGETHER) {
                constexpr bool APART = VALUES == Values::FEW || VALUES == Values::SOME;
                Z line[TOGETHER];
                Z sums[TOGETHER][M] = {};
#pragma GCC unroll 2
                for (int i = 0; i < TOGETHER; i++) {
                    line[i] = APART ? fields.taken_apart(codes(first + i)) : codes(first + i);
                    asm("" : "+v"(line[i])); // or it is read again for every word
                }
#pragma GCC unroll 4
                for (int j = 0; j < WORDS; j++) {
                    Z w[TOGETHER];
#pragma GCC unroll 2
                    for (int i = 0; i < TOGETHER; i++) w[i] = tables.template two<VALUES>(line[i], j);
#pragma GCC unroll 4
                    for (int m = 0; m < M; m++)
                        if constexpr (TOGETHER == 1) {
                            const Z x = xs[m][s].words[j]; // which need not be loaded
                            sums[0][m] = (Z)_mm512_dpbf16_ps((__m512)sums[0][m], (__m512bh)w[0], (__m512bh)x);
                        } else {
                            const Z x = loaded_in_order(&xs[m][s].words[j]);
#pragma GCC unroll 2
                            for (int i = 0; i < TOGETHER; i++) {
                                Z sum = sums[i][m]; // as in `matmul_words.h`
                                add_pairs(sum, w[i], x);
                                sums[i][m] = sum;
                            }
                        }
                }
#pragma GCC unroll 2
                for (int i = 0; i < TOGETHER; i++)
#pragma GCC unroll 4
                    for (int m = 0; m < M; m++) {
                        const int r = first + i;
                        F sum = (F)sums[i][m], &total = totals[m][r];
                        if (ZERO && job.zero == 1) sum = negative_multiply_add(offset(r), xs[m][s].sums, sum);
                        if (ZERO && job.zero == 2) total = multiply_add(offset(r), xs[m][s].sums, total);
                        total = multiply_add(sum, scale(r), total);
                    }
            }
        };
        this->template each_strip<PARTS>(task, row, scales, offsets, strip);
        memcpy(to, totals, sizeof totals);
    }
};

} // namespace

#endif
