// From weights to planes with small floats as scales, under one number for the whole weight: nvfp4.

namespace {

// The magnitudes that float8 e4m3 has.
struct Magnitudes {
    static constexpr int LAST = 126;
    static constexpr float HIGH = 448;
    alignas(64) float values[128];
    const Floats floats;

    Magnitudes() : floats(e4m3()) {
        for (int i = 0; i < 128; i++) values[i] = i < 8 ? std::ldexp(i, -9) : std::ldexp(8 + i % 8, i / 8 - 10);
    }

    static Job e4m3() {
        Job job{};
        job.high = HIGH, job.mantissa = 3, job.exponent = -6;
        return job;
    }

    // The nearest one, as a bit pattern with its sign.
    uint8_t encode(float value) const { return (uint8_t)floats.fields(all(value), 0)[0]; }
    float decode(uint8_t code) const { return code & 0x80 ? -values[code & 0x7f] : values[code]; }
};

template <class E> struct Global {
    static constexpr int ABOVE = 2; // codes above that of the range to try; the others are below
    const Job& job;
    const E element;
    const Magnitudes magnitudes;
    const Scales format;
    bool searches = false;
    float top = 0, widest = 0, inverse = 0; // second-level numbers: chosen, of the range; unit: the largest weight
    mutable std::vector<double> found, spanned; // squared errors by piece

    explicit Global(const Job& j) : job(j), element(j), format{j.scale_type, j.floor, j.limit} {
        const Range r = range();
        widest = top = as_stored(spanning_scale(job, r).scale / Magnitudes::HIGH);
        inverse = 1 / bounded(larger(-r.low, r.high));
        const int64_t pieces = job.rows * Pieces(job, job.block).steps;
        found.resize(pieces), spanned.resize(pieces);
    }

    float as_stored(float top) const { return format.decode(format.encode(top)); }

    // Whatever the order in which rows come.
    Range range() const {
        float low = 0, high = 0;
#pragma omp parallel for schedule(static) num_threads(job.threads) if (job.threads > 1) \
    reduction(min : low) reduction(max : high)
        for (int64_t row = 0; row < job.rows; row++) {
            float x[SEGMENT + LANES];
            for (int64_t c = 0; c < job.columns; c += SEGMENT) {
                const Range r = take(job, row, c, job.columns - c < SEGMENT ? job.columns - c : SEGMENT, x);
                low = smaller(low, r.low), high = larger(high, r.high);
            }
        }
        return {low, high};
    }

    void operator()(int64_t row, int64_t start, int64_t stop, const Room& room) const {
        double total = 0, by_range = 0;
        for (int64_t c = start; c < stop; c += job.block) {
            const Range r = take(job, row, c, job.block, room.x);
            const uint8_t code = searches ? least_squares(r, room, total, by_range) : spanning(r, top);
            ((uint8_t*)job.scales)[row * job.scales_stride + c / job.block] = code;
            const float scale = magnitudes.decode(code) * top;
            encode(job, element, room.x, job.block, scale, 0, E::divides, room.fields + (c - start));
        }
        found[room.piece] = total, spanned[room.piece] = by_range;
        pack_piece(job, row, start, stop, room.fields);
    }

    uint8_t least_squares(Range r, const Room& room, double& total, double& by_range) const {
        for (int64_t i = 0; i < job.block; i += LANES) store(room.t + i, load(room.x + i) * all(inverse));
        const Best best = fit(r, room.t);
        const float scales[] = {magnitudes.decode(spanning(r, widest)) * widest * inverse}, biases[] = {0};
        float error[1];
        errors(element, job, room.t, job.block, scales, biases, error);
        total += best.error, by_range += error[0];
        return best.code;
    }

    // Moves the second-level number, and with it the scales of all blocks against those that small floats have, to
    // where a sample of the rows has the least error.
    void move() {
        constexpr int TRIES = 16, SAMPLE = 1 << 16;
        const int64_t every = (job.rows * job.columns + SAMPLE - 1) / SAMPLE;
        double least = INFINITY;
        for (int i = 0; i < TRIES; i++) {
            const float before = top;
            top = as_stored(widest / (1 - 0.5f * i / TRIES));
            const double error = sampled(every < job.rows ? every : job.rows);
            if (error < least) least = error;
            else top = before;
        }
    }

    double sampled(int64_t every) const {
        const std::unique_ptr<float[]> x(new float[2 * (job.block + LANES)]);
        float* const t = x.get() + job.block + LANES;
        double total = 0;
        for (int64_t row = 0; row < job.rows; row += every)
            for (int64_t c = 0; c < job.columns; c += job.block) {
                const Range r = take(job, row, c, job.block, x.get());
                for (int64_t i = 0; i < job.block; i += LANES) store(t + i, load(x.get() + i) * all(inverse));
                total += fit(r, t).error;
            }
        return total;
    }

    uint8_t spanning(Range r, float top) const {
        return magnitudes.encode(spanning_scale(job, r).scale / bounded(top));
    }

    struct Best {
        uint8_t code;
        float error;
    };

    // The best of the codes around that of the range; where the element is not symmetric, of either sign.
    Best fit(Range r, const float* t) const {
        const float size = larger(-r.low, r.high);
        const int centre = magnitudes.encode(size / extent(job) / bounded(top));
        const bool turns = job.low != -job.high;
        uint8_t codes[LANES];
        F scale;
        for (int i = 0; i < LANES; i++) {
            const int code = centre + ABOVE - (turns ? i / 2 : i);
            codes[i] = (uint8_t)(code < 0 ? 0 : code > Magnitudes::LAST ? Magnitudes::LAST : code);
            if (turns && i % 2) codes[i] |= 0x80;
        }
        if (turns) codes[0] = spanning(r, top);
        for (int i = 0; i < LANES; i++) scale[i] = magnitudes.decode(codes[i]) * top * inverse;
        const F errors = moments<false>(element, job, t, job.block, scale, F{}).ee;
        const float error = lowest(errors);
        return {codes[which(errors, error)], error};
    }
};

template <class E> void quantize_globally(const Job& job) {
    Global<E> global(job);
    global.searches = job.search && global.widest > SMALLEST;
    if (global.searches) global.move();
    in_pieces(job, job.block, global);
    double found = 0, spanned = 0;
    for (const double error : global.found) found += error;
    for (const double error : global.spanned) spanned += error;
    if (found > spanned && global.top != global.widest) {
        // Not one block is worse than by its range under the number that all ranges have.
        global.top = global.widest;
        in_pieces(job, job.block, global);
    }
    global.format.put(job.scale_scales, 0, global.format.encode(global.top));
}

} // namespace

extern "C" void fxquant_quantize_globally(const Job* job) {
    if (job->kind == 0) quantize_globally<Ints>(*job);
    else if (job->kind == 1) quantize_globally<Tables<4>>(*job);
    else if (job->kind == 2) quantize_globally<Tables<6>>(*job);
    else quantize_globally<Floats>(*job);
}
