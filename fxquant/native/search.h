// The scale of one block: the one that spans its range, or the one with the least squared error that a search finds.

namespace {

struct Choice {
    uint32_t stored;
    float scale, zero;
};

inline float extent(const Job& job) {
    return job.kind ? larger(std::fabs(job.low), std::fabs(job.high)) : (job.high - job.low) / 2;
}

inline Choice integer_scale(const Job& job, Range r) {
    const float normal = 1.17549435e-38f;
    if (!job.zero_type) return {0, larger(larger(r.low / job.low, r.high / job.high), normal), 0};
    const float scale = larger((r.high - r.low) / (job.high - job.low), normal);
    const float zero = job.low - std::nearbyint(r.low / scale);
    return {0, scale, clamped(zero, job.low, job.high)};
}

// The rules of fxquant/codecs/{integers,tables,floats}.py, `absmax`, to the last bit.
inline Choice spanning_scale(const Job& job, Range r) {
    if (job.kind == 0) return integer_scale(job, r);
    // Of a block of zeros the larger one may be -0.
    if (job.low == -job.high || job.low >= 0 || job.high <= 0)
        return {0, std::fabs(larger(-r.low, r.high)) / extent(job), 0};
    return {0, std::fabs(larger(r.low / job.low, r.high / job.high)), 0};
}

// A search goes on in units of this scale. Its sign gives the longer side of the codes to that of the larger weights.
inline Choice unit_scale(const Job& job, Range r) {
    if (job.zero_type) return integer_scale(job, r);
    const float scale = larger(-r.low, r.high) / extent(job);
    const bool turned = job.low != -job.high && (r.high > -r.low) != (job.high > -job.low);
    return {0, turned && !job.positive ? -scale : scale, 0};
}

// Scales to try, in units: 16 in geometric progression, or 8 of each sign, down to a bottom with a mantissa of 3 bits.
struct Grid {
    static constexpr float LOWEST = 1e-4f, HIGHEST = 0.85f;
    static constexpr int CUT = 20, ROWS = 112;
    float deviations;
    alignas(64) float factors[ROWS][LANES];

    explicit Grid(const Job& job) : deviations(job.kind == 3 ? 1e9f : 0.3f * job.bits + 0.7f) {
        if (!job.search) return;
        const int tries = job.turns ? LANES / 2 : LANES;
        // The relative error of floats repeats with every octave.
        const double top = job.kind == 3 ? 2 : job.kind ? 1.1 : 1.05;
        for (int row = 0; row < ROWS; row++) {
            const double bottom = as<float>((first() + row) << CUT);
            for (int i = 0; i < LANES; i++) {
                const double factor = top * std::pow(bottom / top, i % tries / (tries - 1.0));
                factors[row][i] = (float)(i < tries ? factor : -factor);
            }
        }
    }

    F from(float bottom) const {
        return read<F>(factors[(as<uint32_t>(clamped(bottom, LOWEST, HIGHEST)) >> CUT) - first()]);
    }

  private:
    static uint32_t first() { return as<uint32_t>(LOWEST) >> CUT; }
};

template <class V> struct Sums {
    V cross, residual; // of r q and r^2, where q are the values nearest to t = w / scale, and r = t - q
};

template <class V> struct Fit {
    V scale, error;
};

// The best scale for the codes that a scale gives, and the squared error with these codes and that scale. From the
// residuals, which keep their digits where sum(w q) and sum(q^2) lose them.
template <class V> inline Fit<V> refit(V scale, Sums<V> sums, float norm) {
    const V squares = norm / (scale * scale) - 2 * sums.cross - sums.residual;
    const V step = squares > 0 ? sums.cross / squares : V{};
    return {scale + scale * step, (sums.residual - step * sums.cross) * (scale * scale)};
}

template <class E> struct Search {
    const E& element;
    const Job& job;
    const int64_t n;

    // Sixteen scales at once.
    Sums<F> across(const float* t, F inverse, F zero) const {
        const F smallest = all(job.low) - zero, largest = all(job.high) - zero;
        Sums<F> even{}, odd{};
        int64_t i = 0;
        for (; i + 2 <= n; i += 2) {
            add(even, all(t[i]) * inverse, smallest, largest);
            add(odd, all(t[i + 1]) * inverse, smallest, largest);
        }
        if (i < n) add(even, all(t[i]) * inverse, smallest, largest);
        return {even.cross + odd.cross, even.residual + odd.residual};
    }

    // Sixteen weights at once, with one scale or, for the latency of it, two.
    template <int C> void along(const float* x, const float (&scales)[C], const float (&zeros)[C],
                                Sums<float> (&found)[C]) const {
        F factors[C], smallest[C], largest[C];
        Sums<F> sums[C] = {};
        for (int c = 0; c < C; c++) {
            factors[c] = all(E::divides ? scales[c] : 1 / scales[c]);
            smallest[c] = all(job.low - zeros[c]), largest[c] = all(job.high - zeros[c]);
        }
        const auto each = [&](int64_t i, Sums<F>* to) {
            for (int c = 0; c < C; c++)
                add(to[c], E::divides ? load(x + i) / factors[c] : load(x + i) * factors[c], smallest[c], largest[c]);
        };
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) each(i, sums);
        if (i < n) { // behind the block there are zeros, and a table may have none
            Sums<F> last[C] = {};
            each(i, last);
            const I inside = lane_numbers() < (int)(n - i);
            for (int c = 0; c < C; c++) {
                sums[c].cross += inside ? last[c].cross : F{};
                sums[c].residual += inside ? last[c].residual : F{};
            }
        }
        for (int c = 0; c < C; c++) found[c] = {sum(sums[c].cross), sum(sums[c].residual)};
    }

    void add(Sums<F>& sums, F t, F smallest, F largest) const {
        const F q = element.project(t, smallest, largest), r = t - q;
        sums.cross = multiply_add(r, q, sums.cross);
        sums.residual = multiply_add(r, r, sums.residual);
    }
};

constexpr int POLISH = 2;

struct Best {
    float scale, zero, error = INFINITY;

    void consider(Fit<F> fit, F zeros) {
        const float found = lowest(fit.error);
        if (!(found < error)) return;
        const int at = which(fit.error, found);
        *this = {fit.scale[at], zeros[at], found};
    }

    bool consider(Fit<float> fit) {
        const bool better = fit.error < error;
        if (better) scale = fit.scale, error = fit.error;
        return better;
    }
};

struct Spread {
    float norm, deviation; // sum of squares; from the mean where there is a zero point, else from 0
};

inline Spread spread(const float* t, int64_t n, bool centred) {
    F squares{}, total{};
    for (int64_t i = 0; i < n; i += LANES) {
        const F v = load(t + i);
        squares = multiply_add(v, v, squares), total += v;
    }
    const float norm = sum(squares), mean = centred ? sum(total) / n : 0;
    return {norm, std::sqrt(larger(norm / n - mean * mean, 0))};
}

// `reach` are the scales that can be stored, in the units of t; others are no start.
template <class E>
Best best_fit(const Search<E>& search, const Grid& grid, const float* t, float zero,
              Range reach = {-INFINITY, INFINITY}) {
    const Job& job = search.job;
    const Spread block = spread(t, search.n, job.zero_type);
    const F factors = grid.from(block.deviation * grid.deviations / extent(job));
    const float down = factors[1] / factors[0], up = 1 / down;
    Best best{1, zero};
    const auto sixteen = [&](F scale, F zeros) {
        Fit<F> fit = refit(scale, search.across(t, 1 / scale, zeros), block.norm);
        fit.error = scale < reach.low || scale > reach.high ? all(INFINITY) : fit.error;
        best.consider(fit, zeros);
    };
    const auto several = [&](auto... scale) {
        constexpr int C = sizeof...(scale);
        const float scales[] = {scale...}, zeros[] = {(scale, best.zero)...};
        Sums<float> sums[C];
        search.along(t, scales, zeros, sums);
        bool better = false;
        for (int c = 0; c < C; c++) better |= best.consider(refit(scales[c], sums[c], block.norm));
        return better;
    };
    sixteen(factors, all(zero));
    if (job.zero_type) {
        const float steps[] = {down * down, down, 1, up, up * up};
        F scale, zeros;
        for (int i = 0; i < LANES; i++) {
            scale[i] = best.scale * steps[i % 5];
            zeros[i] = clamped(best.zero + (float)(i / 5 - 1), job.low, job.high);
        }
        sixteen(scale, zeros);
    }
    // Where scales are far apart, or little is rounded and all depends on the scale.
    float step = std::sqrt(down);
    for (int i = job.turns ? 2 : job.bits > 4; i > 0; i--, step = std::sqrt(step))
        several(best.scale * step, best.scale / step);
    for (int i = 0; i < POLISH && several(best.scale); i++) {}
    return best;
}

// Of two scales as they are stored, the one with the smaller error; of equals, or where a scale is too small to divide
// by, the first.
template <class E> Choice better(const Search<E>& search, const float* x, float inverse, Choice a, Choice b) {
    if (std::fabs(a.scale) < TINY || std::fabs(b.scale) < TINY) return a;
    const float scales[] = {a.scale, b.scale}, zeros[] = {a.zero, b.zero};
    Sums<float> sums[2];
    search.along(x, scales, zeros, sums);
    const float first = a.scale * inverse, second = b.scale * inverse;
    return sums[1].residual * (second * second) < sums[0].residual * (first * first) ? b : a;
}

// Of `spanning` and what the search finds, the one with the smaller error.
template <class E>
Choice least_squares(const E& element, const Job& job, const Grid& grid, const Scales& scales, Range range,
                     Choice spanning, const float* x, float* t, int64_t n, int64_t block) {
    const Search<E> search{element, job, n};
    const Choice unit = unit_scale(job, range);
    const float inverse = 1 / bounded(unit.scale);
    const auto stored = [&](uint32_t code, float zero) { return Choice{code, scales.decode(code, block), zero}; };
    if (job.scale_type == 3) {
        Choice best = spanning;
        for (const int step : {-1, -2, 1}) {
            const int code = (int)spanning.stored + step;
            if (code >= 0 && code <= (int)job.limit) best = better(search, x, inverse, best, stored(code, 0));
        }
        return best;
    }
    for (int64_t i = 0; i < n; i += LANES) store(t + i, load(x + i) * all(inverse));
    const Range ends = scales.reach(block);
    const float one = ends.low * inverse, other = ends.high * inverse;
    const Best fit = best_fit(search, grid, t, unit.zero, {smaller(one, other), larger(one, other)});
    const uint32_t code = scales.encode(fit.scale * bounded(unit.scale), block);
    Choice best = better(search, x, inverse, spanning, stored(code, fit.zero));
    if (job.scale_type != 4) return best;
    // Codes lie far apart.
    for (const int step : {-1, 1}) {
        const int near = (int)best.stored + step;
        if (near >= 0 && near <= 255) best = better(search, x, inverse, best, stored(near, best.zero));
    }
    return best;
}

} // namespace
