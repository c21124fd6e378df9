// Products of many rows of x with panels of 64 rows and 64 columns, in float32. A sum is made of the sums of panels, each
// in the order of its columns. Rows of y do not depend on others, nor on the number of threads.

#ifdef FXQUANT_AVX512

namespace {

struct Tiles : Panels {
    static constexpr int64_t PANEL = 64; // columns

    const int64_t panels, units;
    const F table;

    explicit Tiles(const Product& j)
        : Panels(j), panels((j.columns + PANEL - 1) / PANEL), units(panels * PANEL / LANES), table(load(j.values)) {}

    static bool reads_in_streams(const Product&) { return false; }

    // With so many rows of x, or fewer, other kernels are faster: the more steps a code takes, the more rows pay for it.
    static int64_t fewest(const Product& job) {
        if (job.bits == 8) return job.kind ? 31 : 15;
        return job.bits == 4 ? 15 : job.bits > 4 ? 63 : 127;
    }

    // A row of x in float32, with zeros behind the last column.
    bool spread(int64_t row, float* to) const {
        memset(to + (panels - 1) * PANEL, 0, PANEL * sizeof(float));
        for (int64_t i = 0; i < job.columns; i += LANES) {
            const int64_t count = std::min<int64_t>(job.columns - i, LANES);
            store_some(to + i, floats(job.x, job.x_type, row * job.x_stride + i, count), count);
        }
        return true;
    }

    void run(const Task& task, Scratch& scratch) const {
        load_numbers(task, scratch);
        by_block(scratch);
        for (int64_t from = 0; from < task.count; from += BATCH)
            batch(task, from, std::min(task.count - from, BATCH), scratch);
    }

    void batch(const Task& task, int64_t from, int64_t count, Scratch& scratch) const {
        const int64_t turns = (count + TOKENS - 1) / TOKENS;
        const float* xs[BATCH];
        for (int64_t i = 0; i < count; i++) xs[i] = task.x_row(from + i);
        memset(scratch.totals.data, 0, count * AT_ONCE * sizeof(float));
        Ahead ahead(task, scratch, PANEL, (turns + 1) * Ahead::ASKS);
        for (int64_t panel = 0; panel < panels; panel++) {
            ahead.to_panel(panel);
            decode(panel, scratch, ahead);
            for (int64_t turn = 0; turn < turns; turn++) {
                const int64_t a = turn * count / turns, b = (turn + 1) * count / turns;
                with_constant<TOKENS>(b - a, [&](auto tokens) {
                    multiply<tokens>((const F*)scratch.panel.data, xs + a, panel * PANEL,
                                     scratch.totals.data + a * AT_ONCE, ahead);
                });
            }
        }
        for (int64_t i = 0; i < count; i++)
            task.put(from + i, scratch.totals.data + i * AT_ONCE);
    }

    // Some rows of x with a panel, added to what there is of them.
    template <int T>
    __attribute__((noinline)) static void multiply(const F* weights, const float* const* xs, int64_t first,
                                                   float* totals, Ahead& ahead) {
        const float* x[T];
        F sums[T][VECTORS];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            x[t] = xs[t] + first;
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[t][v] = F{};
        }
        for (int64_t i = 0; i < PANEL; i++, weights += VECTORS) {
            if (i % (PANEL / Ahead::ASKS) == 0) ahead.ask();
            F w[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) w[v] = weights[v];
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const F own = (F)_mm512_set1_ps(x[t][i]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) sums[t][v] = multiply_add(w[v], own, sums[t][v]);
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                float* const to = totals + t * AT_ONCE + v * LANES;
                store(to, load(to) + sums[t][v]);
            }
    }

    // How codes become values: fields of a table of 16, of 4 bits or in bytes; integers; fields of a larger table.
    enum Values { NIBBLES, FEW, SIGNED, UNSIGNED, MANY };

    void decode(int64_t panel, Scratch& scratch, Ahead& ahead) const {
        const Z* words = words_from(panel * PANEL, Z{}, scratch);
        for (int v = 0; v < VECTORS; v++, words++) {
            ahead.ask(Ahead::PER_VECTOR);
            if (job.bits == 4) expand<NIBBLES>(words, v, panel, scratch);
            else if (job.bits < 4) expand<FEW>(words, v, panel, scratch);
            else if (job.kind) expand<MANY>(words, v, panel, scratch);
            else if (job.bits == 8 && job.low) expand<SIGNED>(words, v, panel, scratch);
            else expand<UNSIGNED>(words, v, panel, scratch);
        }
    }

    template <Values VALUES> void expand(const Z* words, int v, int64_t panel, Scratch& scratch) const {
        constexpr int PER = VALUES == NIBBLES ? 8 : 4; // codes of a word
        F* to = (F*)scratch.panel.data + v;
        for (int64_t i = 0; i < PANEL / PER; i++) {
            const int64_t block = std::min((panel * PANEL + i * PER) / job.block, blocks - 1) * AT_ONCE + v * LANES;
            const F scales = load(scratch.scales_by_block.data + block);
            const F offsets = job.zero ? load(scratch.offsets_by_block.data + block) : F{};
            const auto all_with = [&](auto&& weight) __attribute__((always_inline)) {
#pragma GCC unroll 8
                for (int j = 0; j < PER; j++, to += VECTORS) *to = weight(value<VALUES>(words[i * VECTORS], j));
            };
            if (job.zero == 0) all_with([&](F value) { return value * scales; });
            else if (job.zero == 1) all_with([&](F value) { return (value - offsets) * scales; });
            else all_with([&](F value) { return multiply_add(value, scales, offsets); });
        }
    }

    template <Values VALUES> F value(Z word, int j) const {
        if (VALUES == NIBBLES) return look_up_low(table, (U)word >> (uint32_t)(4 * j));
        const U shifted = (U)word >> (uint32_t)(8 * j);
        if (VALUES == FEW) return look_up_low(table, shifted);
        if (VALUES == SIGNED) return __builtin_convertvector((I)((U)word << (uint32_t)(24 - 8 * j)) >> 24, F);
        const U code = shifted & 255;
        if (VALUES == MANY) return (F)_mm512_i32gather_ps((Z)code, job.values, 4);
        return __builtin_convertvector((I)code + job.low, F);
    }
};

} // namespace

#endif
