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

Kernels kernels{};

#ifdef FXQUANT_AMX
// The rows of x, or fewer, with which other kernels are faster than matrix units.
int64_t fewest_for_amx(const Product& job) {
    if (job.x_codes) return Codes<1>::FEW;
    if (job.bits == 4) return job.x_type != 1 ? 8 : job.kind ? 4 : job.zero ? 5 : 6;
    return job.bits == 8 && !job.kind ? 12 : 4;
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

// Where the libraries that have kernels say so.
extern "C" Kernels* fxquant_kernels() { return &kernels; }

extern "C" void fxquant_multiply(const Product* job) {
    const auto more_than = [&](int64_t rows) { return job->slots > rows * (job->ids ? job->experts : 1); };
#ifdef FXQUANT_AMX
    if (more_than(fewest_for_amx(*job)) && has_tiles()) {
        if (job->x_codes) return (void)kernels.tiled_codes(*job);
        if (kernels.tiled_floats(*job)) return;
    }
#endif
#ifdef FXQUANT_CODES
    if (job->x_codes && more_than(fewest_for_code_words(*job))) return (void)kernels.code_words(*job);
    if (job->x_codes) return (void)kernels.single_codes(*job);
#endif
#ifdef FXQUANT_BFLOAT16
    if (job->x_type == 1) {
        if (!more_than(most_for_strips(*job)) && kernels.float_strips(*job)) return;
        if (more_than(fewest_for_words(*job)) && kernels.float_words(*job)) return;
    }
#endif
#ifdef FXQUANT_CODES
    if (more_than(fewest_for_digits(*job)) && kernels.digit_codes(*job)) return;
    if (!more_than(DigitStrips::ROWS_OF_X) && DigitStrips::takes(*job) && kernels.digit_strips(*job)) return;
#endif
#ifdef FXQUANT_AVX512
    if (more_than(Tiles::fewest(*job))) return (void)kernels.tiles(*job);
    if (Strips::takes(*job)) return (void)kernels.strips(*job);
#endif
    kernels.general(*job);
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
