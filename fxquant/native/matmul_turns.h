// Rows of x in turns, some one after another, for kernels that multiply several at a time.

#ifdef FXQUANT_CODES

namespace {

// Rows of x in turns, each of one expert.
template <class Kernel, class Numbers> bool multiply_in_turns(const Slots& slots, const Numbers& numbers) {
    const Kernel kernel(numbers);
    std::vector<int64_t> first(1), starts, counts; // of each expert, its first turn; of each turn, its first slot
    for (size_t i = 0; i < slots.experts.size(); i++) {
        for (int64_t at = slots.starts[i], end = slots.starts[i + 1]; at < end; at += counts.back())
            starts.push_back(at), counts.push_back(kernel.rows_of_turn(end - at));
        first.push_back(starts.size());
    }
    const auto work = work_of(kernel, [&](int64_t turn, float* to) {
        return numbers.spread(slots.order.data() + starts[turn], counts[turn], to);
    });
    return run_tasks(work, slots, starts.size(), spread_width(kernel.units), first.data());
}

// Some rows of x, without experts.
Product part_of(const Product& job, int64_t from, int64_t end) {
    Product part = job;
    part.slots = end - from;
    part.x = (const char*)job.x + from * job.x_stride * (job.x_codes == 1 ? 1 : job.x_type ? 2 : 4);
    part.x_scales = job.x_codes == 1 ? job.x_scales + from * job.x_scales_stride : job.x_scales;
    part.y = (char*)job.y + from * job.y_stride * (job.dtype ? 2 : 4);
    return part;
}

} // namespace

#endif
