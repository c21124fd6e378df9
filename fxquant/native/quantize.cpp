// From weights to planes: one pass over the weight, block by block, each block in the first-level cache.

namespace {

constexpr int64_t SEGMENT = 4096; // about so many columns of a row are one piece of work

template <class E> struct Quantizer {
    const Job& job;
    const E element;
    const Scales scales;
    const Grid grid;

    explicit Quantizer(const Job& j) : job(j), element(j), scales{j.scale_type, j.floor, j.limit}, grid(j) {}

    // All blocks of columns [start, stop) of a row.
    void segment(int64_t row, int64_t start, int64_t stop, float* x, float* t, uint8_t* fields) const {
        for (int64_t c = start; c < stop; c += job.block) {
            const int64_t n = stop - c < job.block ? stop - c : job.block, block = c / job.block;
            const Range range = take(row * job.weight_stride + c, n, x);
            const Choice choice = choose(range, x, t, n);
            scales.put(job.scales, row * job.scales_stride + block, choice.stored);
            if (job.zero_type) {
                const int64_t blocks = (job.columns + job.block - 1) / job.block;
                ((uint8_t*)job.zeros)[row * blocks + block] = (uint8_t)(choice.zero - job.low) ^ job.flip;
            }
            encode(x, n, choice, job.flat && n < job.block, fields + (c - start));
        }
        pack(fields, stop - start, job.bits, job.codes + row * job.codes_stride + start * job.bits / 8);
    }

    Range take(int64_t at, int64_t n, float* x) const {
        if (job.dtype == 0) return take((const float*)job.weight + at, n, x);
        if (job.dtype == 1) return take((const Bf16*)job.weight + at, n, x);
        return take((const Fp16*)job.weight + at, n, x);
    }

    // A block in float32, filled up with zeros to whole vectors, and its range.
    template <class T> Range take(const T* from, int64_t n, float* x) const {
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

    Choice choose(Range range, const float* x, float* t, int64_t n) const {
        const Choice spanning = absmax(range);
        return job.search ? least_squares(element, job, grid, scales, range, spanning, x, t, n) : spanning;
    }

    Choice absmax(Range r) const {
        Choice c = spanning_scale(job, r);
        c.stored = scales.encode(c.scale);
        c.scale = scales.decode(c.stored);
        return c;
    }

    void encode(const float* x, int64_t n, Choice c, bool tail, uint8_t* fields) const {
        const U8 flip = U8{} + (uint8_t)job.flip;
        const auto put = [&](int64_t i, F t) {
            write(fields + i, narrow(element.fields(t, c.zero)) ^ flip);
        };
        const F scale = all(bounded(c.scale)), inverse = all(1 / bounded(c.scale));
        if (tail || E::divides) // a last, shorter flat block is divided, as bitsandbytes does
            for (int64_t i = 0; i < n; i += LANES) put(i, load(x + i) / scale);
        else
            for (int64_t i = 0; i < n; i += LANES) put(i, load(x + i) * inverse);
    }
};

template <class E> void quantize(const Job& job) {
    const Quantizer<E> quantizer(job);
    // Pieces start at whole blocks and whole bytes of codes.
    int64_t unit = job.block;
    while (unit % 8) unit *= 2;
    const int64_t step = unit * (unit < SEGMENT ? SEGMENT / unit : 1), steps = (job.columns + step - 1) / step;
#pragma omp parallel num_threads(job.threads) if (job.threads > 1)
    {
        const int64_t width = step < job.columns ? step : job.columns;
        const std::unique_ptr<float[]> x(new float[2 * (job.block + LANES)]);
        const std::unique_ptr<uint8_t[]> fields(new uint8_t[width + 128]);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < job.rows * steps; i++) {
            const int64_t start = i % steps * step, stop = start + step < job.columns ? start + step : job.columns;
            quantizer.segment(i / steps, start, stop, x.get(), x.get() + job.block + LANES, fields.get());
        }
    }
}

} // namespace

extern "C" void fxquant_quantize(const Job* job) {
    if (job->kind == 0) quantize<Ints>(*job);
    else if (job->kind == 1) quantize<Tables<4>>(*job);
    else if (job->kind == 2) quantize<Tables<6>>(*job);
    else quantize<Floats>(*job);
}
