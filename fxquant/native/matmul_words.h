// Products of words of x, 32 bits of some columns, with panels: 64 rows and 128 columns of the weight are decoded at a time,
// with rows in the lanes of vectors and a word of each in a lane, and multiplied with some rows of x after another, a turn.
// A panel stays in the first-level cache meanwhile, and the words of a turn lie in the order in which they are read. Where
// scales end, or with the panel, sums meet their scales. Rows of y do not depend on others, nor on the number of threads.
//
// `Numbers` says what a word is, how it is multiplied, how codes become words, and how sums are added to totals.

#ifdef FXQUANT_CODES

namespace {

// A word of x in all lanes. In the order in which it is written: moved ahead of products, words take registers from sums.
inline __attribute__((always_inline)) Z word_in_order(const int32_t* p) {
    Z to;
    asm volatile("vpbroadcastd %1, %0" : "=v"(to) : "m"(*p));
    return to;
}

template <class Numbers> struct WordPanels {
    static constexpr int TURN = Panels::TOKENS, VECTORS = Panels::VECTORS; // rows of x, at the most
    static constexpr int64_t BATCH = 512, PANEL = Numbers::PANEL;
    static constexpr int64_t TOGETHER = Numbers::TOGETHER; // panels that are decoded before rows of x meet them
    using Ahead = Panels::Ahead;

    struct Scratch : Panels::Scratch {
        Buffer<float> ones; // the scales of what has met its own

        explicit Scratch(int64_t room) : Panels::Scratch(room, BATCH), ones(AT_ONCE) {
            std::fill_n(ones.data, AT_ONCE, 1.0f);
        }
    };

    const Numbers& numbers;
    const Product& job;
    const int64_t room, units;                 // as there
    const int64_t words_of_step;
    const std::vector<int64_t> first_of_block; // of every step of a row: where the scales are, by block

    explicit WordPanels(const Numbers& n)
        : numbers(n), job(n.job), room(n.room), units(n.units), words_of_step(Numbers::WORDS / n.per),
          first_of_block(places_of(n)) {}

    static std::vector<int64_t> places_of(const Numbers& numbers) {
        std::vector<int64_t> found(numbers.panels * numbers.per);
        for (int64_t i = 0; !numbers.rounded && i < (int64_t)found.size(); i++)
            found[i] = std::min(i * numbers.step / numbers.job.block, numbers.blocks - 1) * AT_ONCE;
        return found;
    }

    static bool reads_in_streams(const Product&) { return false; }

    // How many of these rows of x are the next turn: all turns have about as many.
    static int64_t rows_of_turn(int64_t rest) {
        const int64_t turns = (rest + TURN - 1) / TURN;
        return (rest + turns - 1) / turns;
    }

    // Rows of x of a turn.
    struct Turn {
        const char* x;
        int64_t first, count;
    };

    void run(const Task& task, Scratch& scratch) const {
        numbers.load_numbers(task, scratch);
        numbers.by_block(scratch);
        numbers.prepare(scratch);
        Turn turns[BATCH];
        const char* x = (const char*)task.x;
        for (int64_t row = 0; row < task.count;) {
            int64_t count = 0;
            for (const int64_t first = row; row < task.count && row + TURN <= first + BATCH; count++, x += task.width * 4) {
                turns[count] = {x, row, rows_of_turn(task.count - row)};
                row += turns[count].count;
            }
            batch(task, turns, count, scratch);
        }
    }

    void batch(const Task& task, const Turn* turns, int64_t count, Scratch& scratch) const {
        const auto totals = [&](const Turn& turn) { return scratch.totals.data + (turn.first - turns->first) * AT_ONCE; };
        std::fill(totals(turns[0]), totals(turns[count - 1]) + turns[count - 1].count * AT_ONCE, 0.0f);
        Ahead ahead(task, scratch, PANEL * TOGETHER, count);
        for (int64_t panel = 0; panel < numbers.panels; panel += TOGETHER) {
            const int64_t end = std::min(panel + TOGETHER, numbers.panels);
            ahead.to_panel(panel / TOGETHER);
            for (int64_t p = panel; p < end; p++)
                numbers.decode(p, scratch, (Z*)scratch.panel.data + (p - panel) * Numbers::WORDS * VECTORS, ahead);
            for (int64_t i = 0; i < count; i++)
                with_flag(numbers.plain, [&](auto plain) {
                    with_constant<TURN>(turns[i].count, [&](auto rows) {
                        multiply<rows, plain>(panel, end, turns[i].x, totals(turns[i]), scratch, ahead);
                    });
                });
        }
        for (int64_t i = 0; i < count; i++)
            for (int64_t t = 0; t < turns[i].count; t++) {
                float* const total = totals(turns[i]) + t * AT_ONCE;
                numbers.finish(turns[i].x, t, scratch.scales_by_block.data, total);
                task.put(turns[i].first + t, total);
            }
    }

    // A turn with some panels, added to what there is of it.
    template <int T, bool PLAIN>
    __attribute__((noinline)) void multiply(int64_t first, int64_t end, const char* of_turn, float* totals, Scratch& scratch,
                                            Ahead& ahead) const {
        const Z* weights = (const Z*)scratch.panel.data;
        const uint8_t* next = ahead.next; // as what is in memory could be that of others
        int64_t asks = ahead.asks;
        const char* x = of_turn + first * numbers.stride;
        const int32_t* words = (const int32_t*)x;
        for (int64_t i = first * numbers.per, s = 0; i < end * numbers.per; i++, s++) {
            if (s == numbers.per) s = 0, x += numbers.stride, words = (const int32_t*)x;
            Z sums[T][VECTORS];
            each<T>([&](auto t) __attribute__((always_inline)) {
                const Z start = numbers.start(x, s, t);
                each<VECTORS>([&](auto v) __attribute__((always_inline)) { sums[t][v] = start; });
            });
            for (int64_t left = words_of_step; left > 0; left -= 2) {
                if (asks-- > 0)
                    for (const uint8_t* const stop = next + ahead.some; next < stop; next += 64)
                        __builtin_prefetch(next, 0, LATER);
                each<2>([&](auto second) __attribute__((always_inline)) {
                    Z w[VECTORS];
                    each<VECTORS>([&](auto v) __attribute__((always_inline)) { w[v] = weights[second * VECTORS + v]; });
                    each<T>([&](auto t) __attribute__((always_inline)) {
                        const Z own = word_in_order(words + second * TURN + t);
                        each<VECTORS>([&](auto v) __attribute__((always_inline)) {
                            Z sum = sums[t][v]; // what is written to while it is part of an array keeps that in memory
                            Numbers::add(sum, w[v], own);
                            sums[t][v] = sum;
                        });
                    });
                });
                weights += 2 * VECTORS, words += 2 * TURN;
            }
            asm volatile("" : "+r"(totals)); // read again in every step: there are no registers to keep them in
            const int64_t block = first_of_block[i];
            const float* const scales = (numbers.rounded ? scratch.ones.data : scratch.scales_by_block.data) + block;
            const float* const offsets = scratch.offsets_by_block.data + block;
            const auto settle = [&](auto with_offsets) __attribute__((always_inline)) {
                each<T>([&](auto t) __attribute__((always_inline)) {
                    F of_x{};
                    if constexpr (with_offsets) of_x = Numbers::sum_of_x(x, s, t);
                    each<VECTORS>([&](auto v) __attribute__((always_inline)) {
                        float* const to = totals + t * AT_ONCE + v * LANES;
                        F total = load(to);
                        if constexpr (with_offsets) total = multiply_add(load(offsets + v * LANES), of_x, total);
                        store(to, Numbers::added(total, sums[t][v], load(scales + v * LANES)));
                    });
                });
            };
            if constexpr (PLAIN) settle(std::false_type{});
            else if constexpr (Numbers::ADDS_OFFSETS) settle(std::true_type{});
            else {
                Z* const found = (Z*)scratch.sums.data;
                each<T>([&](auto t) __attribute__((always_inline)) {
                    each<VECTORS>([&](auto v) __attribute__((always_inline)) { found[t * VECTORS + v] = sums[t][v]; });
                });
                for (int64_t t = 0; t < T; t++)
                    numbers.settle(x, s, t, found + t * VECTORS, scales, offsets, totals + t * AT_ONCE);
            }
        }
        ahead.next = next;
    }
};

} // namespace

#endif
