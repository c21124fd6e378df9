// Scales with biases: the sums that 16 of them leave of the weights of a block at once, and the best pair for a block.

namespace {

// Weights (or scales) so small are not worth a search: what is divided by them when they are stored may be bounded.
constexpr float SMALLEST = 1e-30f;

// Over the weights t of a block: how many, and what needs no codes.
struct Norms {
    float count, sum, squares;

    Norms(const float* t, int64_t n) : count((float)n) {
        F total{}, square{};
        for (int64_t i = 0; i < n; i += LANES) {
            const F v = load(t + i);
            total += v, square = multiply_add(v, v, square);
        }
        sum = ::sum(total), squares = ::sum(square);
    }
};

// For 16 pairs of a scale s and a bias b: sums of e, q e and e^2, where q are the codes nearest to (t - b) / s, and
// e = t - b - s q.
struct Moments {
    F e, qe, ee;

    // s sum(q), and s^2 sum(q^2)
    F values(const Norms& t, F bias) const { return t.sum - t.count * bias - e; }
    F squares(const Norms& t, F scale, F bias) const {
        const F centred = t.squares + bias * (t.count * bias - 2 * t.sum);
        return centred - 2 * scale * qe - ee;
    }
};

template <bool BIASED, class E>
inline Moments moments(const E& element, const Job& job, const float* t, int64_t n, F scale, F bias) {
    const F low = all(job.low), high = all(job.high), inverse = 1 / bounded(scale);
    Moments even{}, odd{};
    const auto add = [&](Moments& to, F v) {
        if (BIASED) v = v - bias;
        const F q = element.project(v * inverse, low, high), e = negative_multiply_add(q, scale, v);
        if (BIASED) to.e = to.e + e;
        to.qe = multiply_add(q, e, to.qe), to.ee = multiply_add(e, e, to.ee);
    };
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) add(even, all(t[i])), add(odd, all(t[i + 1]));
    if (i < n) add(even, all(t[i]));
    return {even.e + odd.e, even.qe + odd.qe, even.ee + odd.ee};
}

// The squared errors that some pairs leave, of 16 weights at once.
template <int C, class E>
inline void errors(const E& element, const Job& job, const float* t, int64_t n, const float (&scales)[C],
                   const float (&biases)[C], float (&found)[C]) {
    const F low = all(job.low), high = all(job.high);
    F sums[C] = {};
    for (int64_t i = 0; i < n; i += LANES) {
        const auto inside = lane_numbers() < (int)(n - i);
        for (int c = 0; c < C; c++) {
            const F v = load(t + i) - biases[c], q = element.project(v * all(1 / bounded(scales[c])), low, high);
            const F e = negative_multiply_add(q, all(scales[c]), v);
            sums[c] = multiply_add(e, inside ? e : F{}, sums[c]);
        }
    }
    for (int c = 0; c < C; c++) found[c] = sum(sums[c]);
}

struct Line {
    float scale, bias, error = INFINITY;
};

// Finds the scale and bias of one block with the least squared error: codes by scale and bias, scale and bias by linear
// regression on the codes, from many starts at once.
template <class E> struct LineSearch {
    const E& element;
    const Job& job;
    const float* t;
    const int64_t n;
    const Norms norms;
    const float highest; // of the biases
    Line best{};

    LineSearch(const E& e, const Job& j, const float* from, int64_t count, float most)
        : element(e), job(j), t(from), n(count), norms(from, count), highest(most) {}

    void consider(F scale, F bias) {
        bias = least(bias, all(highest));
        const Moments m = moments<true>(element, job, t, n, scale, bias);
        const F q = m.values(norms, bias), qq = m.squares(norms, scale, bias), qe = scale * m.qe;
        const F spread = norms.count * qq - q * q, product = norms.count * qq;
        F slope = spread > 1e-6f * product ? (norms.count * qe - q * m.e) / spread : F{};
        F shift = (m.e - slope * q) * (1 / norms.count);
        if (highest < INFINITY) {
            const F room = highest - bias;
            const auto over = shift > room;
            shift = over ? room : shift;
            slope = over ? (qq > 0 ? (qe - shift * q) / qq : F{}) : slope;
        }
        const F gain = 2 * (slope * qe + shift * m.e - slope * shift * q) - slope * slope * qq
                       - norms.count * (shift * shift);
        const F error = m.ee - gain;
        const float found = lowest(error);
        if (!(found < best.error)) return;
        const int at = which(error, found);
        best = {scale[at] * (1 + slope[at]), bias[at] + shift[at], found};
    }

    // From ranges shrunk towards the mean.
    void start(float low, float high, const float* factors) {
        const F factor = load(factors);
        const float mean = norms.sum / norms.count;
        const F bottom = least(mean + (low - mean) * factor, all(highest)), top = mean + (high - mean) * factor;
        const F scale = (top - bottom) / (job.high - job.low);
        consider(scale, bottom - scale * job.low);
    }

    // Beside the best: other scales that leave the middle in place, with the codes shifted by parts of a step.
    void around(const float* ratios, const float* shifts) {
        const float middle = (job.high + job.low) / 2;
        const F scale = best.scale * load(ratios);
        consider(scale, best.bias + (best.scale - scale) * middle + load(shifts) * scale);
    }
};

// Where a search for scale and bias looks, by lane.
struct LineGrid {
    static constexpr int ROUNDS = 2;
    alignas(64) float shrunk[LANES], ratios[ROUNDS][LANES], shifts[ROUNDS][LANES];
    alignas(64) float code_steps[LANES], scale_steps[LANES], bias_steps[LANES]; // of the first of two levels

    // Ranges are shrunk down to what clips best of normal weights, and further: tails may be heavier.
    explicit LineGrid(const Job& job) {
        const float shortest = job.bits >= 8 ? 0.88f : job.bits >= 6 ? 0.8f : 0.3f + 0.08f * job.bits;
        for (int i = 0; i < LANES; i++) {
            shrunk[i] = 1.02f + (shortest - 1.02f) * i / (LANES - 1);
            const int tries = job.turns ? LANES / 2 : LANES;
            code_steps[i] = i % tries - tries / 2;
            scale_steps[i] = i < 15 ? i % 5 - 2 : 0, bias_steps[i] = i < 15 ? i / 5 - 1 : 0;
            const float ratio = (i % 4 - 1.5f) / 1.5f, shift = (i / 4 - 1.5f) / 1.5f;
            for (int round = 0; round < ROUNDS; round++) {
                ratios[round][i] = 1 + ratio * 0.09f / (1 << 2 * round);
                shifts[round][i] = shift * 0.5f / (1 << round);
            }
        }
    }
};

template <class E> Line best_line(LineSearch<E> search, const LineGrid& grid, Range range) {
    search.start(range.low, range.high, grid.shrunk);
    for (int i = 0; i < LineGrid::ROUNDS; i++) search.around(grid.ratios[i], grid.shifts[i]);
    return search.best;
}

} // namespace
