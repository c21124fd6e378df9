// From planes to weights, row by row: fields, then values, zero, scale and bias, each rounded on its own.

namespace {

constexpr int64_t CHUNK = 4096; // columns to unpack at a time

template <class Value> struct Dequantizer {
    const Job& job;
    const Value value;
    const Scales scales;

    explicit Dequantizer(const Job& j) : job(j), value(j), scales{j.scale_type, j.floor, j.limit} {}

    template <class T> void row(int64_t row, uint8_t* fields) const {
        T* const to = (T*)job.weight + row * job.weight_stride;
        const int64_t before = job.flat ? (job.first + row) * job.columns : 0;
        for (int64_t c = 0; c < job.columns; c += CHUNK) {
            const int64_t end = c + CHUNK < job.columns ? c + CHUNK : job.columns;
            unpack(job.codes + row * job.codes_stride + c * job.bits / 8, end - c, job.bits, fields);
            for (int64_t at = c; at < end;) {
                const int64_t block = (before + at) / job.block, next = (block + 1) * job.block - before;
                const int64_t stop = next < end ? next : end;
                part(fields + (at - c), stop - at, row, block, to + at);
                at = stop;
            }
        }
    }

    template <class T> void part(const uint8_t* fields, int64_t n, int64_t row, int64_t block, T* to) const {
        const int64_t at = (job.flat ? 0 : row * job.scales_stride) + block;
        const F scale = all(scales.decode(scales.get(job.scales, at)));
        F zero{}, bias{};
        if (job.zero_type == 1) {
            const int64_t blocks = (job.columns + job.block - 1) / job.block;
            const int64_t i = job.flat ? block : row * blocks + block;
            zero = all((float)(((uint8_t*)job.zeros)[i] ^ job.flip) + job.low);
        } else if (job.zero_type == 2) zero = all(scales.decode(scales.get(job.zeros, at)));
        if (job.biases) bias = all(scales.decode(scales.get(job.biases, at)));
        int64_t i = 0;
        const auto weights = [&](int64_t i) {
            const F v = value(fields + i), scaled = (job.zero_type ? v - zero : v) * scale;
            return job.biases ? scaled + bias : scaled;
        };
        for (; i + LANES <= n; i += LANES) store(to + i, weights(i));
        if (i < n) store_some(to + i, weights(i), n - i);
    }
};

struct IntValues {
    int32_t low;
    U8 flip;

    explicit IntValues(const Job& job) : low((int32_t)job.low), flip(U8{} + (uint8_t)job.flip) {}

    F operator()(const uint8_t* fields) const {
        return __builtin_convertvector(widen(read<U8>(fields) ^ flip) + low, F);
    }
};

template <int N> struct TableValues {
    alignas(64) float values[N] = {};

    explicit TableValues(const Job& job) { memcpy(values, job.values, (1 << job.bits) * sizeof(float)); }

    F operator()(const uint8_t* fields) const {
        const I codes = widen(read<U8>(fields));
        if constexpr (N <= 64) return look_up<N>(values, codes);
        F v;
        for (int i = 0; i < LANES; i++) v[i] = values[codes[i]];
        return v;
    }
};

template <class Value> void dequantize(const Job& job) {
    const Dequantizer<Value> dequantizer(job);
#pragma omp parallel num_threads(job.threads) if (job.threads > 1)
    {
        uint8_t fields[CHUNK + 128];
#pragma omp for schedule(static)
        for (int64_t row = 0; row < job.rows; row++) {
            if (job.dtype == 0) dequantizer.template row<float>(row, fields);
            else if (job.dtype == 1) dequantizer.template row<Bf16>(row, fields);
            else dequantizer.template row<Fp16>(row, fields);
        }
    }
}

} // namespace

extern "C" void fxquant_dequantize(const Job* job) {
    if (job->kind == 0) dequantize<IntValues>(*job);
    else if (job->kind == 1) dequantize<TableValues<16>>(*job);
    else if (job->kind == 2) dequantize<TableValues<64>>(*job);
    else dequantize<TableValues<256>>(*job);
}
