// Products of bytes of x with integer codes of a weight, added up as integers. Where scales end, or after 128 columns,
// integers become floats: y += scale (sum + (low - zero) sum_x).
//
// 64 rows and 128 columns of the weight, a panel, are decoded at a time: the lanes of a vector are 16 rows, and have 4
// columns each, as `vpdpbusd` takes them, and a panel stays in the first-level cache until it has been multiplied with
// everything. With few rows of int8 codes that takes longer than the products. Rows of the weight are then decoded in
// registers: a vector has 16 bytes of each of 4 rows, and the 4 lanes of a row are added up before they become floats.
//
// Either way rows of y are the same whatever other rows there are, and however many threads.

#ifdef FXQUANT_CODES

namespace {

// `sum += w x`, of 4 unsigned and signed bytes a lane. As an instruction: of the intrinsic, GCC makes copies of sums, for
// which there are no registers.
inline void add_products(Z& sum, Z w, Z x) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x)); }

// Every 4 lanes: of each vector, the sum of its 4 lanes.
inline Z add_lanes(Z a, Z b, Z c, Z d) {
    const Z ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const Z cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// The first 16 bytes of each of 4 vectors, then the second, and so on.
inline void by_piece(const Z* v, Z* to) {
    const Z a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
    const Z c = _mm512_shuffle_i32x4(v[0], v[1], 0xee), d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
    to[0] = _mm512_shuffle_i32x4(a, b, 0x88), to[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
    to[2] = _mm512_shuffle_i32x4(c, d, 0x88), to[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

// 16 bytes, 4 times.
inline Z repeated(const void* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }

// A number of each of 4 rows, 4 times.
inline F by_row(const float* from, int64_t apart) {
    __m512 v = _mm512_set1_ps(*from);
    v = _mm512_mask_broadcastss_ps(v, 0x00f0, _mm_load_ss(from + apart));
    v = _mm512_mask_broadcastss_ps(v, 0x0f00, _mm_load_ss(from + 2 * apart));
    return (F)_mm512_mask_broadcastss_ps(v, 0xf000, _mm_load_ss(from + 3 * apart));
}

// Numbers of up to 4 rows of x, one behind the other, and again and again.
template <int N, class Number> inline F by_token(const Number& number) {
    __m512 v = _mm512_set1_ps(number(0));
    if (N > 1) v = _mm512_mask_broadcastss_ps(v, 0x2222, _mm_set_ss(number(1)));
    if (N > 2) v = _mm512_mask_broadcastss_ps(v, 0x4444, _mm_set_ss(number(2)));
    if (N > 3) v = _mm512_mask_broadcastss_ps(v, 0x8888, _mm_set_ss(number(3)));
    return (F)v;
}

// `total` and the sum of a step times its scales; the one of x is `own`, and comes later where a row has one. Zeros or
// biases meet the sum of x.
template <bool AFFINE>
inline F add_sum(F total, F sum, F scale, F offset, F of_x, F own, int zero, bool one_scale) {
    if (AFFINE) {
        sum = zero == 1 ? negative_multiply_add(offset, of_x, sum) * scale : multiply_add(offset, of_x, sum * scale);
        return one_scale ? total + sum : multiply_add(sum, own, total);
    }
    return multiply_add(one_scale ? sum : sum * own, scale, total);
}

template <int DIGITS> struct Codes : Panels {
    using Step = typename Inputs<DIGITS>::Step;
    static constexpr int64_t PANEL = Inputs<DIGITS>::PANEL;
    static constexpr int FEW = 8;                // the most rows of x with which codes are decoded in registers
    // The lowest of several digits is 0 in most columns of bfloat16, whose 8 bits are in the others unless another float is
    // more than 128 times as large. It is multiplied apart, and only where a word of four columns has any.
    static constexpr int FIRST = DIGITS > 1 ? 1 : 0, MANY = DIGITS - FIRST; // digits that are multiplied in every column
    static constexpr int TURN = TOKENS / MANY; // rows of x that are multiplied with a panel at a time

    const Inputs<DIGITS> inputs;
    const int64_t units;
    const bool one_scale; // of a row of x, with which it is multiplied at the end

    static bool in_registers(const Product& job) {
        return DIGITS == 1 && (job.bits == 4 || job.bits == 8) && Inputs<DIGITS>::step_of(job) >= 32;
    }

    static bool reads_in_streams(const Product& job) {
        return in_registers(job) && job.slots <= FEW * (job.ids ? job.experts : 1);
    }

    explicit Codes(const Product& j)
        : Panels(j), inputs(j), units(inputs.units), one_scale(DIGITS == 1 && j.x_group >= j.columns) {}

    bool spread(int64_t row, float* to) const { return inputs.spread(row, to); }

    void run(const Task& task, Scratch& scratch) const {
        load_numbers(task, scratch);
        if constexpr (DIGITS == 1)
            if (task.count <= FEW && in_registers(job))
                return with_constant<FEW>(task.count, [&](auto tokens) {
                    if (job.bits == 4) few<tokens, true>(task, scratch);
                    else few<tokens, false>(task, scratch);
                });
        by_block(scratch);
        for (int64_t from = 0; from < task.count; from += BATCH)
            with_flag(job.bits == 4, [&](auto nibbles) {
                batch<nibbles>(task, from, std::min(task.count - from, BATCH), scratch);
            });
    }

    // What sums of digits stand for.
    static F value(const Z* sums) {
        if constexpr (DIGITS == 1) return (F)_mm512_cvtepi32_ps(*sums);
        else {
            static_assert(DIGITS == 3);
            const Z low = _mm512_add_epi32(sums[0], _mm512_slli_epi32(sums[1], 8));
            return multiply_add((F)_mm512_cvtepi32_ps(sums[2]), all(65536), (F)_mm512_cvtepi32_ps(low));
        }
    }

    // What there is and a step's sums. Whole numbers go on as they are, and meet scales when a row ends.
    template <bool AFFINE> F added(F total, const Z* sums, F scale, F offset, F of_x, F own) const {
        if (!AFFINE && inputs.whole) return (F)_mm512_add_epi32((Z)total, *sums);
        return add_sum<AFFINE>(total, value(sums), scale, offset, of_x, own, job.zero, DIGITS == 1 && one_scale);
    }

    // A total with the scales that it has not met. That of the weight comes first, since floats of any size are in x.
    float last(float total, const float* x, float scale) const {
        const float own = one_scale ? inputs.steps(x, 0)->scale : 1;
        return inputs.whole ? as<int32_t>(total) * scale * own : total * own;
    }

    // Sets of 4 rows of the weight that are multiplied at once. With two, what is read of x serves 8 rows.
    static constexpr int sets(int m) { return m > 3 ? 2 : 1; }

    template <int M, bool NIBBLES> void few(const Task& task, const Scratch& scratch) const {
        constexpr int SETS = sets(M);
        const float* xs[M];
        float found[M][AT_ONCE];
        for (int m = 0; m < M; m++) xs[m] = task.x_row(m);
        for (int64_t row = 0; row < std::min(task.each, EACH / SETS); row++) {
            F totals[(M + 3) / 4][SETS];
            fused<M, NIBBLES>(row, xs, scratch, totals);
            for (int m = 0; m < M; m++)
                for (int i = 0; i < SETS; i++)
                    for (int r = 0; r < ROWS; r++)
                        found[m][row + i * EACH / SETS + r * EACH] = totals[m / 4][i][4 * r + m % 4];
        }
        for (int m = 0; m < M; m++) {
            for (int64_t i = 0; i < AT_ONCE; i++) found[m][i] = last(found[m][i], xs[m], scratch.scales.data[i * room]);
            task.put(m, found[m]);
        }
    }

    // Few rows of x with one or two rows of each stream.
    template <int M, bool NIBBLES>
    __attribute__((noinline)) void fused(int64_t row, const float* const* xs, const Scratch& scratch,
                                         F (&found)[(M + 3) / 4][sets(M)]) const {
        static_assert(ROWS == 4 && DIGITS == 1);
        constexpr int SETS = sets(M);
        constexpr int HALVES = NIBBLES ? 1 : 2, PIECES = 4 * HALVES; // of a panel: 64 bytes of each row, and 16
        const uint8_t* volatile from[SETS][ROWS]; // in memory, as there are too many of them
        const int8_t* x[M];
        F totals[(M + 3) / 4][SETS] = {};
        for (int m = 0; m < M; m++) x[m] = inputs.digits(xs[m], 0);
        for (int i = 0; i < SETS; i++)
            for (int r = 0; r < ROWS; r++) from[i][r] = scratch.codes[row + i * EACH / SETS + r * EACH];
        const Z low = _mm512_set1_epi8(15), flip = this->flip();
        const int64_t pieces = PIECES / inputs.per; // of a step
        const float *scales = scratch.scales.data + row * room, *offsets = scratch.offsets.data + row * room;
        int64_t column = 0, end = job.block; // of the block that they are of
        for (int64_t at = 0; at < bytes; at += HALVES * 64) {
            Z words[SETS][PIECES];
            const auto read = [&](auto whole) __attribute__((always_inline)) {
#pragma GCC unroll 4
                for (int i = 0; i < SETS * HALVES; i++) {
                    Z rows[ROWS];
#pragma GCC unroll 4
                    for (int r = 0; r < ROWS; r++) {
                        const uint8_t* const p = from[i / HALVES][r] + at + i % HALVES * 64;
                        __builtin_prefetch(p + NEAR, 0, 3);
                        rows[r] = whole ? _mm512_loadu_si512(p) : read_codes(p, bytes - at - i % HALVES * 64);
                    }
                    by_piece(rows, words[i / HALVES] + i % HALVES * 4);
                }
            };
            if (at + HALVES * 64 <= bytes) read(std::true_type{});
            else read(std::false_type{});
            for (int64_t s = 0; s < inputs.per; s++, column += inputs.step) {
                const auto step = [&](int m) -> const Step& { return ((const Step*)(x[m] + PANEL))[s]; };
                Z sums[M][SETS];
#pragma GCC unroll 8
                for (int m = 0; m < M; m++)
                    for (int i = 0; i < SETS; i++) sums[m][i] = repeated(step(m).starts[0]);
#pragma GCC unroll 1
                for (int64_t piece = s * pieces; piece < (s + 1) * pieces; piece++) {
                    const auto multiply = [&](auto&& codes, int64_t at) __attribute__((always_inline)) {
                        Z w[SETS];
#pragma GCC unroll 2
                        for (int i = 0; i < SETS; i++) w[i] = codes(words[i][piece]);
#pragma GCC unroll 8
                        for (int m = 0; m < M; m++) {
                            const Z own = repeated(x[m] + piece * 16 + at);
#pragma GCC unroll 2
                            for (int i = 0; i < SETS; i++) add_products(sums[m][i], w[i], own);
                        }
                    };
                    if (NIBBLES) {
                        multiply([&](Z v) { return _mm512_and_si512(v, low); }, 0);
                        multiply([&](Z v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), low); }, 64);
                    } else multiply([&](Z v) { return _mm512_xor_si512(v, flip); }, 0);
                }
                for (; column >= end; end += job.block) scales++, offsets++;
                const auto finish = [&](auto affine) __attribute__((always_inline)) {
#pragma GCC unroll 2
                    for (int i = 0; i < SETS; i++) {
                        const F scale = by_row(scales + i * EACH / SETS * room, EACH * room);
                        const F offset = affine ? by_row(offsets + i * EACH / SETS * room, EACH * room) : F{};
                        const auto add = [&](auto from) __attribute__((always_inline)) {
                            constexpr int FROM = from, N = M - FROM < 4 ? M - FROM : 4;
                            const auto lanes = [&](int m) { return sums[FROM + (m < N ? m : 0)][i]; };
                            const Z sum = add_lanes(lanes(0), lanes(1), lanes(2), lanes(3));
                            F of_x{}, own{};
                            if (affine) of_x = by_token<N>([&](int m) { return step(FROM + m).total; });
                            if (!one_scale) own = by_token<N>([&](int m) { return step(FROM + m).scale; });
                            F& total = totals[FROM / 4][i];
                            total = added<affine>(total, &sum, scale, offset, of_x, own);
                        };
                        add(std::integral_constant<int, 0>{});
                        if constexpr (M > 4) add(std::integral_constant<int, 4>{});
                    }
                };
                if (job.zero) finish(std::true_type{});
                else finish(std::false_type{});
            }
            for (int m = 0; m < M; m++) x[m] += inputs.stride;
        }
        memcpy(found, totals, sizeof found);
    }

    template <bool NIBBLES> void batch(const Task& task, int64_t from, int64_t count, Scratch& scratch) const {
        const int64_t turns = (count + TURN - 1) / TURN;
        const float* xs[BATCH];
        for (int64_t i = 0; i < count; i++) xs[i] = task.x_row(from + i);
        memset(scratch.totals.data, 0, count * AT_ONCE * sizeof(float));
        Ahead ahead(task, scratch, PANEL, turns * Ahead::ASKS);
        for (int64_t panel = 0; panel < inputs.panels; panel++) {
            ahead.to_panel(panel);
            const Z* weights = words_from(panel * PANEL, flip(), scratch);
            if (NIBBLES) weights = taken_apart(weights, (Z*)scratch.panel.data);
            for (int64_t turn = 0; turn < turns; turn++) {
                const int64_t a = turn * count / turns, b = (turn + 1) * count / turns;
                with_constant<TURN>(b - a, [&](auto tokens) { multiply<tokens, NIBBLES>(panel, weights, xs + a, a, scratch, ahead); });
            }
        }
        for (int64_t i = 0; i < count; i++) {
            float* const total = scratch.totals.data + i * AT_ONCE;
            for (int64_t r = 0; r < AT_ONCE; r++) total[r] = last(total[r], xs[i], scratch.scales_by_block.data[r]);
            task.put(from + i, total);
        }
    }

    // Of a panel of words of 4 bits, every other of 8 columns as bytes, then those between.
    static const Z* taken_apart(const Z* words, Z* to) {
        const Z low = _mm512_set1_epi8(15);
        for (int i = 0; i < 16; i++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                const Z word = words[i * VECTORS + v];
                to[2 * i * VECTORS + v] = _mm512_and_si512(word, low);
                to[(2 * i + 1) * VECTORS + v] = _mm512_and_si512(_mm512_srli_epi32(word, 4), low);
            }
        return to;
    }

    // Some rows of x with a panel, added to what there is of them.
    template <int T, bool NIBBLES>
    __attribute__((noinline)) void multiply(int64_t panel, const Z* weights, const float* const* xs, int64_t token,
                                            Scratch& scratch, Ahead& ahead) const {
        constexpr int PLANES = T * MANY;
        const Z* const whole = weights; // panel
        for (int64_t s = 0; s < inputs.per; s++) {
            const int32_t* x[T];
            Z sums[PLANES][VECTORS];
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) x[t] = (const int32_t*)inputs.digits(xs[t], panel) + s * inputs.step / (NIBBLES ? 8 : 4);
#pragma GCC unroll 8
            for (int p = 0; p < PLANES; p++) {
                const Z start = _mm512_set1_epi32(inputs.steps(xs[p / MANY], panel)[s].starts[FIRST + p % MANY][0]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) sums[p][v] = start;
            }
            static_assert(PANEL / 8 == Ahead::ASKS);
            for (int64_t i = 0; i < inputs.step / 8; i++, weights += 2 * VECTORS) {
                ahead.ask();
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    Z w[VECTORS];
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; v++) w[v] = weights[half * VECTORS + v];
#pragma GCC unroll 8
                    for (int p = 0; p < PLANES; p++) {
                        const int32_t* const digit = x[p / MANY] + (FIRST + p % MANY) * (PANEL / 4);
                        const Z own = _mm512_set1_epi32(digit[NIBBLES ? i + half * (PANEL / 8) : 2 * i + half]);
#pragma GCC unroll 4
                        for (int v = 0; v < VECTORS; v++) add_products(sums[p][v], w[v], own);
                    }
                }
            }
            const int64_t block = std::min((panel * PANEL + s * inputs.step) / job.block, blocks - 1) * AT_ONCE;
            const float* const scales = scratch.scales_by_block.data + block;
            const float* const offsets = scratch.offsets_by_block.data + block;
            const auto finish = [&](auto affine) __attribute__((always_inline)) {
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    const Step& mine = inputs.steps(xs[t], panel)[s];
                    const F of_x = all(mine.total), own = all(mine.scale);
                    Z lowest[VECTORS];
                    if (FIRST) add_lowest<NIBBLES>(panel, whole, xs[t], mine, lowest);
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; v++) {
                        Z digits[DIGITS] = {lowest[v]};
#pragma GCC unroll 2
                        for (int d = 0; d < MANY; d++) digits[FIRST + d] = sums[t * MANY + d][v];
                        float* const to = scratch.totals.data + (token + t) * AT_ONCE + v * LANES;
                        const F scale = load(scales + v * LANES), offset = affine ? load(offsets + v * LANES) : F{};
                        store(to, added<affine>(load(to), digits, scale, offset, of_x, own));
                    }
                }
            };
            if (job.zero) finish(std::true_type{});
            else finish(std::false_type{});
        }
    }

    // Sums of the lowest digits of a step.
    template <bool NIBBLES>
    __attribute__((always_inline)) void add_lowest(int64_t panel, const Z* weights, const float* x, const Step& step,
                                                   Z (&sums)[VECTORS]) const {
        const int32_t* const digits = (const int32_t*)inputs.digits(x, panel);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sums[v] = _mm512_set1_epi32(step.starts[0][0]);
        for (uint32_t words = step.lowest; words; words &= words - 1) {
            const int word = __builtin_ctz(words), place = NIBBLES ? word % 16 * 2 + word / 16 : word;
            const Z own = _mm512_set1_epi32(digits[word]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) add_products(sums[v], weights[place * VECTORS + v], own);
        }
    }
};

} // namespace

#endif
