// Panels: 64 rows of a weight and some columns, decoded together, with rows in the lanes of vectors. They stay in the
// first-level cache until they have been multiplied with all rows of x, or many.

#ifdef FXQUANT_AVX512

#include <algorithm>

namespace {

// Words of 16 rows, lane by lane.
inline void transpose(Z (&v)[16]) {
    Z t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        const Z a = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88), b = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        const Z c = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88), d = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
        t[i] = _mm512_shuffle_i32x4(a, c, 0x88), t[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88), t[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) v[i] = t[i];
}

// Words of up to six rows, 16 of each, as one of each row after another.
struct InTurn {
    static constexpr int ROWS = 6;

    Z places[ROWS];              // the words of rows, of every vector of the result
    __mmask16 lanes[ROWS][ROWS]; // of every vector, those of each row

    InTurn() : lanes() {
        for (int i = 0; i < ROWS; i++) {
            int32_t of[LANES];
            for (int l = 0; l < LANES; l++) {
                const int word = i * LANES + l;
                of[l] = word / ROWS, lanes[i][word % ROWS] |= 1 << l;
            }
            places[i] = read<Z>(of);
        }
    }

    void operator()(const Z (&rows)[ROWS], void* to) const {
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            Z found{};
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) found = _mm512_mask_permutexvar_epi32(found, lanes[i][r], places[i], rows[r]);
            _mm512_storeu_si512((Z*)to + i, found);
        }
    }
};

#ifdef __AVX512BF16__
// 32 floats in bfloat16.
inline Z rounded_pair(F low, F high) { return (Z)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
#endif

struct Panels {
    static constexpr int VECTORS = AT_ONCE / LANES, TOKENS = InTurn::ROWS;
    static constexpr int64_t BATCH = 192; // rows of x for which a panel is decoded once

    const Product& job;
    const int64_t bytes, blocks, room; // of a row; the last for its numbers

    explicit Panels(const Product& j)
        : job(j), bytes((j.columns * j.bits + 7) / 8), blocks((j.columns + j.block - 1) / j.block),
          room(room_of(j, blocks)) {}

    struct Scratch {
        Buffer<float> scales, offsets; // by row
        Buffer<float> scales_by_block, offsets_by_block, totals, sums; // the last of a turn
        Buffer<uint8_t> bytes, words, panel;
        const uint8_t* codes[AT_ONCE]; // of every row

        explicit Scratch(int64_t room, int64_t batch = BATCH)
            : scales(AT_ONCE * room + LANES), offsets(AT_ONCE * room + LANES), scales_by_block(AT_ONCE * room),
              offsets_by_block(AT_ONCE * room), totals(batch * AT_ONCE), sums(TOKENS * AT_ONCE), bytes(EACH * room + 128),
              words(AT_ONCE * 256), panel(AT_ONCE * 64 * sizeof(float)) {}
    };

    // Columns of a panel of 128 whose sums have one scale.
    static int64_t step_of(const Product& job) {
        int64_t step = 128;
        while (job.block < job.columns && job.block % step) step /= 2;
        return step;
    }

    // The numbers of all rows, `[rows, room]`.
    void load_numbers(const Task& task, Scratch& scratch) const {
        for (int64_t i = 0; i < AT_ONCE; i++) scratch.codes[i] = task.codes(i);
        load_numbers(task, job.scales, scratch.scales.data, scratch);
        if (job.zero) load_numbers(task, job.offsets, scratch.offsets.data, scratch);
    }

    // The same, `[blocks, rows]`.
    void by_block(Scratch& scratch) const {
        by_block(scratch.scales.data, scratch.scales_by_block.data);
        if (job.zero) by_block(scratch.offsets.data, scratch.offsets_by_block.data);
    }

    // 64 bytes of codes, of which so many are there.
    static Z read_codes(const uint8_t* from, int64_t rest) {
        return _mm512_maskz_loadu_epi8(rest >= 64 ? ~0ull : rest <= 0 ? 0 : (1ull << rest) - 1, from);
    }

    // Up to 64 fields from a byte on, and behind them whatever the last byte has, then zeros.
    struct Fields {
#ifdef FXQUANT_BYTES
        // A word gets the bytes of 8 fields, and a byte of the result is any 8 bits of a word.
        Z places, shifts, mask;
        __mmask64 bytes;

        Fields(int bits, int64_t count) : bytes(_bzhi_u64(~0ull, (count * bits + 7) / 8)) {
            constexpr int64_t EACH_BYTE = 0x0101010101010101, NUMBERS = 0x0706050403020100;
            alignas(64) int64_t first[8];
            for (int i = 0; i < 8; i++) first[i] = EACH_BYTE * bits * i + NUMBERS;
            places = _mm512_load_si512(first), shifts = _mm512_set1_epi64(NUMBERS * bits);
            mask = _mm512_set1_epi8((char)((1 << bits) - 1));
        }

        Z operator()(const uint8_t* from) const { return taken_apart(_mm512_maskz_loadu_epi8(bytes, from)); }

        Z taken_apart(Z line) const {
            const Z words = _mm512_permutexvar_epi8(places, line);
            return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, words), mask);
        }
#else
        int bits;
        int64_t count;

        Fields(int b, int64_t n) : bits(b), count(n) {}

        Z operator()(const uint8_t* from) const {
            uint8_t copy[64 + 64] = {};
            unpack(from, count, bits, copy);
            return _mm512_loadu_si512(copy);
        }
#endif
    };

    // Lines of rows that are read at once, and the columns of one: codes of 4 bits are 64 bytes, others become as many.
    static constexpr int64_t TURNED = 4;
    int64_t line() const { return job.bits == 4 ? 128 : 64; }

    // The words of a panel, from a column on. Lines are turned with the first panel that is in them.
    const Z* words_from(int64_t column, Z flip, Scratch& scratch) const {
        const int64_t place = column % (TURNED * line());
        Z* const turned = (Z*)scratch.words.data;
        if (place == 0) turn_words(column, TURNED, flip, scratch, turned);
        return turned + place / (line() / LANES) * VECTORS;
    }

    // Some lines of 64 rows from a column on as words: 16 of each line, 16 rows in a vector, and their bytes flipped where
    // they are no codes of 4 bits. Of 16 rows all lines are read before others are: of many rows that are a power of two
    // apart, the first-level cache holds few lines. For the same reason no more is asked for than the lines that come next.
    void turn_words(int64_t column, int64_t lines, Z flip, const Scratch& scratch, Z* to) const {
        with_flag(job.bits == 4, [&](auto nibbles) { turn_words<nibbles>(column, lines, flip, scratch, to); });
    }

    template <bool NIBBLES>
    __attribute__((noinline)) void turn_words(int64_t column, int64_t lines, Z flip, const Scratch& scratch, Z* to) const {
        constexpr int64_t LINE = NIBBLES ? 128 : 64;
        for (int v = 0; v < VECTORS; v++)
            for (int64_t i = 0; i < lines; i++) {
                Z words[16];
                const bool more = i + 1 < lines;
                const int64_t next = column + (more ? i + 1 : v + 1 < VECTORS ? 0 : lines) * LINE;
                const int64_t next_byte = NIBBLES ? next / 2 : next * job.bits / 8;
                read_words(scratch, v, column + i * LINE, more ? v : (v + 1) % VECTORS, next_byte, words);
                Z* const own = to + i * 16 * VECTORS + v;
#pragma GCC unroll 16
                for (int w = 0; w < 16; w++) own[w * VECTORS] = NIBBLES ? words[w] : _mm512_xor_si512(words[w], flip);
            }
    }

    // A line of each of 16 rows, the vector v of them, before those of another one from a byte on.
    __attribute__((always_inline))
    void read_words(const Scratch& scratch, int v, int64_t column, int next_v, int64_t next_first, Z (&words)[16]) const {
        const int64_t first = column * job.bits / 8, rest = bytes - first;
        const uint8_t* const* const rows = scratch.codes + v * LANES;
        const uint8_t* const* const next = scratch.codes + next_v * LANES;
        if (job.bits != 4 && job.bits != 8) {
            const int64_t count = std::max<int64_t>(std::min<int64_t>(64, job.columns - column), 0);
            const Fields fields(job.bits, count);
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) {
                words[r] = fields(rows[r] + first);
                __builtin_prefetch(next[r] + next_first, 0, 3);
            }
        } else if (rest >= 64) {
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) {
                words[r] = _mm512_loadu_si512(rows[r] + first);
                __builtin_prefetch(next[r] + next_first, 0, 3);
            }
        } else for (int r = 0; r < LANES; r++) words[r] = read_codes(rows[r] + first, rest);
        transpose(words);
    }

    // The rows to come, from the first byte to the last, a bit at a time: the processor reads ahead only what follows on
    // itself, and waits where it is asked for much at once. So does it while a panel is decoded, and in every turn of
    // rows of x that it is multiplied with.
    struct Ahead {
        static constexpr int ASKS = 16;                   // times in a turn
        static constexpr int PER_VECTOR = ASKS / VECTORS; // and in what is decoded at once

        const uint8_t *const start, *next, *due;
        const int64_t bytes, each; // of a panel, and of a time
        int64_t some = 0, asks = 0; // bytes, whole lines of them, and how often in a turn, where nothing is asked for elsewhere

        // So many times for each panel.
        Ahead(const Task& task, const Scratch& scratch, int64_t columns, int64_t times)
            : Ahead(task, scratch, columns, [&](int64_t all) { return part_of(all, times); }) {}

        // Not while a panel is decoded, and where a turn has so many steps, in as many of them as it takes.
        static Ahead in_turns(const Task& task, const Scratch& scratch, int64_t columns, int64_t turns, int64_t steps) {
            Ahead ahead(task, scratch, columns, [](int64_t) { return 0; });
            const int64_t share = part_of(ahead.bytes, turns);
            ahead.some = part_of(share, 64 * steps) * 64, ahead.asks = part_of(share, ahead.some);
            return ahead;
        }

        void to_panel(int64_t panel) { next = due = start + panel * bytes; }

        void ask(int64_t times = 1) {
            for (due += times * each; next < due; next += 64) __builtin_prefetch(next, 0, LATER);
        }

      private:
        template <class Each>
        Ahead(const Task& task, const Scratch& scratch, int64_t columns, const Each& each_of)
            : start(scratch.codes[0] + task.later * task.job.codes_stride), next(start), due(start),
              bytes(AT_ONCE * columns * task.job.bits / 8), each(each_of(bytes)) {}

        static int64_t part_of(int64_t all, int64_t parts) { return (all + parts - 1) / parts; }
    };

    // What makes bytes of signed integers unsigned.
    Z flip() const { return _mm512_set1_epi8(job.bits == 8 && job.low ? (char)0x80 : 0); }

  private:
    void load_numbers(const Task& task, const Level& level, float* to, Scratch& scratch) const {
        task.numbers(level, blocks, room, to, scratch.bytes.data);
        // Blocks that are not there meet zeros, and must not be NaN.
        for (int64_t i = 0; room > blocks && i < AT_ONCE; i++)
            memset(to + i * room + blocks, 0, (room - blocks) * sizeof(float));
    }

    void by_block(const float* from, float* to) const {
        for (int64_t b = 0; b < blocks; b += LANES)
            for (int64_t i = 0; i < AT_ONCE; i += LANES) {
                const int64_t count = std::min<int64_t>(blocks - b, LANES);
                Z numbers[16];
                for (int r = 0; r < LANES; r++) numbers[r] = (Z)load(from + (i + r) * room + b);
                transpose(numbers);
                for (int64_t j = 0; j < count; j++) store(to + (b + j) * AT_ONCE + i, (F)numbers[j]);
            }
    }
};

} // namespace

#endif
