// Products of few rows of bfloat16 with values of 4 bits in bfloat16 (AVX512-BF16), as `matmul_words_floats.h` has them. A
// lane of a strip, as `matmul_strips.h` has it, is 8 columns: the first and the fifth, the second and the sixth, and so on
// are multiplied together.

#ifdef FXQUANT_BFLOAT16

namespace {

// A row of x in a strip; of every lane the sum of its columns.
struct alignas(64) FloatLanes {
    Z words[Strips::UNITS / 2];
    F sums;
};

struct FloatStrips : StripsOf<FloatStrips, FloatLanes, 4> {
    using Lanes = FloatLanes;

    const Z table; // of values

    static bool takes(const Product& job) {
        return job.bits == 4 && job.x_type == 1 && (is_whole(job) || WIDTH % job.block == 0);
    }

    explicit FloatStrips(const Product& j) : StripsOf(j), table(rounded_pair(values, values)) {}

    // False where products would be zeros that are none, or infinite.
    bool spread(int64_t row, float* to) const {
        for (int64_t s = 0; s < strips; s++) {
            F x[UNITS];
            floats_of(row, s, x);
            Lanes& lanes = ((Lanes*)to)[s];
            lanes.sums = F{};
            Z top{};
            for (int j = 0; j < UNITS / 2; j++) {
                const Z first = _mm512_srli_epi32((Z)x[j], 16); // as they are bfloat16, nothing is lost
                lanes.words[j] = _mm512_or_si512(first, (Z)x[j + UNITS / 2]);
                lanes.sums += x[j] + x[j + UNITS / 2];
                top = _mm512_max_epu16(top, _mm512_and_si512(lanes.words[j], _mm512_set1_epi16(0x7fff)));
            }
            if (!are_moderate(top)) return false;
        }
        return true;
    }

    // Rows of x with ROWS of the weight, one of each stream.
    template <int M, Scaled SCALED, bool ZERO>
    __attribute__((noinline)) void add_up(const Task& task, int64_t row, const Lanes* const* xs, const float* scales,
                                          const float* offsets, F (&to)[M][ROWS]) const {
        F totals[M][ROWS] = {};
        const uint8_t* from[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) from[r] = task.codes(row + r * EACH);
        const U block = as<U>(lane_numbers() * (int)per >> 4); // of every lane
        int64_t left = fold;
        const auto strip = [&](int64_t s, auto&& codes) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const Z line = codes(r);
                const auto number = [&](const float* of) __attribute__((always_inline)) {
                    const float* const at = of + r * EACH * room;
                    return SCALED == Scaled::PARTS ? look_up_low(load(at), block) : all(*at);
                };
                F sums[M] = {};
#pragma GCC unroll 4
                for (int j = 0; j < UNITS / 2; j++) {
                    const Z w = _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 4 * j), table);
#pragma GCC unroll 4
                    for (int m = 0; m < M; m++)
                        sums[m] = (F)_mm512_dpbf16_ps((__m512)sums[m], (__m512bh)w, (__m512bh)xs[m][s].words[j]);
                }
#pragma GCC unroll 4
                for (int m = 0; m < M; m++) {
                    F& total = totals[m][r];
                    if (ZERO && job.zero == 1) sums[m] = negative_multiply_add(number(offsets), xs[m][s].sums, sums[m]);
                    if (ZERO && job.zero == 2) total = multiply_add(number(offsets), xs[m][s].sums, total);
                    total = SCALED == Scaled::ROWS ? total + sums[m] : multiply_add(sums[m], number(scales), total);
                }
            }
            if (SCALED == Scaled::PARTS) scales += per, offsets += per;
            if (SCALED == Scaled::STRIPS && --left == 0) left = fold, scales++, offsets++;
        };
        int64_t s = 0;
        for (; (s + 1) * BYTES <= bytes; s++) {
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) __builtin_prefetch(from[r] + NEAR + s * BYTES, 0, 3);
            strip(s, [&](int r) __attribute__((always_inline)) { return _mm512_loadu_si512(from[r] + s * BYTES); });
        }
        for (; s < strips; s++)
            strip(s, [&](int r) __attribute__((always_inline)) {
                return Panels::read_codes(from[r] + s * BYTES, bytes - s * BYTES);
            });
        memcpy(to, totals, sizeof totals);
    }
};

} // namespace

#endif
