// One pass over a weight: pieces of rows that stay in the first-level cache, each worked on by one thread.

namespace {

constexpr int64_t SEGMENT = 4096; // about so many columns of a row are one piece of work

// What a thread works in.
struct Room {
    float *x, *t;    // of `whole` weights and a vector each
    uint8_t* fields; // of a piece, and 128 more
    int64_t piece;   // its number
};

// How a row is cut: at multiples of `whole` columns, which belong together, and at whole bytes of codes.
struct Pieces {
    int64_t step, steps;

    Pieces(const Job& job, int64_t whole) {
        int64_t unit = whole;
        while (unit % 8) unit *= 2;
        step = unit * (unit < SEGMENT ? SEGMENT / unit : 1), steps = (job.columns + step - 1) / step;
    }
};

// Calls `piece(row, start, stop, room)` for all columns of all rows.
template <class P> void in_pieces(const Job& job, int64_t whole, const P& piece) {
    const auto [step, steps] = Pieces(job, whole);
#pragma omp parallel num_threads(job.threads) if (job.threads > 1)
    {
        const int64_t width = step < job.columns ? step : job.columns, size = (whole + 2 * LANES) & -LANES;
        const std::unique_ptr<float[]> x(new float[2 * size]);
        const std::unique_ptr<uint8_t[]> fields(new uint8_t[width + 128]);
        Room room{x.get(), x.get() + size, fields.get(), 0};
#pragma omp for schedule(static)
        for (int64_t i = 0; i < job.rows * steps; i++) {
            room.piece = i;
            const int64_t start = i % steps * step, stop = start + step < job.columns ? start + step : job.columns;
            piece(i / steps, start, stop, room);
        }
    }
}

// Weights in float32, filled up with zeros to whole vectors, and their range.
template <class T> Range take(const T* from, int64_t n, float* x) {
    F low = all(0), high = all(0);
    const auto each = [&](int64_t i, F v) {
        low = least(low, v), high = most(high, v);
        store(x + i, v);
    };
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) each(i, load(from + i));
    if (i < n) each(i, load_some(from + i, n - i));
    return {lowest(low), -lowest(-high)};
}

inline Range take(const Job& job, int64_t row, int64_t column, int64_t n, float* x) {
    const int64_t at = row * job.weight_stride + column;
    if (job.dtype == 0) return take((const float*)job.weight + at, n, x);
    if (job.dtype == 1) return take((const Bf16*)job.weight + at, n, x);
    return take((const Fp16*)job.weight + at, n, x);
}

// The range without 0.
inline Range span(const float* x, int64_t n) {
    F low = all(x[0]), high = low;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) low = least(low, load(x + i)), high = most(high, load(x + i));
    if (i < n) {
        const auto inside = lane_numbers() < (int)(n - i);
        const F v = inside ? load(x + i) : low;
        low = least(low, v), high = most(high, v);
    }
    return {lowest(low), -lowest(-high)};
}

inline void pack_piece(const Job& job, int64_t row, int64_t start, int64_t stop, uint8_t* fields) {
    if (job.codes) pack(fields, stop - start, job.bits, job.codes + row * job.codes_stride + start * job.bits / 8);
}

// A block of weights as fields, at a stored scale, and integer zeros.
template <class E>
void encode(const Job& job, const E& element, const float* x, int64_t n, float stored, float zero, bool divides,
            uint8_t* fields) {
    const U8 flip = U8{} + (uint8_t)job.flip;
    const F scale = all(bounded(stored)), inverse = all(1 / bounded(stored));
    const auto put = [&](int64_t i, F t) { write(fields + i, narrow(element.fields(t, zero)) ^ flip); };
    if (divides)
        for (int64_t i = 0; i < n; i += LANES) put(i, load(x + i) / scale);
    else
        for (int64_t i = 0; i < n; i += LANES) put(i, load(x + i) * inverse);
}

// The same of integers with a bias and a float zero, of which one is 0.
inline void encode(const Job& job, const Ints& element, const float* x, int64_t n, float stored, float bias,
                   float zero, bool divides, uint8_t* fields) {
    const U8 flip = U8{} + (uint8_t)job.flip;
    const F scale = all(bounded(stored)), inverse = all(1 / bounded(stored));
    for (int64_t i = 0; i < n; i += LANES) {
        const F v = load(x + i) - bias, t = divides ? v / scale : v * inverse;
        write(fields + i, narrow(element.fields(t + zero, 0)) ^ flip);
    }
}

} // namespace
