// A layer of experts, for few tokens: gate and up in one product, silu of the gate times up, down, and the weighted sum
// of the slots of a token, all of it in float32.

namespace {

// Relative error below 2^-22; to infinity where float32 ends, and to 0.
inline F exponential(F v) {
    const F bounded = least(most(v, all(-104)), all(89)), whole = rounded(bounded * 1.44269504f);
    const F rest = multiply_add(whole, all(-1.42860677e-6f), multiply_add(whole, all(-0.693145752f), bounded));
    F sum = all(1 / 5040.0f);
    for (const float factor : {1 / 720.0f, 1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f})
        sum = multiply_add(sum, rest, all(factor));
    // In two steps, since a power can be more than a float has, where the product is not.
    const I power = __builtin_convertvector(whole, I), half = power >> 1;
    return sum * as<F>((half + 127) << 23) * as<F>((power - half + 127) << 23);
}

inline F silu(F v) { return v / (exponential(-v) + 1.0f); }

bool is_known(const Product& job, int64_t slot) { return job.ids[slot] >= 0 && job.ids[slot] < job.experts; }

} // namespace

extern "C" void fxquant_gated_experts(const Gated* job) {
    Product first = job->first, second = job->second;
    const int64_t slots = first.slots, inner = second.columns, rows = second.rows, picks = first.picks;
    const int64_t width = (inner + LANES - 1) / LANES * LANES;
    Buffer<float> both(slots * 2 * inner), middle(slots * width), outputs(slots * rows);
    first.y = both.data, first.dtype = 0, first.y_stride = 2 * inner;
    fxquant_multiply(&first);
#pragma omp parallel for num_threads(first.threads) if (first.threads > 1)
    for (int64_t slot = 0; slot < slots; slot++) {
        if (!is_known(first, slot)) continue;
        const float *const gate = both.data + slot * 2 * inner, *const up = gate + inner;
        for (int64_t i = 0; i < inner; i += LANES) {
            const int64_t count = inner - i < LANES ? inner - i : LANES;
            store(middle.data + slot * width + i, silu(load_some(gate + i, count)) * load_some(up + i, count));
        }
    }
    second.x = middle.data, second.x_type = 0, second.x_stride = width;
    second.y = outputs.data, second.dtype = 0, second.y_stride = rows;
    second.slots = slots, second.picks = 1, second.ids = first.ids;
    fxquant_multiply(&second);
#pragma omp parallel for num_threads(first.threads) if (first.threads > 1)
    for (int64_t token = 0; token < slots / picks; token++)
        for (int64_t i = 0; i < rows; i += LANES) {
            const int64_t count = rows - i < LANES ? rows - i : LANES, at = token * rows + i;
            F total{};
            for (int64_t slot = token * picks; slot < (token + 1) * picks; slot++) {
                if (!is_known(first, slot)) continue;
                const F weight = all(load_one(job->weights, job->weights_type, slot));
                total = multiply_add(load_some(outputs.data + slot * rows + i, count), weight, total);
            }
            store_as(job->y, job->dtype, at, total, count);
        }
}

// The same for x `[tokens, columns]`. `job` has all but what is named here.
extern "C" void fxquant_gated_experts_of(const Gated* job, const void* x, const int64_t* ids, const void* weights,
                                         void* y, int64_t slots, int threads) {
    Gated own = *job;
    own.first.x = x, own.first.ids = ids, own.first.slots = slots;
    own.first.threads = own.second.threads = threads;
    own.weights = weights, own.y = y;
    fxquant_gated_experts(&own);
}
