// Products of rows with planes: rows of x are sorted by expert, and rows of the weight decoded where they are
// multiplied. Every number is made by one thread, by the same steps whichever it is.

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t STREAM = 1 << 18; // bytes, that are long enough

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

// Rows that a thread takes at a time: long streams; but all of them several times for each thread, since one may be kept
// from its work.
int64_t span_of(const Product& job, int64_t experts) {
    const int64_t most = STREAMS * STREAM / std::max<int64_t>(job.codes_stride, 1);
    const int64_t each = job.threads == 1 ? most : std::min(most, experts * job.rows / (4 * job.threads));
    return std::max<int64_t>(each / AT_ONCE, 1) * AT_ONCE;
}

// Rows from the first to the last, AT_ONCE at a time: of streams or, with kernels that need no streams, one behind another.
template <class K> void run_span(const K& kernel, Task& task, typename K::Scratch& scratch) {
    const bool streams = K::reads_in_streams(task.job);
    task.apart = streams ? (task.last - task.first + STREAMS) / STREAMS : EACH;
    const int64_t end = streams ? task.first + task.apart : task.last + 1, step = streams ? EACH : AT_ONCE;
    for (; task.first < end; task.first += step) {
        task.each = std::min(EACH, end - task.first);
        const int64_t behind = task.last + 1 < task.job.rows ? task.last + 1 - task.first : 0;
        task.later = task.first + step < end ? step : behind;
        kernel.run(task, scratch);
    }
}

// All tasks, after so many pieces of x, `width` floats each, have been spread. `x_of` tells where an expert's begin. False,
// and nothing is written, where a piece is not for the kernel.
template <class K, class Spread, class Where>
bool run_tasks(const K& kernel, const Slots& slots, int64_t pieces, int64_t width, const Spread& spread, const Where& x_of) {
    const Product& job = kernel.job;
    const int64_t span = span_of(job, slots.experts.size()), spans = (job.rows + span - 1) / span;
    // In a row, since what is read ahead of a span is that of the next.
    const int64_t tasks = slots.experts.size() * spans, together = std::max<int64_t>(tasks / (4 * job.threads), 1);
    Buffer<float> x(pieces * width);
    bool taken = true;
#pragma omp parallel num_threads(job.threads) if (job.threads > 1)
    {
#pragma omp for schedule(static) reduction(&& : taken)
        for (int64_t i = 0; i < pieces; i++) taken = spread(i, x.data + i * width) && taken;
        typename K::Scratch scratch(kernel.room);
#pragma omp for schedule(dynamic, together)
        for (int64_t t = 0; t < (taken ? tasks : 0); t++) {
            const int64_t i = t / spans, first = t % spans * span, last = std::min(first + span, job.rows) - 1;
            const int64_t* const mine = slots.order.data() + slots.starts[i];
            const int64_t count = slots.starts[i + 1] - slots.starts[i];
            Task task{job, slots.experts[i], first, 0, last, 0, 0, mine, count, x.data + x_of(i) * width, width};
            run_span(kernel, task, scratch);
        }
    }
    return taken;
}

template <class K> bool multiply(const Product& job) {
    const K kernel(job);
    const auto spread = [&](int64_t row, float* to) { return kernel.spread(row, to); };
    const int64_t inputs = job.slots / job.picks, width = spread_width(kernel.units);
    return run_tasks(kernel, Slots(job), inputs, width, spread, [](int64_t) { return 0; });
}

template <bool AFFINE> void multiply_wide(const Product& job) {
    if (job.bits == 5) multiply<Kernel<Wide<5, AFFINE>>>(job);
    else if (job.bits == 6) multiply<Kernel<Wide<6, AFFINE>>>(job);
    else if (job.low) multiply<Kernel<Signed8<AFFINE>>>(job);
    else multiply<Kernel<Wide<8, AFFINE>>>(job);
}

#ifdef FXQUANT_AMX
// With more rows of bfloat16, values count as what they are in bfloat16, as when a weight is decoded first.
constexpr int64_t MANY = 16;

// The rows of x, or fewer, with which other kernels are faster than matrix units.
int64_t fewest_for_amx(const Product& job) { return job.bits == 4 || (job.bits == 8 && !job.kind) ? 8 : 4; }

// Rows of x in turns, each of one expert.
template <class Numbers> bool multiply_in_turns(const Product& job, const Numbers& numbers) {
    constexpr int64_t TURN = Numbers::TURN;
    const Amx<Numbers> kernel(numbers);
    const Slots slots(job);
    std::vector<int64_t> first(1), starts, counts; // of each expert, its first turn; of each turn, its first slot
    for (size_t i = 0; i < slots.experts.size(); i++) {
        for (int64_t at = slots.starts[i], end = slots.starts[i + 1]; at < end; at += TURN)
            starts.push_back(at), counts.push_back(std::min(end - at, TURN));
        first.push_back(starts.size());
    }
    const auto spread = [&](int64_t turn, float* to) {
        return numbers.spread(slots.order.data() + starts[turn], counts[turn], to);
    };
    const auto x_of = [&](int64_t expert) { return first[expert]; };
    return run_tasks(kernel, slots, starts.size(), spread_width(kernel.units), spread, x_of);
}

// Without experts, no more rows of x at a time than stay in the second-level cache while the weight passes by; but never so
// few that decoding the weight for them takes longer.
template <class Numbers, class... Arguments> bool multiply_in_parts(const Product& job, Arguments... arguments) {
    if (Numbers(job, arguments...).pairs() > 4) return false; // which takes longer than in float32
    constexpr int64_t CACHE = 1500000, TURN = Numbers::TURN, MOST = Panels::BATCH / TURN;
    if (job.ids) return multiply_in_turns(job, Numbers(job, arguments...));
    const int64_t turns = (job.slots + TURN - 1) / TURN;
    const int64_t fitting = CACHE / (Numbers(job, arguments...).units * 64);
    const int64_t most = std::min(std::max<int64_t>(fitting, 8), MOST), times = (turns + most - 1) / most;
    for (int64_t i = 0; i < times; i++) {
        const int64_t from = i * turns / times * TURN, end = std::min((i + 1) * turns / times * TURN, job.slots);
        Product part = job;
        part.slots = end - from;
        part.x = (const char*)job.x + from * job.x_stride * (job.x_codes == 1 ? 1 : job.x_type ? 2 : 4);
        part.x_scales = job.x_codes == 1 ? job.x_scales + from * job.x_scales_stride : job.x_scales;
        part.y = (char*)job.y + from * job.y_stride * (job.dtype ? 2 : 4);
        if (!multiply_in_turns(part, Numbers(part, arguments...))) return false;
    }
    return true;
}

#endif

#ifdef FXQUANT_CODES
// The rows of x, or fewer, with which it is slower to take floats apart into digits. In float32 they are multiplied as
// they are. In short steps there is more to do behind products than in them.
int64_t fewest_for_digits(const Product& job) {
    const int64_t step = Inputs<3>::step_of(job);
    if (job.kind || job.x_type == 0 || step < 32) return INT64_MAX / job.experts;
    if (job.bits == 4 || job.bits == 8) return job.bits == 4 ? 3 : 4;
    return step < 64 ? INT64_MAX / job.experts : Tiles::fewest(job);
}
#endif

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
#ifdef FXQUANT_AMX
    if (has_tiles()) return 1ll << 40;
#endif
    if (dtype && fxquant_multiplies(dtype)) return 16;
#ifdef FXQUANT_AVX512
    return 1024;
#else
    return dtype ? 128 : 64;
#endif
}

// Whether there are matrix units, and this process may use them.
extern "C" int fxquant_has_matrix_units() {
#ifdef FXQUANT_AMX
    return has_tiles();
#else
    return 0;
#endif
}

// Whether there are products of codes with codes.
extern "C" int fxquant_multiplies_codes() {
#ifdef FXQUANT_CODES
    return 1;
#else
    return 0;
#endif
}

extern "C" void fxquant_multiply(const Product* job) {
    const auto more_than = [&](int64_t rows) { return job->slots > rows * (job->ids ? job->experts : 1); };
#ifdef FXQUANT_AMX
    if (more_than(job->x_codes ? Codes<1>::FEW : fewest_for_amx(*job)) && has_tiles()) {
        if (job->x_codes) return (void)multiply_in_parts<AmxCodes>(*job);
        const int pieces = job->x_type == 0 ? 3 : job->x_type == 1 && more_than(MANY) ? 1 : 2; // of a value
        if (multiply_in_parts<AmxFloats>(*job, pieces)) return;
    }
#endif
#ifdef FXQUANT_CODES
    if (job->x_codes) return (void)multiply<Codes<1>>(*job);
    if (more_than(fewest_for_digits(*job)) && multiply<Codes<3>>(*job)) return;
#endif
#ifdef FXQUANT_AVX512
    if (more_than(Tiles::fewest(*job))) return (void)multiply<Tiles>(*job);
    if (Strips::takes(*job)) return (void)multiply<Strips>(*job);
#endif
    if (job->bits == 1) multiply<Kernel<Few<1>>>(*job);
    else if (job->bits == 2) multiply<Kernel<Few<2>>>(*job);
    else if (job->bits == 3) multiply<Kernel<Few<3>>>(*job);
    else if (job->bits == 4) multiply<Kernel<Few<4>>>(*job);
    else if (job->kind == 1) multiply<Kernel<Table6>>(*job);
    else if (job->kind == 2) multiply<Kernel<Float8<true>>>(*job);
    else if (job->kind == 3) multiply<Kernel<Float8<false>>>(*job);
    else if (job->zero) multiply_wide<true>(*job);
    else multiply_wide<false>(*job);
}

// Products of the same rows of x, side by side. `jobs` have all but x, y, slots and threads.
extern "C" void fxquant_linear(const Product* jobs, int64_t count, const void* x, void* y, int64_t rows, int threads) {
    for (int64_t i = 0; i < count; i++) {
        Product job = jobs[i];
        job.x = x, job.y = y, job.slots = rows, job.threads = threads;
        fxquant_multiply(&job);
        y = (char*)y + job.rows * (job.dtype == 0 ? 4 : 2);
    }
}
