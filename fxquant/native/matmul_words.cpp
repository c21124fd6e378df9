// Products of words.

#ifdef FXQUANT_CODES
namespace {

// Without experts, no more rows of x at a time than the last cache holds beside what else is read.
template <class Numbers> bool multiply_words(const Product& job) {
    constexpr int64_t CACHE = 8 << 20, FEWEST = 96;
    const int64_t fit = CACHE / (Numbers(job).units * 64 / Panels::TOKENS), most = std::max(fit, FEWEST);
    const int64_t parts = job.ids ? 1 : (job.slots + most - 1) / most;
    for (int64_t i = 0; i < parts; i++) {
        const Product part = job.ids ? job : part_of(job, i * job.slots / parts, (i + 1) * job.slots / parts);
        if (!multiply_in_turns<WordPanels<Numbers>>(Slots(part), Numbers(part))) return false;
    }
    return true;
}

} // namespace
#endif

extern "C" void fxquant_give_words(Kernels* to) {
#ifdef FXQUANT_CODES
    to->code_words = multiply_words<CodeWords>;
#endif
#ifdef FXQUANT_BFLOAT16
    to->float_words = multiply_words<FloatWords>;
#endif
}
