// From weights to planes: one pass over the weight, block by block, each block in the first-level cache.

namespace {

template <class E> struct Quantizer {
    const Job& job;
    const E element;
    const Scales scales;
    const Grid grid;

    explicit Quantizer(const Job& j) : job(j), element(j), scales(Scales::of(j)), grid(j) {}

    // All blocks of columns [start, stop) of a row.
    void operator()(int64_t row, int64_t start, int64_t stop, const Room& room) const {
        for (int64_t c = start; c < stop; c += job.block) {
            const int64_t n = stop - c < job.block ? stop - c : job.block, block = c / job.block;
            const Range range = take(job, row, c, n, room.x);
            const Choice choice = choose(range, room.x, room.t, n, block);
            scales.put(job.scales, row * job.scales_stride + block, choice.stored);
            if (job.zero_type) {
                const int64_t blocks = (job.columns + job.block - 1) / job.block;
                ((uint8_t*)job.zeros)[row * blocks + block] = (uint8_t)(choice.zero - job.low) ^ job.flip;
            }
            // A last, shorter flat block is divided, as bitsandbytes does.
            const bool divides = E::divides || (job.flat && n < job.block);
            if (!job.codes) continue; // the scales are all that is asked for
            encode(job, element, room.x, n, choice.scale, choice.zero, divides, room.fields + (c - start));
        }
        pack_piece(job, row, start, stop, room.fields);
    }

    Choice choose(Range range, const float* x, float* t, int64_t n, int64_t block) const {
        const Choice spanning = absmax(range, block);
        return job.search ? least_squares(element, job, grid, scales, range, spanning, x, t, n, block) : spanning;
    }

    Choice absmax(Range r, int64_t block) const {
        Choice c = spanning_scale(job, r);
        c.stored = scales.encode(c.scale, block);
        c.scale = scales.decode(c.stored, block);
        return c;
    }
};

template <class E> void quantize(const Job& job) { in_pieces(job, job.block, Quantizer<E>(job)); }

} // namespace

extern "C" void fxquant_quantize(const Job* job) {
    if (job->kind == 0) quantize<Ints>(*job);
    else if (job->kind == 1) quantize<Tables<4>>(*job);
    else if (job->kind == 2) quantize<Tables<6>>(*job);
    else quantize<Floats>(*job);
}
