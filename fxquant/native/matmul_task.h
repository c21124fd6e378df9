// What kernels of a product share: the task, and what becomes of its sums.

namespace {

#ifdef FXQUANT_AVX512
constexpr int ROWS = 4; // of a weight at once
#else
constexpr int ROWS = 2;
#endif
constexpr int64_t CHUNK = 32; // rows of a weight that are one thread's at a time

template <class T> struct Buffer {
    std::unique_ptr<T[]> held;
    T* data;

    explicit Buffer(int64_t n) : held(new T[n + 64 / sizeof(T)]) {
        data = (T*)(((uintptr_t)held.get() + 63) & ~(uintptr_t)63);
    }
};

// Floats from row to row of spread rows of x: no whole number of pages, so that rows do not compete for the same lines
// of the first-level cache.
inline int64_t spread_width(int64_t units) { return (units * LANES + 1023) / 1024 * 1024 + 272; }

inline void store_as(void* to, int dtype, int64_t at, F v, int64_t count) {
    if (dtype == 0) store_some((float*)to + at, v, count);
    else if (dtype == 1) store_some((Bf16*)to + at, v, count);
    else store_some((Fp16*)to + at, v, count);
}

// Rows of one expert, from `row` to `last`, and the slots that they are multiplied for.
struct Task {
    const Product& job;
    int64_t expert, row, last;
    const int64_t* slots;
    int64_t count;
    const float* x; // all rows, spread
    int64_t width; // from row to row
    int64_t next;  // expert after this one, or -1

    const uint8_t* codes(int64_t at) const {
        return job.codes + expert * job.codes_expert + at * job.codes_stride;
    }

    // How many bytes further on the codes are that come so many rows behind those of the row; 0 where there are none.
    int64_t later(int64_t at, int64_t rows) const {
        if (at + rows + ROWS <= job.rows) return rows * job.codes_stride;
        return next < 0 ? 0 : (next - expert) * job.codes_expert + (rows - job.rows) * job.codes_stride;
    }

    // The numbers of the next rows, as many as this task has.
    void prefetch_later(const Level& level) const {
        const bool more = last + 1 < job.rows;
        if (!more && next < 0) return;
        const uint8_t* const from = numbers_at(level, more ? expert : next, more ? last + 1 : 0);
        for (int64_t i = 0; i < (last - row + 1) * level.stride; i += 64) __builtin_prefetch(from + i, 0, 2);
    }

    const float* x_row(int64_t i) const { return x + slots[i] / job.picks * width; }

    // Some rows of the result of a slot, from `first` on: with the bias, rounded. What is behind them may be anything.
    void put(int64_t slot, int64_t first, int64_t rows, const float* from) const {
        const int64_t at = slots[slot] * job.y_stride + first, bias = expert * job.addend_expert + first;
        for (int64_t i = 0; i < rows; i += LANES) {
            const int64_t n = rows - i < LANES ? rows - i : LANES;
            F v = load(from + i);
            if (job.addend) v += floats(job.addend, job.addend_type, bias + i, n);
            store_as(job.y, job.dtype, at + i, v, n);
        }
    }
};

template <class Function> inline void with_flag(bool flag, const Function& function) {
    if (flag) function(std::true_type{});
    else function(std::false_type{});
}

// `function` with the number as a constant, from 1 to N.
template <int N, class Function> inline void with_constant(int64_t n, const Function& function) {
    if constexpr (N > 1) if (n < N) return with_constant<N - 1>(n, function);
    function(std::integral_constant<int, N>{});
}

} // namespace
