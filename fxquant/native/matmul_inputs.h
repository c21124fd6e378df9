// Rows of x in bytes, for products with integers: int8 codes, or floats as whole numbers of three digits to the base of
// 256, each from -128 to 127. Floats become whole numbers by a power of two, the same for up to 128 columns, whose largest
// float then has 23 or 24 bits with its sign: an error of about 2^-23 of that float, and no more than sums in float32 make.
// In bfloat16, which has 8 bits, and float16, which has 11, only floats that are 2^14 or 2^11 times smaller are rounded.

#ifdef FXQUANT_AVX512

namespace {

typedef __m512i Z;

} // namespace

#ifdef __AVX512VNNI__
#define FXQUANT_CODES

#include <algorithm>

namespace {

template <int DIGITS> struct Inputs {
    static constexpr int64_t PANEL = 128; // columns

    // Of columns that have one scale: the sum of each digit times `low`, and three zeros; the sum of the numbers that the
    // digits make up; their scale; and which words of four columns of the panel are of these and have lowest digits.
    struct alignas(16) Step {
        int32_t starts[DIGITS][4];
        float total, scale;
        uint32_t lowest;
    };

    const Product& job;
    const int64_t panels;    // of a row
    const int64_t step, per; // columns of a step, and steps of a panel
    const int64_t stride;    // bytes of a panel: one digit of all columns behind the other, then steps
    const int64_t units;     // of a row
    const bool whole;        // sums of a row's products are whole numbers up to its end, and 32 bits hold them

    explicit Inputs(const Product& j)
        : job(j), panels((j.columns + PANEL - 1) / PANEL), step(step_of(j)), per(PANEL / step),
          stride(DIGITS * PANEL + per * sizeof(Step)), units((panels * stride + 63) / 64),
          whole(DIGITS == 1 && j.block >= j.columns && j.x_group >= j.columns && !j.zero && j.columns <= 1 << 16) {}

    // A power of two, since blocks of the weight and groups of x consist of 16 columns.
    static int64_t step_of(const Product& job) {
        int64_t step = PANEL;
        const auto fits = [&](int64_t size) { return size >= job.columns || size % step == 0; };
        while (!fits(job.block) || (DIGITS == 1 && !fits(job.x_group))) step /= 2;
        return step;
    }

    // Where a row that is spread has the digits of a panel, and its steps.
    const int8_t* digits(const float* x, int64_t panel) const { return (const int8_t*)x + panel * stride; }
    const Step* steps(const float* x, int64_t panel) const { return (const Step*)(digits(x, panel) + DIGITS * PANEL); }

    // False where floats are not to be had as whole numbers.
    bool spread(int64_t row, float* to) const {
        memset((int8_t*)digits(to, panels - 1), 0, stride); // columns that are not there
        const int64_t size = DIGITS == 1 ? job.x_group : step;
        for (int64_t first = 0; first < job.columns; first += size) {
            const int64_t end = std::min(first + size, job.columns);
            float scale;
            if (DIGITS > 1) {
                if (!take_apart(row, first, end, to, scale)) return false;
            } else if (job.x_codes == 1) {
                const int8_t* const codes = (const int8_t*)job.x + row * job.x_stride;
                for (int64_t i = first; i < end; i += LANES)
                    memcpy(place(to, i, 0), codes + i, std::min<int64_t>(LANES, end - i));
                scale = job.x_scales[row * job.x_scales_stride + (job.x_scales_stride ? first / size : 0)];
            } else {
                scale = quantize(row, first, end, to);
            }
            for (int64_t i = first; i < end; i += step) ((Step*)steps(to, i / PANEL))[i % PANEL / step].scale = scale;
        }
        for (int64_t panel = 0; panel < panels; panel++) add_up((int8_t*)digits(to, panel), (Step*)steps(to, panel));
        return true;
    }

  private:
    int8_t* place(float* to, int64_t column, int digit) const {
        return (int8_t*)digits(to, column / PANEL) + digit * PANEL + column % PANEL;
    }

    // `function` with the first column of every 16, and these; zeros behind the last.
    template <class Function> void each(int64_t row, int64_t first, int64_t end, const Function& function) const {
        const auto go_on = [&](const auto* typed) __attribute__((always_inline)) {
            const auto* const x = typed + row * job.x_stride;
            int64_t i = first;
            for (; i + LANES <= end; i += LANES) function(i, (__m512)load(x + i));
            if (i < end) function(i, (__m512)load_some(x + i, end - i));
        };
        if (job.x_type == 0) go_on((const float*)job.x);
        else if (job.x_type == 1) go_on((const Bf16*)job.x);
        else go_on((const Fp16*)job.x);
    }

    // The largest magnitude; NaN if one is, since of numbers as bits none is larger.
    float largest(int64_t row, int64_t first, int64_t end) const {
        Z top{};
        each(row, first, end, [&](int64_t, __m512 v) __attribute__((always_inline)) {
            top = _mm512_max_epu32(top, (Z)_mm512_abs_ps(v));
        });
        return as<float>(_mm512_reduce_max_epu32(top));
    }

    bool take_apart(int64_t row, int64_t first, int64_t end, float* to, float& scale) const {
        constexpr float MOST = 0x7f7f7f; // 127 of every digit
        const float top = largest(row, first, end);
        // Powers of two have to be floats, and sums of what they are multiplied with.
        if (!(top < 0x1p100f) || (top && top < 0x1p-80f)) return false;
        const uint32_t bits = as<uint32_t>(top), of_top = bits >> 23, of_most = as<uint32_t>(MOST) >> 23;
        const bool more = as<float>((bits & 0x7fffff) | of_most << 23) > MOST;
        const uint32_t shift = top ? of_most - of_top - more : 0;
        const __m512 factor = _mm512_set1_ps(as<float>((127 + shift) << 23));
        scale = as<float>((127 - shift) << 23);
        each(row, first, end, [&](int64_t i, __m512 v) __attribute__((always_inline)) {
            Z whole = _mm512_cvtps_epi32(_mm512_mul_ps(v, factor));
            for (int d = 0; d < DIGITS; d++) {
                _mm_storeu_si128((__m128i*)place(to, i, d), _mm512_cvtepi32_epi8(whole));
                whole = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
            }
        });
        return true;
    }

    // Codes, and their scale, as `fxquant.activation_codecs.quantize_activation` makes them.
    float quantize(int64_t row, int64_t first, int64_t end, float* to) const {
        float scale;
        if (job.x_codes == 3) scale = std::max(job.x_scales[0], 0x1p-126f);
        else {
            const float top = largest(row, first, end);
            scale = top != top ? NAN : std::max(top / 127.0f, 0x1p-126f);
        }
        // A quotient takes longer than all the rest. Up to 127 a product with the inverse, if that has all its bits, is
        // less than 1e-4 away from it: that matters where it is as close to the middle between two codes.
        const float inverse = 1 / scale;
        const bool quick = inverse >= 0x1p-126f;
        const auto held_in = [](__m512 t) __attribute__((always_inline)) { // NaN where t is
            return _mm512_max_ps(_mm512_set1_ps(-127), _mm512_min_ps(_mm512_set1_ps(127), t));
        };
        each(row, first, end, [&](int64_t i, __m512 v) __attribute__((always_inline)) {
            __m512 held = held_in(_mm512_mul_ps(v, _mm512_set1_ps(inverse)));
            const __m512 off = _mm512_sub_ps(held, _mm512_roundscale_ps(held, _MM_FROUND_TO_NEAREST_INT));
            __mmask16 numbers = 0xffff;
            if (!quick || _mm512_cmp_ps_mask(_mm512_abs_ps(off), _mm512_set1_ps(0.4999f), _CMP_NLE_UQ)) {
                held = held_in(_mm512_div_ps(v, _mm512_set1_ps(scale)));
                numbers = _mm512_cmp_ps_mask(held, held, _CMP_ORD_Q);
            }
            _mm_storeu_si128((__m128i*)place(to, i, 0), _mm512_cvtepi32_epi8(_mm512_maskz_cvtps_epi32(numbers, held)));
        });
        return scale;
    }

    // Brings digits of a panel into the order of the weight, and fills its steps. A weight of 4 bits has even columns in
    // the low halves of bytes, so that these come first, then odd ones.
    void add_up(int8_t* digits, Step* steps) const {
        const bool halves = job.bits == 4;
        Z of_low[DIGITS], of_high[DIGITS]; // sums of 8 columns each, or of 4
        uint32_t words = 0;                // that have lowest digits
        for (int d = 0; d < DIGITS; d++, digits += PANEL) {
            Z a = _mm512_loadu_si512(digits), b = _mm512_loadu_si512(digits + 64);
            if (halves) {
                const auto joined = [](__m256i low, __m256i high) {
                    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
                };
                const auto odd = [](Z v) { return _mm512_cvtepi16_epi8(_mm512_srli_epi16(v, 8)); };
                const Z even = joined(_mm512_cvtepi16_epi8(a), _mm512_cvtepi16_epi8(b));
                b = joined(odd(a), odd(b)), a = even;
                _mm512_storeu_si512(digits, a), _mm512_storeu_si512(digits + 64, b);
            }
            if (d == 0) words = _mm512_test_epi32_mask(a, a) | (uint32_t)_mm512_test_epi32_mask(b, b) << 16;
            const Z one = _mm512_set1_epi8(1);
            of_low[d] = _mm512_dpbusd_epi32(Z{}, one, a);
            if (halves) of_low[d] = _mm512_dpbusd_epi32(of_low[d], one, b), of_high[d] = Z{};
            else of_high[d] = _mm512_dpbusd_epi32(Z{}, one, b);
        }
        const uint32_t lanes = step / (halves ? 8 : 4), mine = (uint32_t)((1ull << lanes) - 1); // of a step
        for (int64_t s = 0; s < per; s++) {
            const uint32_t mask = mine << s * lanes;
            int64_t total = 0;
            for (int d = 0; d < DIGITS; d++) {
                const Z low = _mm512_maskz_mov_epi32(mask & 0xffff, of_low[d]);
                const int32_t sum = _mm512_reduce_add_epi32(_mm512_mask_add_epi32(low, mask >> 16, low, of_high[d]));
                _mm_store_si128((__m128i*)steps[s].starts[d], _mm_setr_epi32(sum * job.low, 0, 0, 0));
                total += (int64_t)sum << 8 * d;
            }
            steps[s].total = (float)total;
            steps[s].lowest = words & (halves ? mask | mask << 16 : mask);
        }
    }
};

} // namespace

#endif
#endif
