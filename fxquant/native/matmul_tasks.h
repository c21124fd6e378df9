// All tasks of a product: slots are sorted by expert, rows of x spread, and rows of the weight shared out to threads, which
// decode them where they are multiplied. Every number is made by one thread, by the same steps whichever it is.

#include <algorithm>
#include <memory>
#include <vector>

namespace {

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

    // Of one expert, at the most.
    int64_t most() const {
        int64_t found = 0;
        for (size_t i = 0; i < experts.size(); i++) found = std::max(found, starts[i + 1] - starts[i]);
        return found;
    }
};

// Rows that a thread takes at a time: long streams; but all of them several times for each thread, since one may be kept
// from its work.
int64_t span_of(const Product& job, int64_t experts) {
    const int64_t most = STREAMS * STREAM / std::max<int64_t>(job.codes_stride, 1);
    const int64_t each = job.threads == 1 ? most : std::min(most, experts * job.rows / (4 * job.threads));
    return std::max<int64_t>(each / AT_ONCE, 1) * AT_ONCE;
}

// A kernel, as all tasks use it: how a piece of x is spread, and what runs tasks in one thread.
struct Work {
    const Product& job;
    bool streams; // rows are read in streams, not one behind another
    std::function<bool(int64_t piece, float* to)> spread;
    std::function<std::function<void(const Task&)>()> runner;
};

template <class K, class Spread> Work work_of(const K& kernel, const Spread& spread) {
    const auto runner = [&kernel]() -> std::function<void(const Task&)> {
        const auto scratch = std::make_shared<typename K::Scratch>(kernel.room);
        return [&kernel, scratch](const Task& task) { kernel.run(task, *scratch); };
    };
    return {kernel.job, K::reads_in_streams(kernel.job), spread, runner};
}

// Rows from the first to the last, AT_ONCE at a time.
void run_span(const Work& work, Task& task, const std::function<void(const Task&)>& run) {
    task.apart = work.streams ? (task.last - task.first + STREAMS) / STREAMS : EACH;
    const int64_t end = work.streams ? task.first + task.apart : task.last + 1, step = work.streams ? EACH : AT_ONCE;
    for (; task.first < end; task.first += step) {
        task.each = std::min(EACH, end - task.first);
        const int64_t behind = task.last + 1 < task.job.rows ? task.last + 1 - task.first : 0;
        task.later = task.first + step < end ? step : behind;
        run(task);
    }
}

// All tasks, after so many pieces of x, `width` floats each, have been spread; `first_piece` has the one that each expert
// begins with, where they have their own. False, and nothing is written, where a piece is not for the kernel.
bool run_tasks(const Work& work, const Slots& slots, int64_t pieces, int64_t width, const int64_t* first_piece) {
    const Product& job = work.job;
    const int64_t span = span_of(job, slots.experts.size()), spans = (job.rows + span - 1) / span;
    // In a row, since what is read ahead of a span is that of the next.
    const int64_t tasks = slots.experts.size() * spans, together = std::max<int64_t>(tasks / (4 * job.threads), 1);
    Buffer<float> x(pieces * width);
    bool taken = true;
#pragma omp parallel num_threads(job.threads) if (job.threads > 1)
    {
#pragma omp for schedule(static) reduction(&& : taken)
        for (int64_t i = 0; i < pieces; i++) taken = work.spread(i, x.data + i * width) && taken;
        const auto run = work.runner();
#pragma omp for schedule(dynamic, together)
        for (int64_t t = 0; t < (taken ? tasks : 0); t++) {
            const int64_t i = t / spans, first = t % spans * span, last = std::min(first + span, job.rows) - 1;
            const int64_t* const mine = slots.order.data() + slots.starts[i];
            const int64_t count = slots.starts[i + 1] - slots.starts[i];
            const float* const of_x = x.data + (first_piece ? first_piece[i] * width : 0);
            Task task{job, slots.experts[i], first, 0, last, 0, 0, mine, count, of_x, width};
            run_span(work, task, run);
        }
    }
    return taken;
}

template <class K> bool multiply(const Product& job) {
    const K kernel(job);
    const auto work = work_of(kernel, [&kernel](int64_t row, float* to) { return kernel.spread(row, to); });
    return run_tasks(work, Slots(job), job.slots / job.picks, spread_width(kernel.units), nullptr);
}

} // namespace
