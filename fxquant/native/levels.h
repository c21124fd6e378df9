// Scales (and biases) of two levels within a row: integers per block under one number per group of blocks.

namespace {

constexpr int MOST = 64; // blocks of a group

// What the first level stores: `low + step * field`.
struct Codes {
    float low, step, last, inverse; // of the step, a power of two

    explicit Codes(const Job& job)
        : low((float)job.code_low), step((float)job.code_step), last((float)job.code_last),
          inverse(1 / step) {}

    float value(float field) const { return low + step * field; }
    F value(F field) const { return low + step * field; }
    float high() const { return value(last); }
    float nearest(float ratio) const { return clamped(std::nearbyint((ratio - low) * inverse), 0, last); }
    F nearest(F ratio) const { return rounded(least(most((ratio - low) * inverse, F{}), all(last))); }
};

// Chooses second-level numbers for the `count` values of a group, by the rules of fxquant/codecs/second_level.py.
struct Second {
    const Codes codes;
    const Scales format;
    const bool positive, biases; // biases are not above 0 where their codes have no sign
    const bool two_sided;

    Second(const Job& job, bool of_biases)
        : codes(job), format{job.scale_type, job.floor, job.limit}, positive(job.positive), biases(of_biases),
          two_sided(!job.positive) {}

    // The value of the largest magnitude.
    float peak(const float* values, int count) const {
        float low = values[0], high = values[0];
        for (int i = 1; i < count; i++) low = smaller(low, values[i]), high = larger(high, values[i]);
        if (positive) return biases ? low : high;
        return high > -low ? high : low;
    }

    uint32_t spanning(const float* values, int count) const {
        const float top = peak(values, count);
        return stored(top / codes.high(), top);
    }

    // What is not zero must not round to it, and what is, need not be the smallest number instead.
    uint32_t stored(float value, float top) const { return biases && top == 0 ? 0 : format.encode(value); }

    uint32_t store(float value) const {
        if (positive) value = biases ? smaller(value, 0) : larger(value, 0);
        return stored(value, value);
    }

    // The least `sum(weights * (values - code * number)^2)`. Where the largest value lands among the codes: up to the
    // last code every value is within reach; beyond, the largest are clipped, which pays where few blocks have them.
    uint32_t fitting(const float* values, const float* weights, int count) const {
        const float top = peak(values, count);
        if (top == 0) return stored(0, 0);
        float best = 1 / codes.high(), error = INFINITY;
        F reach;
        for (int i = 0; i < LANES; i++) reach[i] = 1.12f - 0.32f / (LANES - 1) * i;
        for (int side = 0; side <= two_sided; side++) {
            // In units of the largest value, so that squares stay finite.
            const F inverse = reach * (side ? codes.low : codes.high()), number = 1 / inverse;
            F sums{};
            for (int i = 0; i < count; i++) {
                const float v = values[i] / top;
                const F off = v - codes.value(codes.nearest(v * inverse)) * number;
                sums = multiply_add(off * off, all(weights[i]), sums);
            }
            const float found = lowest(sums);
            if (found < error) error = found, best = number[which(sums, found)];
        }
        return store(top * best);
    }
};

// The normal equations of how much larger, in proportion, both second-level numbers should be.
struct Normal {
    float scale{}, scale_scale{}, bias{}, bias_bias{}, scale_bias{};

    void solve(float (&steps)[2]) const {
        const float product = scale_scale * bias_bias, determinant = product - scale_bias * scale_bias;
        steps[0] = scale_scale > 0 ? scale / scale_scale : 0, steps[1] = 0;
        if (!(determinant > 1e-5f * product)) return;
        steps[0] = (bias_bias * scale - scale_bias * bias) / determinant;
        steps[1] = (scale_scale * bias - scale_bias * scale) / determinant;
    }
};

} // namespace
