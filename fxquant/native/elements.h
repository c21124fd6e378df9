// What one code means: from weights in units of their scale to the nearest values, and to fields.

namespace {

struct Ints {
    static constexpr bool divides = false;
    float low, high;

    explicit Ints(const Job& job) : low(job.low), high(job.high) {}

    // The nearest value minus zero, where `least` and `most` are the smallest and largest of these.
    F project(F t, F smallest, F largest) const { return rounded(least(most(t, smallest), largest)); }

    I fields(F t, float zero) const {
        const float magic = 12582912.0f;
        const F r = least(most(t, all(low - zero)), all(high - zero)) + all(magic);
        return as<I>(r) - (as<int32_t>(magic) + (int32_t)(low - zero));
    }
};

template <int LEVELS> struct Tables {
    static constexpr bool divides = false;
    static constexpr int N = 1 << LEVELS;
    alignas(64) float nodes[LEVELS][32];
    alignas(64) float sorted[N];
    alignas(64) float codes[N]; // bit patterns of integers

    explicit Tables(const Job& job) {
        for (int level = 0; level < LEVELS; level++)
            for (int i = 0; i < 32; i++) {
                const int64_t bound = (2 * (i & ((1 << level) - 1)) + 1) * (N >> (level + 1)) - 1;
                nodes[level][i] = job.bounds[bound];
            }
        memcpy(sorted, job.sorted, sizeof sorted);
        memcpy(codes, job.places, sizeof codes);
    }

    // How many bounds are below.
    I place(F t) const {
        I at = descend(I{}, t, all(nodes[0][0]));
        for (int level = 1; level < LEVELS && level < 5; level++) at = descend(at, t, look_up<16>(nodes[level], at));
        if constexpr (LEVELS == 6) at = descend(at, t, look_up<32>(nodes[5], at));
        return at;
    }

    F project(F t, F, F) const { return look_up<N>(sorted, place(t)); }
    I fields(F t, float) const { return as<I>(look_up<N>(codes, place(t))); }
};

// Small floats: torch's cast to float8, of what is within range.
struct Floats {
    static constexpr bool divides = true;
    float largest, normal, shift;
    int mantissa, cut;
    uint32_t bias;

    explicit Floats(const Job& job)
        : largest(job.high), normal(std::ldexp(1.0f, job.exponent)),
          shift(std::ldexp(1.0f, 23 + job.exponent - job.mantissa)), mantissa(job.mantissa), cut(23 - job.mantissa),
          bias((uint32_t)(126 + job.exponent) << job.mantissa) {}

    F project(F t, F, F) const {
        const U sign = as<U>(t) & 0x80000000u;
        const F size = magnitude(t);
        const F small = (size + all(shift)) - all(shift), large = as<F>(nearest(size) << cut);
        return as<F>(as<U>(size < all(normal) ? small : large) | sign);
    }

    I fields(F t, float) const {
        const F size = magnitude(t);
        const U small = as<U>(size + all(shift)) - as<uint32_t>(shift), large = nearest(size) - bias;
        return as<I>((size < all(normal) ? small : large) | ((as<U>(t) >> 24) & 0x80));
    }

  private:
    F magnitude(F t) const { return least(as<F>(as<U>(t) & 0x7fffffffu), all(largest)); }

    U nearest(F size) const {
        const U bits = as<U>(size);
        return (bits + ((1u << (cut - 1)) - 1) + ((bits >> cut) & 1)) >> cut;
    }
};

struct Range {
    float low, high;
};

// How a scale is stored.
struct Scales {
    int type;
    float floor, limit;
    // Of 8-bit codes: the second level of fxquant/codecs/double.py.
    const uint8_t* levels = nullptr;
    const float *values = nullptr, *above = nullptr;
    float offset = 0;

    static Scales of(const Job& job) {
        Scales scales{job.scale_type, job.floor, job.limit};
        scales.levels = job.levels, scales.values = job.code_values, scales.offset = job.scale_offset;
        scales.above = (const float*)job.scale_scales;
        return scales;
    }

    uint32_t encode(float scale, int64_t block = 0) const {
        const float magnitude = clamped(std::fabs(scale), floor, limit);
        if (type == 3) return power(scale);
        if (type == 4) return levels[level(scale, 1 / above[block >> 8])];
        const float bounded = scale < 0 ? -magnitude : magnitude;
        if (type == 0) return as<uint32_t>(bounded);
        if (type == 2) return as<uint16_t>((_Float16)bounded);
        const uint32_t bits = as<uint32_t>(bounded);
        return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    }

    float decode(uint32_t stored, int64_t block = 0) const {
        if (type == 0) return as<float>(stored);
        if (type == 1) return as<float>(stored << 16);
        if (type == 2) return (float)as<_Float16>((uint16_t)stored);
        if (type == 4) return values[stored] * above[block >> 8] + offset;
        return as<float>(stored == 0 ? 0x400000u : stored == 255 ? 0x7fc00000u : stored << 23);
    }

    // The smallest and the largest scale.
    Range reach(int64_t block) const {
        if (type == 4) return {decode(0, block), decode(255, block)};
        return {-INFINITY, INFINITY};
    }

    uint32_t get(const void* from, int64_t i) const {
        if (type == 0) return ((const uint32_t*)from)[i];
        return type == 3 ? ((const uint8_t*)from)[i] : ((const uint16_t*)from)[i];
    }

    void put(void* to, int64_t i, uint32_t stored) const {
        if (type == 0) ((uint32_t*)to)[i] = stored;
        else if (type >= 3) ((uint8_t*)to)[i] = (uint8_t)stored;
        else ((uint16_t*)to)[i] = (uint16_t)stored;
    }

  private:
    int level(float scale, float inverse) const {
        const float t = clamped((scale - offset) * inverse, -1, 1); // of what is not a number, -1
        return (int)(float)((double)((t + 1) * 0.5f) * 65535 + 0.5);
    }

    // The smallest power of two that is not less; 0x400000 is 2^-127.
    uint32_t power(float scale) const {
        const uint32_t bits = as<uint32_t>(std::fabs(scale)), exponent = bits >> 23;
        const uint32_t code = exponent ? exponent + ((bits & 0x7fffff) != 0) : bits > 0x400000;
        return code < (uint32_t)limit ? code : (uint32_t)limit;
    }
};

inline float bounded(float scale) { return std::copysign(larger(std::fabs(scale), TINY), scale); }

inline F bounded(F scale) {
    const U bits = as<U>(scale), sign = bits & 0x80000000u;
    return as<F>(as<U>(most(as<F>(bits ^ sign), all(TINY))) | sign);
}

} // namespace
