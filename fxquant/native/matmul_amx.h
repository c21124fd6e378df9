// Products on matrix units. 64 rows and 128 columns of the weight, a panel, are decoded at a time, and multiplied with 16
// rows of x after another. Where scales end, or with the panel, sums meet their scales; that of one step is done while
// the matrix units are at the next. Where sums only go on, and totals of many rows of x pass through the second-level
// cache, several panels are decoded at a time. Rows of y do not depend on others, nor on the number of threads.
//
// `Numbers` says what is multiplied: how rows of x lie as tiles, how codes of the weight become tiles, which of them meet
// in a step, and how its sums are added to totals.

#ifdef FXQUANT_AMX

namespace {

template <class Numbers> struct Amx {
    static constexpr int64_t PANEL = Numbers::PANEL, TURN = Numbers::TURN, TILE = Numbers::TILE, CHUNKS = Numbers::CHUNKS;
    static constexpr int64_t BATCH = 512; // rows of x for which a panel is decoded once
    static constexpr int VECTORS = Panels::VECTORS;
    static constexpr int AT_A_TIME = 4; // rows of the weight whose sums are added together
    using Ahead = Panels::Ahead;

    const Numbers numbers;
    const Product& job;
    const int64_t room, panels, units; // as there

    explicit Amx(Numbers given)
        : numbers(given), job(numbers.job), room(numbers.room), panels(numbers.panels), units(numbers.units) {}

    static bool reads_in_streams(const Product&) { return false; }

    struct Scratch : Panels::Scratch {
        Buffer<uint8_t> tiles; // of a panel
        Buffer<float> sums;    // of two steps
        Buffer<float> ones;    // the scales of what has met its own

        explicit Scratch(int64_t room)
            : Panels::Scratch(room, BATCH), tiles(Numbers::TOGETHER * Numbers::ROOM), sums(2 * TURN * AT_ONCE),
              ones(AT_ONCE) {
            std::fill_n(ones.data, AT_ONCE, 1.0f);
        }
    };

    // A step's sums that are there, its scales, what there is of x, and where they go.
    struct Due {
        const float *sums, *scales, *offsets;
        const uint8_t* x;
        int64_t step;
        float* totals = nullptr;
    };

    void run(const Task& task, Scratch& scratch) const {
        numbers.load_numbers(task, scratch);
        if (!numbers.rounded) numbers.by_block(scratch);
        for (int64_t from = 0; from < task.count; from += BATCH)
            with_flag(numbers.affine(), [&](auto affine) {
                batch<affine>(task, from, std::min(task.count - from, BATCH), scratch);
            });
    }

    // Of the turn that has this row of x.
    static const uint8_t* x_of(const Task& task, int64_t row) { return (const uint8_t*)(task.x + row / TURN * task.width); }

    template <bool AFFINE> void batch(const Task& task, int64_t from, int64_t count, Scratch& scratch) const {
        const int64_t turns = (count + TURN - 1) / TURN;
        memset(scratch.totals.data, 0, turns * TURN * AT_ONCE * sizeof(float));
        const TileShapes shapes(numbers.tile_bytes());
        Ahead ahead(task, scratch, PANEL, turns);
        Due due;
        const int64_t most = turns < 8 ? 1 : numbers.together();
        for (int64_t panel = 0; panel < panels; panel += most) {
            const int64_t here = std::min(most, panels - panel);
            ahead.to_panel(panel);
            for (int64_t i = 0; i < here; i++)
                numbers.with_decoder(panel + i, scratch, [&](const auto& decoder) {
                    decode(decoder, panel + i, scratch.tiles.data + i * Numbers::ROOM, scratch, ahead);
                });
            for (int64_t turn = 0; turn < turns; turn++) {
                const uint8_t* const x = x_of(task, from + turn * TURN) + panel * numbers.stride;
                float* const totals = scratch.totals.data + turn * TURN * AT_ONCE;
                if (numbers.direct()) add(x, here, totals, scratch, ahead);
                else multiply<AFFINE>(panel, x, totals, scratch, ahead, due);
            }
        }
        for (int64_t row = 0; due.totals && row < AT_ONCE; row += AT_A_TIME) settle<AFFINE>(due, row);
        const float* const scales = numbers.direct() && !numbers.rounded ? scratch.scales_by_block.data : scratch.ones.data;
        for (int64_t turn = 0; turn < turns; turn++) {
            const float* const totals = scratch.totals.data + turn * TURN * AT_ONCE;
            put(task, from + turn * TURN, std::min(count - turn * TURN, TURN), totals, scales);
        }
    }

    // Some rows of the result, of totals `[rows of the weight, rows of x]` and what each row of the weight is still to be
    // multiplied with.
    void put(const Task& task, int64_t first, int64_t count, const float* totals, const float* scales) const {
        const uint8_t* const x = x_of(task, first);
        alignas(64) float found[TURN][AT_ONCE];
        for (int v = 0; v < VECTORS; v++) {
            Z rows[16];
            memcpy(rows, totals + v * LANES * TURN, sizeof rows);
            for (int i = 0; i < 16; i++) rows[i] = (Z)numbers.last((F)rows[i], scales[v * LANES + i], x);
            transpose(rows);
            for (int i = 0; i < 16; i++) store(&found[i][v * LANES], (F)rows[i]);
        }
        for (int64_t i = 0; i < count; i++) task.put(first + i, found[i]);
    }

    // What is due of a few rows of the weight.
    template <bool AFFINE> __attribute__((always_inline)) void settle(const Due& due, int64_t row) const {
        float* const totals = due.totals + row * TURN;
        F found[AT_A_TIME];
#pragma GCC unroll 4
        for (int i = 0; i < AT_A_TIME; i++) {
            const float offset = AFFINE ? due.offsets[row + i] : 0;
            found[i] = numbers.template added<AFFINE>(load(totals + i * TURN), due.sums + (row + i) * TURN,
                                                      due.scales[row + i], offset, due.x, due.step);
        }
#pragma GCC unroll 4
        for (int i = 0; i < AT_A_TIME; i++) store(totals + i * TURN, found[i]);
    }

    // A turn of rows of x with a panel. What is due is settled meanwhile, and its last sums are due then.
    template <bool AFFINE>
    __attribute__((noinline)) void multiply(int64_t panel, const uint8_t* x, float* totals, Scratch& scratch, Ahead& ahead,
                                            Due& before) const {
        const int64_t parts = numbers.products() * VECTORS;
        const int64_t each = (AT_ONCE / AT_A_TIME + parts - 1) / parts * AT_A_TIME; // rows that a part settles
        const uint8_t* const tiles = scratch.tiles.data;
        Due due = before;
        float* sums = scratch.sums.data + (due.totals && due.sums == scratch.sums.data ? TURN * AT_ONCE : 0);
        for (int64_t s = 0; s < numbers.per; s++) {
            int64_t row = due.totals ? 0 : AT_ONCE;
            clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
            numbers.each_product(s, [&](int64_t of_x, int64_t of_weight) __attribute__((always_inline)) {
                load_tile<4>(x + of_x, 64);
                const auto multiply = [&](auto v, auto tile) __attribute__((always_inline)) {
                    load_tile<tile>(tiles + of_weight + v * CHUNKS * TILE, 64);
                    Numbers::template multiply<v, tile>();
                    const int64_t end = std::min(row + each, AT_ONCE);
                    for (; row < end; row += AT_A_TIME) settle<AFFINE>(due, row);
                };
                const std::integral_constant<int, 6> even;
                const std::integral_constant<int, 7> odd;
                multiply(std::integral_constant<int, 0>{}, even), multiply(std::integral_constant<int, 1>{}, odd);
                multiply(std::integral_constant<int, 2>{}, even), multiply(std::integral_constant<int, 3>{}, odd);
            });
            for (int64_t i = 0; i < Ahead::ASKS / numbers.per; i++) ahead.ask();
            store_tile<0>(sums, 64), store_tile<1>(sums + TURN * LANES, 64);
            store_tile<2>(sums + 2 * TURN * LANES, 64), store_tile<3>(sums + 3 * TURN * LANES, 64);
            const int64_t block = std::min((panel * PANEL + s * numbers.step) / job.block, numbers.blocks - 1) * AT_ONCE;
            due = {sums, scratch.scales_by_block.data + block, scratch.offsets_by_block.data + block, x, s, totals};
            sums = scratch.sums.data + (sums == scratch.sums.data ? TURN * AT_ONCE : 0);
        }
        before = due;
    }

    // The same where nothing is due, with so many panels: sums go on in the totals.
    __attribute__((noinline)) void add(const uint8_t* x, int64_t panels, float* totals, const Scratch& scratch,
                                       Ahead& ahead) const {
        constexpr int64_t NEXT = TURN * LANES;
        load_tile<0>(totals, 64), load_tile<1>(totals + NEXT, 64);
        load_tile<2>(totals + 2 * NEXT, 64), load_tile<3>(totals + 3 * NEXT, 64);
        for (int64_t i = 0; i < panels; i++) {
            const uint8_t* const tiles = scratch.tiles.data + i * Numbers::ROOM;
            numbers.each_product(0, [&](int64_t of_x, int64_t of_weight) __attribute__((always_inline)) {
                const uint8_t* const weight = tiles + of_weight;
                load_tile<4>(x + of_x, 64);
                load_tile<6>(weight, 64), Numbers::template multiply<0, 6>();
                load_tile<7>(weight + CHUNKS * TILE, 64), Numbers::template multiply<1, 7>();
                load_tile<6>(weight + 2 * CHUNKS * TILE, 64), Numbers::template multiply<2, 6>();
                load_tile<7>(weight + 3 * CHUNKS * TILE, 64), Numbers::template multiply<3, 7>();
            });
            for (int64_t i = 0; i < Ahead::ASKS; i++) ahead.ask();
            x += numbers.stride;
        }
        store_tile<0>(totals, 64), store_tile<1>(totals + NEXT, 64);
        store_tile<2>(totals + 2 * NEXT, 64), store_tile<3>(totals + 3 * NEXT, 64);
    }

    // Every row of the weight that a panel has, as rows of tiles.
    template <class Decoder>
    __attribute__((noinline)) void decode(const Decoder& given, int64_t panel, uint8_t* to, Scratch& scratch,
                                          Ahead& ahead) const {
        const Decoder decoder = given; // in registers
        const int64_t size = PANEL * job.bits / 8, first = panel * size, rest = numbers.bytes - first;
        const bool whole = rest >= size + numbers.behind(job.bits);
        for (int64_t row = 0; row < AT_ONCE; row++) {
            if (row % (AT_ONCE / Ahead::ASKS) == 0) ahead.ask();
            const uint8_t* from = scratch.codes[row] + first;
            // Of many rows that are a power of two apart, the first-level cache holds few.
            __builtin_prefetch(scratch.codes[(row + LANES) % AT_ONCE] + first + (row + LANES < AT_ONCE ? 0 : size), 0, 3);
            uint8_t copy[PANEL + 16];
            if (!whole) {
                memset(copy, 0, sizeof copy);
                memcpy(copy, from, std::min(rest, size));
                from = copy;
            }
            decoder(from, to + row / LANES * CHUNKS * TILE + row % LANES * 64, row);
        }
    }
};

} // namespace

#endif
