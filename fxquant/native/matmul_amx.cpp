// Products by matrix units.

#ifdef FXQUANT_AMX
namespace {

template <class Numbers> bool multiply_tiles(const Product& job) {
    const Slots slots(job);
    const Numbers numbers(job, slots.most());
    if (numbers.pairs() > 4) return false; // which takes longer than in float32
    return multiply_in_turns<Amx<Numbers>>(slots, numbers);
}

// Without experts, no more rows of x at a time than stay in the second-level cache while the weight passes by; where these
// are so few that decoding the weight for them takes longer, as many as there is room for.
template <class Numbers> bool multiply_in_parts(const Product& job) {
    constexpr int64_t CACHE = 1200000, TURN = 16, MOST = Amx<Numbers>::BATCH / TURN;
    if (job.ids || job.slots <= TURN) return multiply_tiles<Numbers>(job);
    const int64_t turns = (job.slots + TURN - 1) / TURN, fit = CACHE / (Numbers(job, job.slots).units * 64);
    const int64_t most = fit < 8 ? MOST : std::min(fit, MOST), times = (turns + most - 1) / most;
    for (int64_t i = 0; i < times; i++) {
        const int64_t from = i * turns / times * TURN, end = std::min((i + 1) * turns / times * TURN, job.slots);
        if (!multiply_tiles<Numbers>(part_of(job, from, end))) return false;
    }
    return true;
}

} // namespace
#endif

extern "C" void fxquant_give_tiled(Kernels* to) {
#ifdef FXQUANT_AMX
    to->tiled_floats = multiply_in_parts<AmxFloats>;
    to->tiled_codes = multiply_in_parts<AmxCodes>;
#endif
}
