// Products of rows with planes: which kernel is the fastest.

// Whether there are matrix units, and this process may use them.
extern "C" int fxquant_has_matrix_units() {
#ifdef FXQUANT_AMX
    return has_tiles();
#else
    return 0;
#endif
}

namespace {

void (*general)(const Product*) = nullptr;

#ifdef FXQUANT_CODES
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
#endif

#ifdef FXQUANT_AMX
// The rows of x, or fewer, with which other kernels are faster than matrix units.
int64_t fewest_for_amx(const Product& job) {
    if (job.x_codes) return Codes<1>::FEW;
    if (job.bits == 4) return job.x_type != 1 ? 8 : job.kind ? 4 : job.zero ? 5 : 6;
    return job.bits == 8 && !job.kind ? 12 : 4;
}

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

#endif

#ifdef FXQUANT_CODES
// The rows of x, or fewer, with which it is slower to multiply panels with digits of floats. In float32 they are multiplied
// as they are. In short steps there is more to do behind products than in them.
int64_t fewest_for_digits(const Product& job) {
    const int64_t step = Inputs<3>::step_of(job);
    if (job.kind || job.x_type == 0 || step < 32) return INT64_MAX / job.experts;
    if (job.bits == 4 || job.bits == 8) return job.bits == 4 ? 2 : 4;
    return step < 64 ? INT64_MAX / job.experts : Tiles::fewest(job);
}
#endif

#ifdef FXQUANT_CODES
// The rows of int8 codes, or fewer, with which words are slower than what there is; with matrix units, what these leave.
int64_t fewest_for_code_words(const Product& job) {
    if (fxquant_has_matrix_units()) return Codes<1>::FEW;
    return job.bits != 4 ? 5 : job.zero ? 2 : 1;
}
#endif

#ifdef FXQUANT_BFLOAT16
// Integers of 8 bits that some rows of bfloat16 are multiplied with as whole numbers, since that takes fewer steps than to
// look up values.
bool are_for_digits(const Product& job) { return job.bits == 8 && !job.kind && Inputs<3>::step_of(job) >= 32; }

// The most rows of bfloat16 with which strips are faster than panels, for which the weight is decoded once for all rows.
int64_t most_for_strips(const Product& job) {
    if (are_for_digits(job)) return fewest_for_digits(job);
    return job.bits == 4 ? 4 : job.bits < 4 ? 6 : 8;
}

// The rows of bfloat16, or fewer, with which words are slower than what there is, where strips are not for the weight.
int64_t fewest_for_words(const Product& job) { return are_for_digits(job) ? 24 : 4; }

// False, and nothing is written, where rows of x or blocks of the weight are not for strips.
bool multiply_strips(const Product& job) {
    bool done = false;
    with_values(job, [&](auto values) {
        using Kernel = FloatStrips<values>;
        done = Kernel::takes(job) && multiply<Kernel>(job);
    });
    return done;
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

// Whether there are products of pairs of bfloat16.
extern "C" int fxquant_multiplies_pairs() {
#ifdef FXQUANT_BFLOAT16
    return 1;
#else
    return 0;
#endif
}

// The most rows of x, of this dtype, with which this is faster than to decode the weight and leave the product to the
// vendor's library, in float32 where there are no instructions for the dtype.
extern "C" int64_t fxquant_most_rows(int dtype) {
#ifdef FXQUANT_AMX
    if (has_tiles()) return 1ll << 40;
#endif
    if (dtype == 1 && fxquant_multiplies_pairs()) return 1ll << 40;
    if (dtype && fxquant_multiplies(dtype)) return 16;
#ifdef FXQUANT_AVX512
    return 1024;
#else
    return dtype ? 128 : 64;
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

// What multiplies where nothing else does: `fxquant_multiply_generally`, of another library.
extern "C" void fxquant_use(void (*function)(const Product*)) { general = function; }

extern "C" void fxquant_multiply(const Product* job) {
    const auto more_than = [&](int64_t rows) { return job->slots > rows * (job->ids ? job->experts : 1); };
#ifdef FXQUANT_AMX
    if (more_than(fewest_for_amx(*job)) && has_tiles()) {
        if (job->x_codes) return (void)multiply_in_parts<AmxCodes>(*job);
        if (multiply_in_parts<AmxFloats>(*job)) return;
    }
#endif
#ifdef FXQUANT_CODES
    if (job->x_codes && more_than(fewest_for_code_words(*job))) return (void)multiply_words<CodeWords>(*job);
    if (job->x_codes) return (void)multiply<SingleCodes>(*job);
#endif
#ifdef FXQUANT_BFLOAT16
    if (job->x_type == 1) {
        if (!more_than(most_for_strips(*job)) && multiply_strips(*job)) return;
        if (more_than(fewest_for_words(*job)) && multiply_words<FloatWords>(*job)) return;
    }
#endif
#ifdef FXQUANT_CODES
    if (more_than(fewest_for_digits(*job)) && multiply<Codes<3>>(*job)) return;
    if (!more_than(DigitStrips::ROWS_OF_X) && DigitStrips::takes(*job) && multiply<DigitStrips>(*job)) return;
#endif
#ifdef FXQUANT_AVX512
    if (more_than(Tiles::fewest(*job))) return (void)multiply<Tiles>(*job);
    if (Strips::takes(*job)) return (void)multiply<Strips>(*job);
#endif
    general(job);
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
