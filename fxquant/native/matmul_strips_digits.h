// Products of one or two rows of x with integers of 4 bits, as whole numbers. Every lane of a strip of the weight, as
// `matmul_strips.h` has them, is 8 columns, whose products with three digits of the floats of x are added up exactly, and
// become a float with the scales. That takes fewer instructions than to look weights up and multiply floats.

#ifdef FXQUANT_CODES

namespace {

// A row of x in a strip: digits, of even columns and of odd ones; of every lane the power of two that its floats are
// multiples of, their sum, and that times the integer that the code 0 stands for.
struct alignas(64) DigitLanes {
    static constexpr int DIGITS = 3; // as in `matmul_inputs.h`, but the lanes of a strip have powers of two of their own
    Z digits[DIGITS][2];
    F scales, sums;
    Z starts;
};

struct DigitStrips : StripsOf<DigitStrips, DigitLanes, 2, 128> {
    using Lanes = DigitLanes;
    static constexpr int DIGITS = Lanes::DIGITS;

    static bool takes(const Product& job) {
        return job.bits == 4 && job.kind == 0 && job.x_type != 0 && StripsOf::takes(job);
    }

    explicit DigitStrips(const Product& j) : StripsOf(j) {}

    // False where floats are not to be had as whole numbers.
    bool spread(int64_t row, float* to) const {
        for (int64_t s = 0; s < strips; s++) {
            F x[UNITS];
            floats_of(row, s, x);
            if (!take_apart(x, ((Lanes*)to)[s])) return false;
        }
        return true;
    }

    // The columns of a lane are whole numbers times a power of two, by which the largest gets 23 or 24 bits with its sign.
    bool take_apart(const F (&x)[UNITS], Lanes& to) const {
        Z top{};
        for (const F& v : x) top = _mm512_max_epu32(top, (Z)_mm512_abs_ps((__m512)v)); // NaN is the largest as bits
        const __mmask16 any = _mm512_test_epi32_mask(top, top);
        const auto power = [](int exponent) { return _mm512_set1_epi32((127 + exponent) << 23); };
        // Powers of two have to be floats, and sums of what they are multiplied with.
        if (_mm512_cmpge_epu32_mask(top, power(100)) || _mm512_mask_cmplt_epu32_mask(any, top, power(-80))) return false;
        constexpr int MOST = 22, FRACTION = 0x7efefe; // 127 in every digit, as a float: 2^22 and so much more
        const Z fraction = _mm512_and_si512(top, _mm512_set1_epi32(0x7fffff));
        const __mmask16 more = _mm512_cmpgt_epu32_mask(fraction, _mm512_set1_epi32(FRACTION));
        Z shift = _mm512_sub_epi32(_mm512_set1_epi32(127 + MOST), _mm512_srli_epi32(top, 23));
        shift = _mm512_maskz_mov_epi32(any, _mm512_mask_sub_epi32(shift, more, shift, _mm512_set1_epi32(1)));
        const auto two_to = [](Z exponent) {
            return (__m512)_mm512_slli_epi32(_mm512_add_epi32(exponent, _mm512_set1_epi32(127)), 23);
        };
        const __m512 factor = two_to(shift);
        Z sum{};
        memset(to.digits, 0, sizeof to.digits);
        for (int j = 0; j < UNITS; j++) {
            Z whole = _mm512_cvtps_epi32(_mm512_mul_ps((__m512)x[j], factor));
            sum = _mm512_add_epi32(sum, whole);
            for (int d = 0; d < DIGITS; d++) {
                const Z digit = _mm512_and_si512(whole, _mm512_set1_epi32(255));
                to.digits[d][j % 2] = _mm512_or_si512(to.digits[d][j % 2], _mm512_slli_epi32(digit, j / 2 * 8));
                whole = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
            }
        }
        to.scales = (F)two_to(_mm512_sub_epi32(Z{}, shift));
        to.sums = (F)_mm512_cvtepi32_ps(sum);
        to.starts = _mm512_mullo_epi32(sum, _mm512_set1_epi32(job.low));
        return true;
    }

    // Rows of x with ROWS of the weight, one of each stream.
    template <int M, bool PARTS, bool ZERO>
    __attribute__((noinline)) void add_up(const Task& task, int64_t row, const Lanes* const* xs, const float* scales,
                                          const float* offsets, F (&to)[M][ROWS]) const {
        F totals[M][ROWS] = {};
        const Z low = _mm512_set1_epi8(15);
        const auto strip = [&](int64_t s, auto&& codes, auto&& scale, auto&& offset) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const Z line = codes(r);
                const Z w[2] = {_mm512_and_si512(line, low), _mm512_and_si512(_mm512_srli_epi16(line, 4), low)};
                // Each digit by itself: a single sum would do, but its products would have to wait for each other.
                Z sums[M][DIGITS];
#pragma GCC unroll 2
                for (int m = 0; m < M; m++) sums[m][0] = xs[m][s].starts, sums[m][1] = sums[m][2] = Z{};
#pragma GCC unroll 2
                for (int odd = 0; odd < 2; odd++)
#pragma GCC unroll 3
                    for (int d = 0; d < DIGITS; d++)
#pragma GCC unroll 2
                        for (int m = 0; m < M; m++) add_products(sums[m][d], w[odd], xs[m][s].digits[d][odd]);
#pragma GCC unroll 2
                for (int m = 0; m < M; m++) {
                    const Lanes& x = xs[m][s];
                    const Z higher = _mm512_add_epi32(sums[m][1], _mm512_slli_epi32(sums[m][2], 8));
                    // Below 2^31: of 8 columns, each with 24 bits of x and 4 of the weight.
                    F sum = (F)_mm512_cvtepi32_ps(_mm512_add_epi32(sums[m][0], _mm512_slli_epi32(higher, 8)));
                    F& total = totals[m][r];
                    if (ZERO) {
                        if (job.zero == 1) sum = negative_multiply_add(offset(r), x.sums, sum);
                        else total = multiply_add(x.sums * x.scales, offset(r), total);
                    }
                    total = multiply_add(sum * x.scales, scale(r), total);
                }
            }
        };
        each_strip<PARTS>(task, row, scales, offsets, strip);
        memcpy(to, totals, sizeof totals);
    }
};

} // namespace

#endif
