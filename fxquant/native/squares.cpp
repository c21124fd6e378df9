// How far decoded weights are from the weights: sums of squares, in double.

namespace {

typedef double D __attribute__((vector_size(128))); // one for each lane of F

template <class T>
void squares(const float* values, const T* weights, int64_t rows, int64_t columns, int64_t stride, int32_t threads,
             double* sums) {
    double off = 0, norm = 0;
#pragma omp parallel for schedule(static) reduction(+ : off, norm) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float* const v = values + row * columns;
        const T* const w = weights + row * stride;
        D o{}, n{};
        for (int64_t c = 0; c < columns; c += LANES) {
            const int64_t left = columns - c;
            const F a = left >= LANES ? load(v + c) : load_some(v + c, left);
            const F b = left >= LANES ? load(w + c) : load_some(w + c, left);
            const D wide = __builtin_convertvector(b, D), d = __builtin_convertvector(a, D) - wide;
            o += d * d;
            n += wide * wide;
        }
        for (int i = 0; i < LANES; i++) off += o[i], norm += n[i];
    }
    sums[0] = off;
    sums[1] = norm;
}

} // namespace

// values [rows, columns] without gaps; sums: of (value - weight)^2 and of weight^2
extern "C" void fxquant_squares(const float* values, const void* weights, int64_t rows, int64_t columns, int64_t stride,
                                int32_t dtype, int32_t threads, double* sums) {
    if (dtype == 0) squares(values, (const float*)weights, rows, columns, stride, threads, sums);
    else if (dtype == 1) squares(values, (const Bf16*)weights, rows, columns, stride, threads, sums);
    else squares(values, (const Fp16*)weights, rows, columns, stride, threads, sums);
}
