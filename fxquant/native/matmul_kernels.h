// Products of rows of x with rows of one weight: decoded in registers for few rows of x, else a slab at a time. A sum
// has 16 parts, one per lane, each in the order of the units, either way: other rows of x change no bit.

namespace {

#ifdef FXQUANT_AVX512
constexpr int SOME = 6;         // rows of x at once that are multiplied with a slab
#else
constexpr int SOME = 2;
#endif
constexpr int64_t SLAB = 8;     // rows of a weight that are decoded at a time
constexpr int64_t BATCH = 48;   // rows of x for which a slab is decoded once
constexpr int64_t STRETCH = 32; // units of a slab

// What a thread needs, and the rows of a weight that it is at.
struct Slabs {
    Buffer<float> scales, offsets, slab;
    Buffer<uint8_t> bytes;
    Buffer<float> sums;
    std::vector<float> found; // `[rows of x, AT_ONCE]`

    explicit Slabs(int64_t blocks)
        : scales(SLAB * blocks), offsets(SLAB * blocks), slab(SLAB * STRETCH * LANES), bytes(blocks + 128),
          sums(SLAB * BATCH * LANES) {
        memset(slab.data, 0, SLAB * STRETCH * sizeof(F)); // rows that a slab lacks are multiplied, too
    }
};

// M rows of x, from a unit on, with ROWS of a slab; sums, in rows of BATCH, are added to.
template <int M>
__attribute__((noinline)) void multiply(const float* slab, const float* const* xs, int64_t first, int64_t units,
                                        float* sums) {
    F total[ROWS][M];
    const float* x[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) x[m] = xs[m] + first * LANES;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) total[r][m] = load(sums + (r * BATCH + m) * LANES);
    for (int64_t i = 0; i < units * LANES; i += LANES) {
        F w[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) w[r] = load(slab + r * STRETCH * LANES + i);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const F v = load(x[m] + i);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) total[r][m] = multiply_add(w[r], v, total[r][m]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) store(sums + (r * BATCH + m) * LANES, total[r][m]);
}

template <class E> struct Kernel {
    using Scratch = Slabs;
#ifdef FXQUANT_AVX512
    static constexpr int FEW = 4; // rows of x where codes are decoded in registers
#else
    static constexpr int FEW = 2;
#endif
    const Product& job;
    const E element;
    const int64_t units, bytes, whole; // of a row; units that can be read where they are
    const int64_t blocks, per;         // of a row; units of a block
    const int64_t room;                // for numbers of a row

    static bool reads_in_streams(const Product&) { return true; }

    explicit Kernel(const Product& j)
        : job(j), element(j), units((j.columns + LANES - 1) / LANES), bytes((j.columns * j.bits + 7) / 8),
          whole(bytes / E::SPAN), blocks((j.columns + j.block - 1) / j.block), per((j.block + LANES - 1) / LANES),
          room((blocks + LANES - 1) / LANES * LANES) {}

    void run(const Task& task, Scratch& scratch) const {
        if (task.count <= FEW) with_constant<FEW>(task.count, [&](auto m) { few<m>(task, scratch); });
        else slabs(task, scratch);
    }

    template <int M> void few(const Task& task, Scratch& scratch) const {
        const float* xs[M];
        for (int m = 0; m < M; m++) xs[m] = task.x_row(m);
        float found[M][AT_ONCE];
        for (int64_t first = 0; first < AT_ONCE; first += ROWS * EACH)
            for (int64_t row = first; row < first + task.each; row++) {
                F sums[ROWS][M];
                fused<M>(task, row, xs, scratch, sums);
                for (int m = 0; m < M; m++)
                    for (int i = 0; i < ROWS; i++) found[m][row + i * EACH] = sum(sums[i][m]);
            }
        for (int m = 0; m < M; m++) task.put(m, found[m]);
    }

    void slabs(const Task& task, Scratch& scratch) const {
        for (int64_t from = 0; from < task.count; from += BATCH) {
            const int64_t count = smaller_of(task.count - from, BATCH);
            scratch.found.resize(count * AT_ONCE);
            for (int64_t r = 0; r < AT_ONCE; r += SLAB) {
                const int64_t n = smaller_of(task.rows(r / EACH) - r % EACH, SLAB);
                for (int64_t i = 0; i < n; i++) load_numbers(task, r + i, i, scratch);
                if (n > 0) batch(task, r, n, from, count, scratch);
            }
            for (int64_t i = 0; i < count; i++) task.put(from + i, scratch.found.data() + i * AT_ONCE);
        }
    }

    // A slab with some rows of x, into what is found for these.
    void batch(const Task& task, int64_t r, int64_t n, int64_t from, int64_t m, Scratch& scratch) const {
        float* const sums = scratch.sums.data;
        memset(sums, 0, SLAB * BATCH * sizeof(F));
        const float* xs[BATCH];
        for (int64_t i = 0; i < m; i++) xs[i] = task.x_row(from + i);
        const int64_t parts = (m + SOME - 1) / SOME;
        for (int64_t u = 0; u < units; u += STRETCH) {
            const int64_t end = u + STRETCH < units ? u + STRETCH : units;
            for (int64_t i = 0; i < n; i++) decode(task, r + i, i, u, end, scratch);
            for (int64_t part = 0; part < parts; part++) {
                const int64_t a = part * m / parts, b = (part + 1) * m / parts;
                with_constant<SOME>(b - a, [&](auto size) {
                    for (int64_t i = 0; i < n; i += ROWS)
                        multiply<size>(scratch.slab.data + i * STRETCH * LANES, xs + a, u, end - u,
                                       sums + (i * BATCH + a) * LANES);
                });
            }
        }
        for (int64_t j = 0; j < m; j++)
            for (int64_t i = 0; i < n; i++) scratch.found[j * AT_ONCE + r + i] = sum(load(sums + (i * BATCH + j) * LANES));
    }

    // A row of x in float32, in the order of units, with zeros behind the last column.
    bool spread(int64_t row, float* to) const {
        memset(to + (units - 1) * LANES, 0, LANES * sizeof(float));
        const int64_t first = row * job.x_stride;
        for (int64_t u = 0; u < units; u++) {
            const int64_t at = u * LANES, count = job.columns - at < LANES ? job.columns - at : LANES;
            float natural[LANES] = {};
            store(natural, floats(job.x, job.x_type, first + at, count));
            for (int l = 0; l < LANES; l++) to[at + l] = natural[E::column(l)];
        }
        return true;
    }

    __attribute__((noinline)) void load_numbers(const Task& task, int64_t row, int64_t i, Scratch& scratch) const {
        const auto load = [&](const Level& level, float* to) {
            numbers(level, task.expert, task.row(row), blocks, to + i * room, scratch.bytes.data);
        };
        load(job.scales, scratch.scales.data);
        if (job.zero) load(job.offsets, scratch.offsets.data);
    }

    auto block(const Scratch& scratch, int64_t i, int64_t b) const {
        return element.block(scratch.scales.data[i * room + b], job.zero ? scratch.offsets.data[i * room + b] : 0);
    }

    // Few rows of x with ROWS of the weight, one of each stream, or of some.
    template <int M>
    __attribute__((noinline)) void fused(const Task& task, int64_t row, const float* const* xs, Scratch& scratch,
                                         F (&to)[ROWS][M]) const {
        F sums[ROWS][M];
        const uint8_t* from[ROWS];
        typename E::Block state[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            from[r] = task.codes(row + r * EACH);
            load_numbers(task, row + r * EACH, r, scratch);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) sums[r][m] = F{};
        }
        const auto step = [&](int64_t u, auto&& codes) __attribute__((always_inline)) {
            F x[M];
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) x[m] = load(xs[m] + u * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const F w = element.weights(state[r], codes(r));
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) sums[r][m] = multiply_add(w, x[m], sums[r][m]);
            }
        };
        const auto prefetch = [&](int64_t u) __attribute__((always_inline)) { // at most a line
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) __builtin_prefetch(from[r] + NEAR + u * E::SPAN, 0, 3);
        };
        int64_t u = 0;
        for (int64_t b = 0; b < blocks; b++) {
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) state[r] = block(scratch, r, b);
            const int64_t end = (b + 1) * per < units ? (b + 1) * per : units;
            const int64_t stop = end < whole ? end : whole;
            for (; u + 4 <= stop; u += 4) {
                prefetch(u);
#pragma GCC unroll 8
                for (int i = 0; i < 4; i++) step(u + i, [&](int r) { return from[r] + (u + i) * E::SPAN; });
            }
            for (; u < stop; u++) {
                if (u % 4 == 0) prefetch(u);
                step(u, [&](int r) { return from[r] + u * E::SPAN; });
            }
            if (u < end) { // what is not whole; behind it there are zeros, in x as well
                const int64_t at = whole * E::SPAN;
                uint8_t rest[ROWS][64] = {};
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) memcpy(rest[r], from[r] + at, bytes - at);
                step(u++, [&](int r) { return (const uint8_t*)rest[r]; });
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) to[r][m] = sums[r][m];
    }

    // Some units of a row, into row i of the slab.
    __attribute__((noinline)) void decode(const Task& task, int64_t row, int64_t i, int64_t u, int64_t last,
                                          Scratch& scratch) const {
        const uint8_t* const from = task.codes(row);
        float* to = scratch.slab.data + i * STRETCH * LANES;
        for (int64_t b = u / per; u < last; b++) {
            const auto state = block(scratch, i, b);
            const int64_t end = (b + 1) * per < last ? (b + 1) * per : last, stop = end < whole ? end : whole;
            for (; u < stop; u++, to += LANES) store(to, element.weights(state, from + u * E::SPAN));
            if (u < end) {
                uint8_t rest[64] = {};
                memcpy(rest, from + u * E::SPAN, bytes - u * E::SPAN);
                store(to, element.weights(state, rest)), u++, to += LANES;
            }
        }
    }
};

} // namespace
