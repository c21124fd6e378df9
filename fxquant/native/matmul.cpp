// Products of few rows with planes: rows of x are sorted by expert, and rows of the weight decoded where they are
// multiplied. Every number is made by one thread, by the same steps whichever it is.

#include <vector>

namespace {

// Floats from row to row of what `spread_row` makes: no whole number of pages, so that rows do not compete for the
// same lines of the first-level cache.
inline int64_t spread_width(int64_t units) { return (units * LANES + 1023) / 1024 * 1024 + 272; }

// Rows of x in float32, in the order of units, with zeros behind the last column.
template <class E> void spread_row(const Product& job, int64_t row, int64_t units, float* to) {
    memset(to + (units - 1) * LANES, 0, LANES * sizeof(float));
    const int64_t first = row * job.x_stride;
    for (int64_t u = 0; u < units; u++) {
        const int64_t at = u * LANES, count = job.columns - at < LANES ? job.columns - at : LANES;
        float natural[LANES] = {};
        store(natural, floats(job.x, job.x_type, first + at, count));
        for (int l = 0; l < LANES; l++) to[at + l] = natural[E::column(l)];
    }
}

struct Slots {
    std::vector<int64_t> order, starts; // slots by expert; of each expert with any, and of what is behind the last
    std::vector<int64_t> experts;       // those with slots

    explicit Slots(const Product& job) : order(job.slots) {
        std::vector<int64_t> next(job.experts + 1);
        const auto expert = [&](int64_t slot) { return job.ids ? job.ids[slot] : 0; };
        const auto known = [&](int64_t slot) { return expert(slot) >= 0 && expert(slot) < job.experts; };
        for (int64_t s = 0; s < job.slots; s++) if (known(s)) next[expert(s) + 1]++;
        starts.push_back(0);
        for (int64_t e = 0; e < job.experts; e++) {
            if (next[e + 1]) experts.push_back(e), starts.push_back(next[e] + next[e + 1]);
            next[e + 1] += next[e];
        }
        for (int64_t s = 0; s < job.slots; s++) if (known(s)) order[next[expert(s)]++] = s;
    }
};

inline void put(const Product& job, int64_t slot, int64_t expert, int64_t row, float v) {
    if (job.addend) v += load_one(job.addend, job.addend_type, expert * job.addend_expert + row);
    const int64_t at = slot * job.rows + row;
    if (job.dtype == 0) ((float*)job.y)[at] = v;
    else if (job.dtype == 2) ((uint16_t*)job.y)[at] = as<uint16_t>((_Float16)v);
    else {
        const uint32_t bits = as<uint32_t>(v), even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        ((uint16_t*)job.y)[at] = v == v ? even : (bits >> 16) | 0x40;
    }
}

template <class E> struct Task {
    const Kernel<E>& kernel;
    const float* x; // spread
    int64_t expert, row, last;
    const int64_t* slots;
    int64_t count;
    Scratch& scratch;

    const float* x_row(int64_t i) const { return x + slots[i] / kernel.job.picks * spread_width(kernel.units); }

    void run() const {
        if (count > FEW) return slab();
        with_constant<FEW>(count, [&](auto m) {
            const float* xs[m];
            for (int i = 0; i < m; i++) xs[i] = x_row(i);
            for (int64_t r = row; r <= last; r += ROWS) {
                F sums[ROWS][m];
                kernel.template fused<m>(expert, r, last, xs, scratch, sums);
                for (int64_t i = 0; i < ROWS && r + i <= last; i++)
                    for (int j = 0; j < m; j++) put(kernel.job, slots[j], expert, r + i, sum(sums[i][j]));
            }
        });
    }

    void slab() const {
        for (int64_t r = row; r <= last; r += SLAB) {
            const int64_t n = last - r + 1 < SLAB ? last - r + 1 : SLAB;
            for (int64_t i = 0; i < n; i++) kernel.load_numbers(expert, r + i, i, scratch);
            for (int64_t from = 0; from < count; from += BATCH)
                batch(r, n, from, count - from < BATCH ? count - from : BATCH);
        }
    }

    void batch(int64_t r, int64_t n, int64_t from, int64_t m) const {
        float* const sums = scratch.sums.data;
        memset(sums, 0, SLAB * BATCH * sizeof(F));
        const float* xs[BATCH];
        for (int64_t i = 0; i < m; i++) xs[i] = x_row(from + i);
        const int64_t parts = (m + SOME - 1) / SOME, units = kernel.units;
        for (int64_t u = 0; u < units; u += STRETCH) {
            const int64_t end = u + STRETCH < units ? u + STRETCH : units;
            for (int64_t i = 0; i < n; i++) kernel.decode(expert, r + i, i, u, end, scratch);
            for (int64_t part = 0; part < parts; part++) {
                const int64_t a = part * m / parts, b = (part + 1) * m / parts;
                with_constant<SOME>(b - a, [&](auto size) {
                    for (int64_t i = 0; i < n; i += ROWS)
                        multiply<size>(scratch.slab.data + i * STRETCH * LANES, xs + a, u, end - u,
                                       sums + (i * BATCH + a) * LANES);
                });
            }
        }
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < m; j++)
                put(kernel.job, slots[from + j], expert, r + i, sum(load(sums + (i * BATCH + j) * LANES)));
    }
};

template <class E> void multiply(const Product& job) {
    const Kernel<E> kernel(job);
    const Slots slots(job);
    const int64_t inputs = job.slots / job.picks, width = spread_width(kernel.units);
    const int64_t chunk = 4 * SLAB, chunks = (job.rows + chunk - 1) / chunk, tasks = slots.experts.size() * chunks;
    Buffer<float> x(inputs * width);
#pragma omp parallel num_threads(job.threads) if (job.threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < inputs; i++) spread_row<E>(job, i, kernel.units, x.data + i * width);
        Scratch scratch(kernel.room);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t i = task / chunks, row = task % chunks * chunk, start = slots.starts[i];
            const int64_t last = (row + chunk < job.rows ? row + chunk : job.rows) - 1;
            Task<E>{kernel, x.data, slots.experts[i], row, last, slots.order.data() + start,
                          slots.starts[i + 1] - start, scratch}.run();
        }
    }
}

template <bool AFFINE> void multiply_wide(const Product& job) {
    if (job.bits == 5) multiply<Wide<5, AFFINE>>(job);
    else if (job.bits == 6) multiply<Wide<6, AFFINE>>(job);
    else if (job.low) multiply<Signed8<AFFINE>>(job);
    else multiply<Wide<8, AFFINE>>(job);
}

} // namespace

// Whether the processor has instructions for products of this dtype, which the vendor's library uses.
extern "C" int fxquant_multiplies(int dtype) {
#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
    if (dtype == 1) return 1;
#endif
    return dtype == 0;
}

// The most rows of x, of this dtype, with which this is faster than to decode the weight and leave the product to the
// vendor's library, in float32 where there are no instructions for the dtype.
extern "C" int64_t fxquant_most_rows(int dtype) {
    if (dtype == 0) return 64;
    return fxquant_multiplies(dtype) ? 16 : 128;
}

extern "C" void fxquant_multiply(const Product* job) {
    if (job->bits == 1) multiply<Few<1>>(*job);
    else if (job->bits == 2) multiply<Few<2>>(*job);
    else if (job->bits == 3) multiply<Few<3>>(*job);
    else if (job->bits == 4) multiply<Few<4>>(*job);
    else if (job->kind == 1) multiply<Table6>(*job);
    else if (job->kind == 2) multiply<Float8<true>>(*job);
    else if (job->kind == 3) multiply<Float8<false>>(*job);
    else if (job->zero) multiply_wide<true>(*job);
    else multiply_wide<false>(*job);
}
