// What kernels of a product share: the task, and what becomes of its sums.

namespace {

#ifdef FXQUANT_AVX512
constexpr int ROWS = 4; // of a weight at once
#else
constexpr int ROWS = 2;
#endif
constexpr int64_t STREAMS = 4;  // places of a weight at which it is read at once
constexpr int64_t EACH = 16;    // rows of each that are decoded, or read and scaled, together
constexpr int64_t AT_ONCE = STREAMS * EACH;

// How many bytes ahead codes are asked for where they are read in streams, how long these are, and the locality with which
// other bytes are asked for, long before: as measured with AMD's Zen 5, and with Intel's.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
constexpr int64_t NEAR = 2048, STREAM = 1 << 20;
constexpr int LATER = 3;
#else
constexpr int64_t NEAR = 1024, STREAM = 1 << 18;
constexpr int LATER = 2;
#endif

// Floats for the numbers of a row: with whole vectors, and one more, where the columns that kernels read together, 128 at
// most, may go beyond the row.
inline int64_t room_of(const Product& job, int64_t blocks) {
    const bool even = job.columns % 128 == 0 && in_one_piece(job.scales, blocks);
    return even ? blocks : (blocks + LANES - 1) / LANES * LANES + LANES;
}

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

inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

inline void store_as(void* to, int dtype, int64_t at, F v, int64_t count) {
    const auto put = [&](auto* typed) { count == LANES ? store(typed + at, v) : store_some(typed + at, v, count); };
    if (dtype == 0) put((float*)to);
    else if (dtype == 1) put((Bf16*)to);
    else put((Fp16*)to);
}

// AT_ONCE rows of one expert, and the slots that they are multiplied for. They are of four streams, which are as many
// parts of a span of rows: what the processor reads ahead, it reads ahead well in few places, and on and on in each.
struct Task {
    const Product& job;
    int64_t expert, first, apart, last; // row 0; from stream to stream; the last row of the span
    int64_t each;                       // rows of a stream
    int64_t later;                      // how many rows further on those are that come next; or 0
    const int64_t* slots;
    int64_t count;
    const float* x; // all rows, spread
    int64_t width;  // from row to row

    // Of number i, the first of a stream being 0, EACH, 2 EACH and so on. Rows that are not there are the last one.
    int64_t row(int64_t i) const { return smaller_of(first + i / EACH * apart + i % EACH, last); }

    // Rows of a stream that are there.
    int64_t rows(int64_t stream) const { return smaller_of(each, last - first - stream * apart + 1); }

    const uint8_t* codes(int64_t i) const { return job.codes + expert * job.codes_expert + row(i) * job.codes_stride; }

    // The numbers of all rows, `[AT_ONCE, room]`, and a vector; behind the last block of a row may be anything. `bytes` has
    // room for those of a stream.
    __attribute__((noinline))
    void numbers(const Level& level, int64_t blocks, int64_t room, float* to, uint8_t* bytes) const {
        const bool at_once = room == blocks && in_one_piece(level, blocks);
        for (int64_t stream = 0; stream < STREAMS; stream++, to += EACH * room) {
            const int64_t here = rows(stream), from = first + stream * apart;
            if (here <= 0) return;
            for (int64_t i = 0; i < (at_once ? 1 : here); i++)
                ::numbers(level, expert, from + i, at_once ? here * blocks : blocks, to + i * room, bytes);
            const uint8_t* const next = numbers_at(level, expert, smaller_of(from + later, job.rows - 1));
            for (int64_t i = 0; i < EACH * level.stride; i += 64) __builtin_prefetch(next + i, 0, LATER);
        }
    }

    const float* x_row(int64_t i) const { return x + slots[i] / job.picks * width; }

    // All rows of the result of a slot: with the bias, rounded.
    __attribute__((noinline))
    void put(int64_t slot, const float* from) const {
        for (int64_t stream = 0; stream < STREAMS; stream++) {
            const int64_t n = rows(stream), row = first + stream * apart;
            if (n <= 0) return;
            F v = load(from + stream * EACH);
            if (job.addend) v += floats(job.addend, job.addend_type, expert * job.addend_expert + row, n);
            store_as(job.y, job.dtype, slots[slot] * job.y_stride + row, v, n);
        }
    }
};

static_assert(EACH == LANES);

template <class Function> inline void with_flag(bool flag, const Function& function) {
    if (flag) function(std::true_type{});
    else function(std::false_type{});
}

// `function` with every number from 0 to N - 1, as a constant: what is indexed by them stays in registers.
template <int N, class Function> inline __attribute__((always_inline)) void each(const Function& function) {
    if constexpr (N > 0) {
        each<N - 1>(function);
        function(std::integral_constant<int, N - 1>{});
    }
}

// `function` with the number as a constant, from 1 to N.
template <int N, class Function> inline void with_constant(int64_t n, const Function& function) {
    if constexpr (N > 1) if (n < N) return with_constant<N - 1>(n, function);
    function(std::integral_constant<int, N>{});
}

} // namespace
