// Products on matrix units. 64 rows and 128 columns of the weight, a panel, are decoded at a time, and multiplied with 16
// rows of x after another, a turn; with 8 where there are no more. Where scales end, or with the panel, sums meet
// their scales, for which the units do not wait: sums of a step stay in tiles until the next step begins, and meet scales
// while the one behind it is multiplied. Where sums only go on, and totals of many rows of x pass through the second-level
// cache, several panels are decoded at a time. Rows of y do not depend on others, nor on the number of threads.
//
// `Numbers` says what is multiplied: how rows of x lie as tiles, how codes of the weight become tiles, which of them meet
// in a step, and how its sums are added to totals.

#ifdef FXQUANT_AMX

namespace {

template <class Numbers> struct Amx {
    static constexpr int64_t PANEL = Numbers::PANEL, TILE = Numbers::TILE, CHUNKS = Numbers::CHUNKS;
    static constexpr int64_t BATCH = 512; // rows of x for which a panel is decoded once
    static constexpr int VECTORS = Panels::VECTORS;
    static constexpr int64_t FAR = 1 << 19; // bytes of rows of x, so many that they are asked for before they are multiplied
    static constexpr int AT_A_TIME = 4; // vectors of sums that are added together
    using Ahead = Panels::Ahead;

    const Numbers numbers;
    const Product& job;
    const int64_t room, panels, units; // as there
    const int64_t turn, sums, apart;   // rows of x that meet a panel at a time; sums of a tile; bytes of a row of it

    // A tile of x and, of the first 16 rows, one of the weight: in bytes behind the turn's panel and the weight's.
    struct Factors {
        int64_t of_x, of_weight;
    };
    const std::vector<Factors> factors; // those of a step behind those of another
    const int64_t each;                 // of a step

    explicit Amx(Numbers given)
        : numbers(given), job(numbers.job), room(numbers.room), panels(numbers.panels), units(numbers.units),
          turn(numbers.turn), sums(turn * LANES), apart(turn * 4), factors(factors_of(given)),
          each(factors.size() / numbers.per) {}

    static std::vector<Factors> factors_of(const Numbers& numbers) {
        std::vector<Factors> found;
        for (int64_t s = 0; s < numbers.per; s++)
            numbers.each_product(s, [&](int64_t of_x, int64_t of_weight) { found.push_back({of_x, of_weight}); });
        return found;
    }

    static bool reads_in_streams(const Product&) { return false; }

    // How many of these rows of x are the next turn.
    int64_t rows_of_turn(int64_t rest) const { return std::min(rest, turn); }

    struct Scratch : Panels::Scratch {
        Buffer<uint8_t> tiles; // of a panel
        Buffer<float> sums;    // of two steps
        Buffer<float> ones;    // the scales of what has met its own

        explicit Scratch(int64_t room)
            : Panels::Scratch(room, BATCH), tiles(Numbers::TOGETHER * Numbers::ROOM), sums(2 * LANES * AT_ONCE),
              ones(AT_ONCE) {
            std::fill_n(ones.data, AT_ONCE, 1.0f);
        }
    };

    // The sums of a step with a turn: where they are, unless in tiles, the scales that they meet, what there is of x, and
    // where they go.
    struct Due {
        const float *scales, *offsets;
        const float* x;
        float* totals = nullptr;
        float* sums = nullptr;
    };

    // Of rows of x: where the first one's panel is, and how many bytes the next one's is behind it.
    struct Turns {
        const uint8_t* x;
        int64_t apart, count;
    };

    // What has been multiplied and not yet added to totals: the last sums are in tiles, those before them are stored.
    struct Pending {
        Due stored, held;
    };

    void run(const Task& task, Scratch& scratch) const {
        numbers.load_numbers(task, scratch);
        if (!numbers.rounded) numbers.by_block(scratch);
        for (int64_t from = 0; from < task.count; from += BATCH)
            batch(task, from, std::min(task.count - from, BATCH), scratch);
    }

    // Of the turn that has this row of x.
    const uint8_t* x_of(const Task& task, int64_t row) const { return (const uint8_t*)(task.x + row / turn * task.width); }

    void batch(const Task& task, int64_t from, int64_t count, Scratch& scratch) const {
        const int64_t turns = (count + turn - 1) / turn, all_sums = VECTORS * sums;
        memset(scratch.totals.data, 0, turns * all_sums * sizeof(float));
        const TileShapes shapes(numbers.tile_bytes(), apart);
        Ahead ahead(task, scratch, PANEL, (turns + 1) * Ahead::ASKS);
        Pending pending;
        float* held = scratch.sums.data; // where sums go on that are in tiles; at first to where nobody looks
        const int64_t most = turns < 8 ? 1 : numbers.together();
        for (int64_t panel = 0; panel < panels; panel += most) {
            const int64_t here = std::min(most, panels - panel);
            ahead.to_panel(panel);
            for (int64_t i = 0; i < here; i++)
                numbers.with_decoder(panel + i, scratch, [&](const auto& decoder) {
                    decode(decoder, panel + i, scratch.tiles.data + i * Numbers::ROOM, scratch, ahead);
                });
            const Turns of{x_of(task, from) + panel * numbers.stride, task.width * (int64_t)sizeof(float), turns};
            if (numbers.direct()) for (int64_t t = 0; t < turns; t++)
                add(of.x + t * of.apart, here, scratch.totals.data + t * all_sums, scratch, ahead, held);
            else with_kind([&](auto kind, auto turn) {
                with_each([&](auto each) { multiply<kind, turn, each>(panel, of, scratch, ahead, pending); });
            });
        }
        if (numbers.direct()) store_tiles(held);
        else with_kind([&](auto kind, auto turn) { finish<kind, turn>(scratch, pending); });
        const float* const scales = numbers.direct() && !numbers.rounded ? scratch.scales_by_block.data : scratch.ones.data;
        for (int64_t t = 0; t < turns; t++)
            put(task, from + t * turn, std::min(count - t * turn, turn), scratch.totals.data + t * all_sums, scales);
    }

    // `function` with how sums meet scales, and with how many rows of x.
    template <class Function> void with_kind(const Function& function) const {
        with_constant<Numbers::KINDS>(numbers.kind + 1, [&](auto n) {
            const std::integral_constant<int, n - 1> kind;
            if constexpr (Numbers::NARROW)
                if (turn == 8) return function(kind, std::integral_constant<int, 8>{});
            function(kind, std::integral_constant<int, 16>{});
        });
    }

    // `function` with the number of tiles of x that a step has, as a constant, or 0 where it has others than most steps.
    template <int EACH = Numbers::MOST_EACH, class Function> void with_each(const Function& function) const {
        if (each == EACH) return function(std::integral_constant<int, EACH>{});
        if constexpr (EACH > 1) return with_each<EACH / 2>(function);
        function(std::integral_constant<int, 0>{});
    }

    void store_tiles(float* to) const {
        each_sum([&](auto v) { store_tile<v>(to + v * sums, apart); });
    }

    // Some rows of the result, of totals `[rows of the weight, rows of x]` and what each row of the weight is still to be
    // multiplied with.
    void put(const Task& task, int64_t first, int64_t count, const float* totals, const float* scales) const {
        const uint8_t* const x = x_of(task, first);
        const __mmask16 of_x = (__mmask16)((1 << turn) - 1); // lanes of the vectors that they lie in
        alignas(64) float found[16][AT_ONCE];
        for (int v = 0; v < VECTORS; v++) {
            Z rows[16];
            for (int i = 0; i < 16; i++) {
                const F total = (F)_mm512_maskz_loadu_ps(of_x, totals + v * sums + i * turn);
                rows[i] = (Z)numbers.last(total, scales[v * LANES + i], x);
            }
            transpose(rows);
            for (int i = 0; i < 16; i++) store(&found[i][v * LANES], (F)rows[i]);
        }
        for (int64_t i = 0; i < count; i++) task.put(first + i, found[i]);
    }

    // What is due of a few vectors of sums, from this one on.
    template <int KIND, int TURN> __attribute__((always_inline)) void settle(const Due& due, int64_t vector) const {
        constexpr int ROWS = LANES / TURN; // of the weight, in a vector
        float* const totals = due.totals + vector * LANES;
        F found[AT_A_TIME];
#pragma GCC unroll 4
        for (int i = 0; i < AT_A_TIME; i++)
            found[i] = Numbers::template added<KIND, TURN>(load(totals + i * LANES), due.sums + (vector + i) * LANES,
                                                           due.scales + (vector + i) * ROWS,
                                                           due.offsets + (vector + i) * ROWS, due.x);
#pragma GCC unroll 4
        for (int i = 0; i < AT_A_TIME; i++) store(totals + i * LANES, found[i]);
    }

    // Where no sums are stored, but the last ones.
    float* other_sums(const Scratch& scratch, const Due& stored) const {
        return scratch.sums.data + (stored.sums == scratch.sums.data ? VECTORS * sums : 0);
    }

    // All that is pending.
    template <int KIND, int TURN> __attribute__((noinline)) void finish(const Scratch& scratch, Pending& pending) const {
        pending.held.sums = other_sums(scratch, pending.stored);
        store_tiles(pending.held.sums);
        for (const Due& due : {pending.stored, pending.held})
            for (int64_t i = 0; due.totals && i < VECTORS * TURN; i += AT_A_TIME) settle<KIND, TURN>(due, i);
    }

    // `function` with the number of each tile of sums.
    template <class Function> static __attribute__((always_inline)) void each_sum(const Function& function) {
        function(std::integral_constant<int, 0>{}), function(std::integral_constant<int, 1>{});
        function(std::integral_constant<int, 2>{}), function(std::integral_constant<int, 3>{});
    }

    // The products of a step, which has as many tiles of x as the constant says, if any. `begin` makes a tile ready for its
    // sums, just before they begin: what it held has long been added up by then, and the units need not wait for it.
    // `meanwhile` is what else is done, a bit behind each product, with the number of it.
    template <int EACH, class Begin, class Meanwhile>
    __attribute__((always_inline)) void products(int64_t s, const uint8_t* x, const uint8_t* weight, const Begin& begin,
                                                 const Meanwhile& meanwhile) const {
        const Factors* const own = factors.data() + s * each;
#pragma GCC unroll 4
        for (int64_t i = 0; i < (EACH ? EACH : each); i++) {
            const uint8_t* const tiles = weight + own[i].of_weight;
            load_tile<4>(x + own[i].of_x, apart);
            each_sum([&](auto v) __attribute__((always_inline)) {
                constexpr int W = 6 + v % 2;
                load_tile<W>(tiles + v * CHUNKS * TILE, 64);
                if (i == 0) begin(v);
                Numbers::template multiply<v, W>();
                meanwhile(i * VECTORS + v);
            });
        }
    }

    // All turns of rows of x with a panel. Meanwhile sums that are stored are settled, those in tiles are stored, and tiles
    // of x come nearer that the next turn or, behind the last one, the next panel begins with.
    template <int KIND, int TURN, int EACH>
    __attribute__((noinline)) void multiply(int64_t panel, const Turns& of, Scratch& scratch, Ahead& ahead,
                                            Pending& pending) const {
        constexpr int64_t ALL = VECTORS * TURN; // vectors of sums
        const int64_t parts = (EACH ? EACH : each) * VECTORS; // of a step, with so many of them that are settled
        const int64_t some = (ALL / AT_A_TIME + parts - 1) / parts * AT_A_TIME;
        const int64_t stride = numbers.stride, per = numbers.per, asks = Ahead::ASKS / per;
        const bool asks_for_x = Numbers::ASKS_FOR_X && of.count * of.apart > FAR;
        const int64_t lines = asks_for_x ? (stride + 64 * per * parts - 1) / (64 * per * parts) : 0; // with a part
        int64_t blocks[PANEL]; // of steps: where their scales are
        for (int64_t s = 0; s < per; s++)
            blocks[s] = std::min((panel * PANEL + s * numbers.step) / job.block, numbers.blocks - 1) * AT_ONCE;
        Due stored = pending.stored, held = pending.held;
        float* totals = scratch.totals.data;
        for (int64_t t = 0; t < of.count; t++, totals += ALL * LANES) {
            const uint8_t* const x = of.x + t * of.apart;
            const uint8_t* next_x = t + 1 < of.count ? x + of.apart : of.x + stride;
            for (int64_t s = 0; s < per; s++) {
                held.sums = other_sums(scratch, stored);
                const auto begin = [&](auto v) __attribute__((always_inline)) {
                    store_tile<v>(held.sums + v * TURN * LANES, TURN * 4), clear_tile<v>();
                };
                products<EACH>(s, x, scratch.tiles.data, begin, [&](int64_t part) __attribute__((always_inline)) {
                    for (int64_t i = 0; i < lines; i++, next_x += 64) __builtin_prefetch(next_x, 0, 3);
                    if (!stored.totals) return;
                    const int64_t first = part * some, end = std::min(first + some, ALL);
#pragma GCC unroll 4
                    for (int64_t i = first; i < end; i += AT_A_TIME) settle<KIND, TURN>(stored, i);
                });
                ahead.ask(asks);
                stored = held;
                held = {scratch.scales_by_block.data + blocks[s], scratch.offsets_by_block.data + blocks[s],
                        numbers.of_step(x, s), totals};
            }
        }
        pending = {stored, held};
    }

    // The same where nothing is pending, with so many panels: sums go on in tiles, which hold those of the last turn.
    __attribute__((noinline)) void add(const uint8_t* x, int64_t panels, float* totals, const Scratch& scratch,
                                       Ahead& ahead, float*& held) const {
        const auto go_on = [&](auto v) __attribute__((always_inline)) {
            if (held != totals) store_tile<v>(held + v * sums, apart), load_tile<v>(totals + v * sums, apart);
        };
        for (int64_t i = 0; i < panels; i++) {
            const auto begin = [&](auto v) __attribute__((always_inline)) {
                if (i == 0) go_on(v);
            };
            products<0>(0, x, scratch.tiles.data + i * Numbers::ROOM, begin, [](int64_t) {});
            ahead.ask(Ahead::ASKS);
            x += numbers.stride;
        }
        held = totals;
    }

    // Every row of the weight that a panel has, as rows of tiles.
    template <class Decoder>
    __attribute__((noinline)) void decode(const Decoder& given, int64_t panel, uint8_t* to, Scratch& scratch,
                                          Ahead& ahead) const {
        const Decoder decoder = given; // in registers
        const int64_t size = PANEL * job.bits / 8, first = panel * size, rest = numbers.bytes - first;
        const bool whole = rest >= size + numbers.behind(job.bits);
        constexpr int64_t SOME = AT_ONCE / Ahead::ASKS;
        for (int64_t group = 0; group < AT_ONCE; group += SOME) {
            ahead.ask();
            uint8_t* const tile_rows = to + group / LANES * CHUNKS * TILE + group % LANES * 64;
            for (int64_t i = 0; i < SOME; i++) {
                const uint8_t* from = scratch.codes[group + i] + first;
                // A few rows ahead and no more: of rows that are a power of two apart, the first-level cache holds few.
                __builtin_prefetch(scratch.codes[(group + i + SOME) % AT_ONCE] + first + (group + SOME < AT_ONCE ? 0 : size));
                uint8_t copy[PANEL + 16];
                if (!whole) {
                    memset(copy, 0, sizeof copy);
                    memcpy(copy, from, std::min(rest, size));
                    from = copy;
                }
                decoder(from, tile_rows + i * 64, group + i);
            }
        }
    }
};

} // namespace

#endif
