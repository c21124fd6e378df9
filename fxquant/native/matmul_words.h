// Products of words of x, 32 bits of some columns, with panels of 64 rows and 128 columns of the weight, with rows in the
// lanes of vectors, and some rows of x after another, a turn. A panel holds words like those of x, decoded once for all
// turns; of weights of 4 bits it holds codes, which are decoded where they are multiplied: that takes no longer than
// products do. Panels stay in the first-level cache meanwhile, and the words of a turn lie in the order in which they are
// read. Where scales end, or with the panel, sums meet their scales. Rows of y do not depend on others, nor on the number of
// threads.
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
    static constexpr int OF_WORDS = 2;                     // words that are read in a step
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

    // What multiplies rows of x of a turn with some panels.
    using Multiply = void (WordPanels::*)(int64_t first, int64_t end, const Z* weights, const char* of_turn, float* totals,
                                          Scratch& scratch, Ahead& ahead) const;

    Multiply multiply_of(int64_t rows, bool decoded) const {
        Multiply found;
        with_flag(numbers.plain, [&](auto plain) {
            with_flag(decoded, [&](auto decoded) {
                with_constant<TURN>(rows, [&](auto rows) { found = &WordPanels::multiply<rows, plain, decoded>; });
            });
        });
        return found;
    }

    // Rows of x of a turn.
    struct Turn {
        const char* x;
        int64_t first, count;
        Multiply multiply;
    };

    void run(const Task& task, Scratch& scratch) const {
        numbers.load_numbers(task, scratch);
        numbers.by_block(scratch);
        numbers.prepare(scratch);
        const bool codes = job.bits == 4 && !numbers.decodes(); // are what is multiplied, not words
        Turn turns[BATCH];
        const char* x = (const char*)task.x;
        for (int64_t row = 0; row < task.count;) {
            int64_t count = 0;
            for (const int64_t first = row; row < task.count && row + TURN <= first + BATCH; count++, x += task.width * 4) {
                const int64_t rows = rows_of_turn(task.count - row);
                turns[count] = {x, row, rows, multiply_of(rows, !codes)};
                row += rows;
            }
            batch(task, turns, count, codes, scratch);
        }
    }

    void batch(const Task& task, const Turn* turns, int64_t count, bool codes, Scratch& scratch) const {
        const auto totals = [&](const Turn& turn) { return scratch.totals.data + (turn.first - turns->first) * AT_ONCE; };
        std::fill(totals(turns[0]), totals(turns[count - 1]) + turns[count - 1].count * AT_ONCE, 0.0f);
        // Panels whose lines are turned at once; what is decoded right where it is read is one at a time.
        const int64_t together = numbers.turns() ? Panels::TURNED * numbers.line() / PANEL : 1;
        const int64_t parts = numbers.decodes() ? together : 1;
        const int64_t steps = together / parts * Numbers::WORDS / (codes ? Numbers::OF_NIBBLES : OF_WORDS);
        Ahead ahead = Ahead::in_turns(task, scratch, PANEL * together, count * parts, steps);
        const auto meet = [&](int64_t panel, int64_t end, const Z* weights) {
            for (int64_t i = 0; i < count; i++)
                (this->*turns[i].multiply)(panel, end, weights, turns[i].x, totals(turns[i]), scratch, ahead);
        };
        Z *const panels = (Z*)scratch.panel.data, *const words = (Z*)scratch.words.data;
        for (int64_t panel = 0; panel < numbers.panels; panel += together) {
            const int64_t end = std::min(panel + together, numbers.panels);
            ahead.to_panel(panel / together);
            if (numbers.turns())
                numbers.turn_words(panel * PANEL, (end - panel) * PANEL / numbers.line(), numbers.flip(), scratch, words);
            if (!numbers.decodes()) meet(panel, end, words);
            else
                for (int64_t p = panel; p < end; p++) {
                    numbers.decode(p, words + (p - panel) * 16 * VECTORS, scratch, panels);
                    meet(p, p + 1, panels);
                }
        }
        for (int64_t i = 0; i < count; i++)
            for (int64_t t = 0; t < turns[i].count; t++) {
                float* const total = totals(turns[i]) + t * AT_ONCE;
                numbers.finish(turns[i].x + Numbers::WORDS * TURN * 4, t, scratch.scales_by_block.data, total);
                task.put(turns[i].first + t, total);
            }
    }

    // A turn with some panels, added to what there is of it.
    template <int T, bool PLAIN, bool DECODED>
    __attribute__((noinline)) void multiply(int64_t first, int64_t end, const Z* weights, const char* of_turn, float* totals,
                                            Scratch& scratch, Ahead& ahead) const {
        constexpr int AT = DECODED ? OF_WORDS : Numbers::OF_NIBBLES; // words of x of a step
        const Z key = numbers.key();
        const uint8_t* next = ahead.next; // as what is in memory could be that of others
        int64_t asks = ahead.asks;
        // Kept in memory: what there are no registers for while sums are added up would be kept in those of vectors, from
        // where it comes no sooner than sums do.
        struct {
            const char* x;
            float* totals;
            int64_t step, end, s; // all of them, and those of a panel
        } place{of_turn + first * numbers.stride, totals, first * numbers.per, end * numbers.per, 0};
        const int32_t* words = (const int32_t*)place.x;
        for (; place.step < place.end; place.step++, place.s++) {
            if (place.s == numbers.per) place.s = 0, place.x += numbers.stride, words = (const int32_t*)place.x;
            Z sums[T][VECTORS];
            each<T>([&](auto t) __attribute__((always_inline)) {
                each<VECTORS>([&](auto v) __attribute__((always_inline)) { sums[t][v] = Z{}; });
            });
            for (int64_t left = words_of_step; left > 0; left -= AT) {
                if (asks-- > 0)
                    for (const uint8_t* const stop = next + ahead.some; next < stop; next += 64)
                        __builtin_prefetch(next, 0, LATER);
                each<AT>([&](auto i) __attribute__((always_inline)) {
                    Z w[VECTORS];
                    each<VECTORS>([&](auto v) __attribute__((always_inline)) {
                        if constexpr (DECODED) w[v] = weights[i * VECTORS + v];
                        else w[v] = Numbers::template of_nibbles<i>(weights + v, key);
                    });
                    each<T>([&](auto t) __attribute__((always_inline)) {
                        const Z own = word_in_order(words + i * TURN + t);
                        each<VECTORS>([&](auto v) __attribute__((always_inline)) {
                            Z sum = sums[t][v]; // what is written to while it is part of an array keeps that in memory
                            Numbers::add(sum, w[v], own);
                            sums[t][v] = sum;
                        });
                    });
                });
                weights += (DECODED ? AT : 1) * VECTORS, words += AT * TURN;
            }
            asm volatile("" : "+m"(place));
            const char* const of_step = place.x + (Numbers::WORDS + place.s * Numbers::NUMBERS) * TURN * 4;
            totals = place.totals;
            const int64_t block = first_of_block[place.step];
            const float* const scales = (numbers.rounded ? scratch.ones.data : scratch.scales_by_block.data) + block;
            const float* const offsets = scratch.offsets_by_block.data + block;
            const auto settle = [&](auto with_offsets) __attribute__((always_inline)) {
                each<T>([&](auto t) __attribute__((always_inline)) {
                    const Z missing = Numbers::missing(of_step, t);
                    F of_x{};
                    if constexpr (with_offsets) of_x = Numbers::sum_of_x(of_step, t);
                    each<VECTORS>([&](auto v) __attribute__((always_inline)) {
                        float* const to = totals + t * AT_ONCE + v * LANES;
                        F total = load(to);
                        if constexpr (with_offsets) total = multiply_add(load(offsets + v * LANES), of_x, total);
                        store(to, Numbers::added(total, sums[t][v], missing, load(scales + v * LANES)));
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
                    numbers.settle(of_step, t, found + t * VECTORS, scales, offsets, totals + t * AT_ONCE);
            }
        }
        ahead.next = next;
    }
};

} // namespace

#endif
