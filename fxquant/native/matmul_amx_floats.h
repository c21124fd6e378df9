// Floats of x and any element for matrix units, in pieces: a float32 is the sum of three bfloat16, a float16 of two, and
// so is each value of an element, most of them of one. Products of pieces are exact. What they do not count is smaller than
// 2^-24 of the product or, since values have no more pieces than x, than 2^-16 with float16 and 2^-8 with bfloat16. With
// many rows of bfloat16, weights of up to 4 bits in blocks meet their scales before, and are rounded.

#ifdef FXQUANT_AMX

namespace {

struct AmxFloats : Panels {
    static constexpr int64_t PANEL = 128, CHUNK = 32; // columns; of a tile
    static constexpr bool NARROW = true;              // turns may have 8 rows of x
    static constexpr int MOST = 3;                    // pieces
    static constexpr int MOST_EACH = 4;               // tiles of x that a step has, unless there are more pieces
    static constexpr bool ASKS_FOR_X = false;         // before it is multiplied: with so many it takes longer
    static constexpr int64_t MANY = 32;               // rows of x
    static constexpr int64_t TILE = 1024, CHUNKS = PANEL / CHUNK, PIECE = VECTORS * CHUNKS * TILE; // bytes; of a panel
    static constexpr int64_t ROOM = MOST * PIECE;
    static constexpr int64_t TOGETHER = 2; // panels that are decoded before rows of x meet them, or fewer

    const int64_t turn;         // rows of x that are multiplied with a panel at a time: 8 or 16
    const int64_t panels;       // of a row
    const int64_t fine;         // columns under one scale
    const bool rounded;         // weights are, with their scales
    const int64_t step, per;    // columns whose sums meet a scale, and how many such steps a panel has
    const int x_pieces;         // of a float of x
    const int64_t x_sums;       // bytes of a turn's tiles of a panel, behind which there are sums of steps
    const int64_t stride;       // bytes of a panel of a turn
    const int64_t units;        // of a turn
    static constexpr int KINDS = 3;
    const int kind;             // how sums meet scales: what offsets are
    int pieces = 1;             // of a value of the element
    Z tables[MOST][2];          // of up to 64 values, their pieces
    Z places, shifts;           // bytes that have a field, and where it begins in them

    // For so many rows of x, of one expert, at the most.
    AmxFloats(const Product& j, int64_t rows)
        : Panels(j), turn(rows <= 8 ? 8 : 16), panels((j.columns + PANEL - 1) / PANEL), fine(step_of(j)),
          rounded(rounds(j)), step(rounded ? PANEL : fine), per(PANEL / step),
          x_pieces(j.x_type == 1 ? 1 : j.x_type == 2 ? 2 : 3), x_sums(x_pieces * CHUNKS * turn * 64),
          stride((x_sums + per * turn * 4 + 63) / 64 * 64), units(panels * stride / 64), kind(rounded ? 0 : j.zero) {
        if (j.bits < 8) make_tables();
        uint16_t shift[32];
        uint8_t place[64];
        for (int lane = 0; lane < 32; lane++) {
            const int bit = j.bits * column(lane), first = bit / 8 - lane / 16 * 2 * j.bits;
            place[2 * lane] = (uint8_t)first, place[2 * lane + 1] = (uint8_t)std::min(first + 1, 15);
            shift[lane] = (uint16_t)(j.bits == 4 ? bit % 16 : bit % 8);
        }
        places = _mm512_loadu_si512(place), shifts = _mm512_loadu_si512(shift);
    }

    // With many rows of x it takes longer to bring sums and scales together than to round weights.
    static bool rounds(const Product& job) {
        const bool in_blocks = job.block < job.columns && (job.bits == 4 || (job.bits < 4 && step_of(job) >= CHUNK));
        return job.x_type == 1 && in_blocks && job.slots > MANY * job.experts;
    }

    // Whether sums of a row need nothing before they are whole.
    bool direct() const { return rounded || (blocks == 1 && !job.zero); }

    // With more than two panels, or with three pieces of x, the first-level cache is too small for what they meet.
    int64_t together() const { return direct() && x_pieces < MOST ? TOGETHER : 1; }

    int64_t tile_bytes() const { return std::min(step, CHUNK) * 2; }

    // Of pieces of x and of values: those of which one is too small beside the other do not count.
    int64_t pairs() const {
        int64_t count = 0;
        for (int p = 0; p < x_pieces; p++) count += std::min(pieces, MOST - p);
        return count;
    }

    // `product` with where its tiles begin in a turn's panel and in the first piece of the weight's.
    template <class Each> void each_product(int64_t s, const Each& product) const {
        for (int64_t c = s * step; c < (s + 1) * step; c += CHUNK)
            for (int p = 0; p < x_pieces; p++)
                for (int q = 0; q < pieces && p + q < MOST; q++)
                    product(((p * CHUNKS + c / CHUNK) * 64 + c % CHUNK * 2) * turn, q * PIECE + c / CHUNK * TILE + c % CHUNK * 2);
    }

    template <int SUMS, int W> static void multiply() { add_tile_products<SUMS, W, 4>(); }

    // Of 32, the column of a lane of 16 bits. Fields of 4 bits come from words of 16 bits, all their first fields first.
    int column(int lane) const {
        if (job.bits != 4) return lane;
        const int words = fine < CHUNK ? 4 : 8, first = lane / (4 * words) * 4 * words;
        return first + lane % words * 4 + lane / words % 4;
    }

    void make_tables() {
        const int patterns = std::max(1 << job.bits, LANES);
        float rest[64];
        for (int i = 0; i < 64; i++) rest[i] = job.values[i % patterns];
        for (int p = 0; p < MOST; p++)
            for (int half = 0; half < 2; half++) {
                tables[p][half] = rounded_pair(load(rest + 32 * half), load(rest + 32 * half + LANES));
                uint16_t bits[32];
                _mm512_storeu_si512(bits, tables[p][half]);
                for (int i = 0; i < 32; i++) {
                    float& own = rest[32 * half + i];
                    own -= as<float>((uint32_t)bits[i] << 16);
                    if (own != 0) pieces = std::min(p + 2, x_pieces);
                }
            }
    }

    // The first 16 bfloat16 of 32, and the second.
    static F lower(Z v) { return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(v)), 16); }
    static F upper(Z v) { return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1)), 16); }

    // Up to 16 rows of x as tiles: words of two columns, row by row. False where floats are not the sums of their pieces.
    bool spread(const int64_t* slots, int64_t count, float* to) const {
        uint16_t columns[32];
        for (int lane = 0; lane < 32; lane++) columns[lane] = (uint16_t)column(lane);
        const Z order = _mm512_loadu_si512(columns);
        for (int64_t panel = 0; panel < panels; panel++) {
            uint8_t* const at = (uint8_t*)to + panel * stride;
            bool taken = true;
            with_constant<MOST>(x_pieces, [&](auto pieces) { taken = spread<pieces>(slots, count, panel, order, at); });
            if (!taken) return false;
            float* const sums = (float*)(at + x_sums);
            memset(sums, 0, per * turn * sizeof(float));
            if (!kind) continue;
            for (int64_t i = 0; i < count; i++)
                for (int64_t c = 0; c < PANEL; c += CHUNK) {
                    F v[2];
                    some_of_x(slots[i] / job.picks, panel * PANEL + c, v);
                    for (int half = 0; half < 2; half++) sums[(c + half * LANES) / step * turn + i] += sum(v[half]);
                }
        }
        return true;
    }

    // A panel of them, each float in P pieces.
    template <int P> bool spread(const int64_t* slots, int64_t count, int64_t panel, Z order, uint8_t* to) const {
        Z top[16] = {};
        for (int64_t c = 0; c < PANEL; c += CHUNK) {
            Z words[P][16] = {};
            for (int64_t i = 0; i < count; i++) {
                F v[2] = {};
                Z piece = some_of_x(slots[i] / job.picks, panel * PANEL + c, v);
                // Of numbers as bits, none is larger than one that is no number.
                top[i] = _mm512_max_epu16(top[i], _mm512_and_si512(piece, _mm512_set1_epi16(0x7fff)));
                for (int p = 0;; p++) {
                    words[p][i] = _mm512_permutexvar_epi16(order, piece);
                    if (p + 1 == P) break;
                    v[0] -= lower(piece), v[1] -= upper(piece);
                    piece = rounded_pair(v[0], v[1]);
                }
            }
            for (int p = 0; p < P; p++) {
                transpose(words[p]);
                uint8_t* const tile = to + (p * CHUNKS + c / CHUNK) * 64 * turn;
                for (int i = 0; i < 16; i++) memcpy(tile + i * turn * 4, words[p] + i, turn * 4);
            }
        }
        for (int64_t i = 0; i < count; i++) {
            const Z even = _mm512_slli_epi32(top[i], 16), odd = top[i];
            const uint32_t largest = _mm512_reduce_max_epu32(_mm512_max_epu32(even, odd));
            // Matrix units take what is smaller than 2^-126 for zero: it has to be small beside the largest.
            if (largest >= as<uint32_t>(0x1p100f)) return false;
            if (largest >= 1 << 16 && largest < as<uint32_t>(0x1p-80f)) return false; // below there is another's half
        }
        return true;
    }

    // 32 columns of a row, and what they are in bfloat16.
    Z some_of_x(int64_t row, int64_t column, F (&v)[2]) const {
        const int64_t at = row * job.x_stride + column;
        if (job.x_type == 1 && column + CHUNK <= job.columns) {
            const Z all = _mm512_loadu_si512((const uint16_t*)job.x + at);
            v[0] = lower(all), v[1] = upper(all);
            return all;
        }
        for (int half = 0; half < 2; half++) {
            const int64_t count = std::min<int64_t>(job.columns - column - half * LANES, LANES);
            v[half] = count > 0 ? floats(job.x, job.x_type, at + half * LANES, count) : F{};
        }
        return rounded_pair(v[0], v[1]);
    }

    const float* of_step(const uint8_t* x, int64_t s) const { return (const float*)(x + x_sums) + s * turn; }

    // The total and a step's sums, of a row of the weight and all rows of x of a turn.
    template <int KIND, int TURN>
    static F added(F total, const float* sums, const float* scales, const float* offsets, const float* of_x) {
        const F sum = load(sums), scale = by_row<TURN>(scales);
        if (KIND == 0) return multiply_add(sum, scale, total);
        const F offset = by_row<TURN>(offsets);
        const F all_of_x = TURN == 16 ? load(of_x) : (F)_mm512_broadcast_f32x8(_mm256_loadu_ps(of_x));
        if (KIND == 1) return multiply_add(negative_multiply_add(offset, all_of_x, sum), scale, total);
        return multiply_add(sum, scale, multiply_add(offset, all_of_x, total));
    }

    // A vector's one or two rows of the weight have one of these numbers each, as often as there are rows of x.
    template <int TURN> static F by_row(const float* from) {
        if (TURN == 16) return all(*from);
        return (F)_mm512_mask_broadcastss_ps(_mm512_set1_ps(from[0]), 0xff00, _mm_load_ss(from + 1));
    }

    static F last(F total, float scale, const uint8_t*) { return total * all(scale); }

    // Bytes that are read behind a panel of a row.
    static constexpr int64_t behind(int64_t bits) { return bits == 4 || bits == 8 ? 0 : 16; }

    template <class Scratch, class Function>
    void with_decoder(int64_t panel, const Scratch& scratch, const Function& function) const {
        if (rounded) return with_flag(fine < CHUNK, [&](auto by_16) { function(Weighted<by_16>(*this, panel, scratch)); });
        if (job.bits == 8) {
            if (job.kind == 2) return function(SmallFloats<E4M3>(job.values));
            if (job.kind == 3) return function(SmallFloats<E5M2>(job.values));
            if (job.low) return function(Integers<SIGNED>{});
            return function(Integers<UNSIGNED>{});
        }
        with_constant<MOST>(pieces, [&](auto p) {
            if (job.bits == 6) function(Fields<SIXES, p>(*this));
            else if (job.bits != 4) function(Fields<FEWER, p>(*this));
            else if (fine < CHUNK) function(Fields<FOURS_BY_16, p>(*this));
            else function(Fields<FOURS, p>(*this));
        });
    }

    enum { FOURS, FOURS_BY_16, FEWER, SIXES, E4M3, E5M2, SIGNED, UNSIGNED };

    // Where 32 fields are, each in 16 bits, from some bit on. Of four bits they are where they are read.
    static Z repeated_by_8(const uint8_t* p) {
        return _mm512_inserti64x4(_mm512_set1_epi64(read<int64_t>(p)), _mm256_set1_epi64x(read<int64_t>(p + 8)), 1);
    }
    static Z placed(const uint8_t* p, int64_t bits, Z places) {
        const __m256i second = _mm256_broadcastsi128_si256(read<__m128i>(p + 2 * bits));
        return _mm512_shuffle_epi8(_mm512_inserti64x4(repeated(p), second, 1), places);
    }

    // 32 fields, by the tables of their pieces.
    template <int KIND, int P> struct Fields {
        Z shifts, places, low[P], high[P];
        int64_t bits;

        explicit Fields(const AmxFloats& of) : shifts(of.shifts), places(of.places), bits(of.job.bits) {
            for (int p = 0; p < P; p++) low[p] = of.tables[p][0], high[p] = of.tables[p][1];
        }

        void operator()(const uint8_t* from, uint8_t* to, int64_t) const {
#pragma GCC unroll 4
            for (int64_t c = 0; c < CHUNKS; c++) decode(from + c * 4 * bits, to + c * TILE);
        }

        void decode(const uint8_t* from, uint8_t* to) const {
            const Z words = KIND == FOURS         ? repeated(from)
                            : KIND == FOURS_BY_16 ? repeated_by_8(from)
                                                  : placed(from, bits, places);
            const Z fields = _mm512_srlv_epi16(words, shifts);
#pragma GCC unroll 3
            for (int p = 0; p < P; p++)
                _mm512_store_si512(to + p * PIECE, KIND == SIXES ? _mm512_permutex2var_epi16(low[p], fields, high[p])
                                                                 : _mm512_permutexvar_epi16(fields, low[p]));
        }
    };

    // 32 weights: for every scale, the table of fields times it, rounded.
    template <bool BY_16> struct Weighted {
        Z shifts, places;
        F values;
        const float *scales, *offsets; // of row 0
        int64_t room, bits, zero, block[2 * CHUNKS];

        template <class Scratch>
        Weighted(const AmxFloats& of, int64_t panel, const Scratch& scratch)
            : shifts(of.shifts), places(of.places), values(load(of.job.values)), scales(scratch.scales.data),
              offsets(scratch.offsets.data), room(of.room), bits(of.job.bits), zero(of.job.zero) {
            for (int64_t i = 0; i < 2 * CHUNKS; i++)
                block[i] = std::min((panel * PANEL + i * LANES) / of.job.block, of.blocks - 1);
        }

        __m256i table(int64_t at) const {
            const F scale = all(scales[at]);
            const F found = zero == 0   ? values * scale
                            : zero == 1 ? (values - all(offsets[at])) * scale
                                        : multiply_add(values, scale, all(offsets[at]));
            return (__m256i)_mm512_cvtneps_pbh((__m512)found);
        }

        void operator()(const uint8_t* from, uint8_t* to, int64_t row) const {
            int64_t before = -1;
            Z both{};
            for (int64_t c = 0; c < CHUNKS; c++) {
                const uint8_t* const p = from + c * 4 * bits;
                const int64_t low = block[2 * c], high = block[2 * c + 1];
                if (BY_16 || low != before) {
                    const __m256i first = table(row * room + low), second = BY_16 ? table(row * room + high) : first;
                    both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1), before = low;
                }
                const Z words = BY_16 ? repeated_by_8(p) : bits == 4 ? repeated(p) : placed(p, bits, places);
                Z fields = _mm512_srlv_epi16(words, shifts);
                if (BY_16) { // the second 16 lanes have the second table
                    fields = _mm512_and_si512(fields, _mm512_set1_epi16(15));
                    fields = _mm512_mask_or_epi32(fields, 0xff00, fields, _mm512_set1_epi16(16));
                }
                _mm512_store_si512(to + c * TILE, _mm512_permutexvar_epi16(fields, both));
            }
        }
    };

    // 32 integers of 8 bits.
    template <int KIND> struct Integers {
        static F values(__m128i codes) {
            return (F)_mm512_cvtepi32_ps(KIND == SIGNED ? _mm512_cvtepi8_epi32(codes) : _mm512_cvtepu8_epi32(codes));
        }

        void operator()(const uint8_t* from, uint8_t* to, int64_t) const {
#pragma GCC unroll 4
            for (int64_t c = 0; c < PANEL; c += CHUNK) {
                const F low = values(read<__m128i>(from + c)), high = values(read<__m128i>(from + c + LANES));
                _mm512_store_si512(to + c / CHUNK * TILE, rounded_pair(low, high));
            }
        }
    };

    // 32 float8, as bfloat16 with more exponents; what has none of its own is in a table, by its last 5 bits.
    template <int KIND> struct SmallFloats {
        static constexpr int BITS = KIND == E4M3 ? 3 : 2, FIRST = 1 << BITS, LAST = KIND == E4M3 ? 0x7e : 0x7b;
        static constexpr int BIAS = 127 - (KIND == E4M3 ? 7 : 15);
        Z others;

        explicit SmallFloats(const float* values) {
            float found[32];
            for (int i = 0; i < 32; i++) found[i] = values[i < 16 ? i : 0x60 + i];
            others = rounded_pair(load(found), load(found + LANES));
        }

        void operator()(const uint8_t* from, uint8_t* to, int64_t) const {
            const auto all = [](int bits) { return _mm512_set1_epi16((short)bits); };
#pragma GCC unroll 4
            for (int64_t c = 0; c < PANEL; c += CHUNK) {
                const Z codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(from + c)));
                const Z size = _mm512_and_si512(codes, all(0x7f));
                const __mmask32 other = _mm512_cmpgt_epu16_mask(_mm512_sub_epi16(size, all(FIRST)), all(LAST - FIRST));
                const Z more = _mm512_add_epi16(_mm512_slli_epi16(size, 7 - BITS), all(BIAS << 7));
                const Z found = _mm512_mask_permutexvar_epi16(more, other, size, others);
                const Z sign = _mm512_and_si512(_mm512_slli_epi16(codes, 8), all(0x8000));
                _mm512_store_si512(to + c / CHUNK * TILE, _mm512_or_si512(found, sign));
            }
        }
    };
};

} // namespace

#endif
