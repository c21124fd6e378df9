// Products of int8 codes of x with integer codes of a weight, added up as integers. For few rows of x, rows of the weight
// are decoded in registers. For more, 64 rows and 128 columns, a panel, are decoded at a time: the lanes of a vector are
// 16 rows, and have 4 columns each, as `vpdpbusd` takes them, and a panel stays in the first-level cache until it has
// been multiplied with everything.
//
// Where scales end, or after 128 columns, integers become floats: y += scale (sum + (low - zero) sum_x). Rows of y do not
// depend on the number of threads.

#if defined(FXQUANT_AVX512) && defined(__AVX512VNNI__)
#define FXQUANT_CODES

namespace {

// `sum += w x`, of 4 unsigned and signed bytes a lane. As an instruction: of the intrinsic, GCC makes copies of sums, for
// which there are no registers.
inline void add_products(Z& sum, Z w, Z x) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x)); }

struct Codes : Panels {
    static constexpr int FEW = 4; // rows of x at a time, where codes are decoded in registers
    static constexpr int64_t PANEL = 128; // columns

    const int64_t panels;                // of a row
    const int64_t step, steps;           // columns whose sums are scaled together, and how many such there are
    const int64_t groups;                // of a row of x
    const int64_t units;                 // of a row of x: codes, sums by step and by lane, scales
    const bool fit_registers;            // whether lanes of a panel have one scale each, where codes are decoded in them

    // The most rows of x with which codes are decoded in registers, if need be twice; 4 bits of a short row are in a panel
    // sooner than sums of 4 more rows are added up.
    static int64_t most_few(const Product& job) { return job.bits == 8 || job.columns >= 2048 ? 2 * FEW : FEW; }

    static bool reads_in_streams(const Product& job) { return job.slots <= most_few(job) * (job.ids ? job.experts : 1); }

    static int64_t step_of(const Product& job) {
        int64_t step = PANEL;
        const auto fits = [&](int64_t size) { return size >= job.columns || size % step == 0; };
        while (!fits(job.block) || !fits(job.x_group)) step /= 2;
        return step;
    }

    explicit Codes(const Product& j)
        : Panels(j), panels((j.columns + PANEL - 1) / PANEL), step(step_of(j)), steps(panels * PANEL / step),
          groups((j.columns + j.x_group - 1) / j.x_group),
          units((panels * PANEL / 4 + steps + panels * 2 * LANES + groups + LANES - 1) / LANES),
          fit_registers(groups == 1 && (j.bits == 4 || j.bits == 8) &&
                        (j.block >= j.columns || j.block % PANEL == 0 || PANEL % j.block == 0)) {}

    const int32_t* sums_of(const float* x) const { return (const int32_t*)x + panels * PANEL / 4; }
    const int32_t* lane_sums_of(const float* x) const { return sums_of(x) + steps; } // of both halves of a panel
    const float* scales_of(const float* x) const { return (const float*)lane_sums_of(x) + panels * 2 * LANES; }

    // A row of x: its codes, in the order of the panel, their sums, and its scales.
    void spread(int64_t row, float* to) const {
        int8_t* const codes = (int8_t*)to;
        memset(codes, 0, panels * PANEL);
        float* const scales = (float*)scales_of(to);
        for (int64_t g = 0; g < groups; g++) {
            const int64_t first = g * job.x_group, count = std::min(job.x_group, job.columns - first);
            if (job.x_codes == 1) {
                memcpy(codes + first, (const int8_t*)job.x + row * job.x_stride + first, count);
                scales[g] = job.x_scales[row * job.x_scales_stride + (job.x_scales_stride ? g : 0)];
            } else scales[g] = quantize(row * job.x_stride + first, count, codes + first);
        }
        int32_t* const sums = (int32_t*)to + panels * PANEL / 4;
        for (int64_t s = 0; s < steps; s++) {
            int32_t sum = 0;
            for (int64_t i = 0; i < step; i++) sum += codes[s * step + i];
            sums[s] = sum;
        }
        if (job.bits == 4) // even columns of a panel, then odd ones, as they come out of bytes
            for (int64_t i = 0; i < panels * PANEL; i += PANEL) {
                const Z a = _mm512_loadu_si512(codes + i), b = _mm512_loadu_si512(codes + i + 64);
                const auto joined = [](__m256i low, __m256i high) {
                    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
                };
                const auto odd = [](Z v) { return _mm512_cvtepi16_epi8(_mm512_srli_epi16(v, 8)); };
                _mm512_storeu_si512(codes + i, joined(_mm512_cvtepi16_epi8(a), _mm512_cvtepi16_epi8(b)));
                _mm512_storeu_si512(codes + i + 64, joined(odd(a), odd(b)));
            }
        int32_t* const lanes = (int32_t*)lane_sums_of(to);
        for (int64_t i = 0; i < 2 * panels; i++) {
            const Z sum = _mm512_dpbusd_epi32(Z{}, _mm512_set1_epi8(1), _mm512_loadu_si512(codes + i * 64));
            _mm512_storeu_si512(lanes + i * LANES, sum);
        }
    }

    // Codes of some columns of x, and their scale, as `fxquant.activation_codecs.quantize_activation` makes them.
    float quantize(int64_t at, int64_t count, int8_t* codes) const {
        float scale;
        if (job.x_codes == 3) scale = std::max(job.x_scales[0], 0x1p-126f);
        else {
            F top{};
            bool nan = false;
            for (int64_t i = 0; i < count; i += LANES) {
                const __m512 v = (__m512)floats(job.x, job.x_type, at + i, std::min<int64_t>(count - i, LANES));
                nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0;
                top = most(top, (F)_mm512_abs_ps(v));
            }
            const float largest = _mm512_reduce_max_ps((__m512)top);
            scale = nan ? NAN : std::max(largest / 127.0f, 0x1p-126f);
        }
        for (int64_t i = 0; i < count; i += LANES) {
            const int64_t n = std::min<int64_t>(count - i, LANES);
            const __m512 t = (__m512)(floats(job.x, job.x_type, at + i, n) / all(scale));
            const __mmask16 numbers = _mm512_cmp_ps_mask(t, t, _CMP_ORD_Q);
            const __m512 held = _mm512_max_ps(_mm512_min_ps(t, _mm512_set1_ps(127)), _mm512_set1_ps(-127));
            const Z whole = _mm512_maskz_cvtps_epi32(numbers, held);
            _mm_mask_storeu_epi8(codes + i, (1u << n) - 1, _mm512_cvtepi32_epi8(whole));
        }
        return scale;
    }

    void run(const Task& task, Scratch& scratch) const {
        load_numbers(task, scratch);
        if (task.count <= most_few(job) && fit_registers) {
            const int64_t turns = (task.count + FEW - 1) / FEW;
            for (int64_t turn = 0; turn < turns; turn++) {
                const int64_t first = turn * task.count / turns, next = (turn + 1) * task.count / turns;
                with_constant<FEW>(next - first, [&](auto tokens) {
                    if (job.bits == 4) few<tokens, true>(task, first, scratch);
                    else few<tokens, false>(task, first, scratch);
                });
            }
            return;
        }
        by_block(scratch);
        for (int64_t from = 0; from < task.count; from += BATCH)
            with_flag(job.bits == 4, [&](auto nibbles) {
                batch<nibbles>(task, from, std::min(task.count - from, BATCH), scratch);
            });
    }

    Z flip() const { return _mm512_set1_epi8(job.bits == 8 && job.low ? (char)0x80 : 0); }

    template <int M, bool NIBBLES> void few(const Task& task, int64_t first, const Scratch& scratch) const {
        const float* xs[M];
        float found[M][AT_ONCE];
        for (int m = 0; m < M; m++) xs[m] = task.x_row(first + m);
        for (int64_t row = 0; row < task.each; row++) {
            F sums[ROWS][M];
            const float *const scales = scratch.scales.data + row * room, *const offsets = scratch.offsets.data + row * room;
            with_flag(job.zero, [&](auto affine) { fused<M, NIBBLES, affine>(task, row, xs, scales, offsets, sums); });
            for (int m = 0; m < M; m++) {
                F of_rows[ROWS];
                for (int r = 0; r < ROWS; r++) of_rows[r] = sums[r][m];
                sum_rows(of_rows, found[m] + row, EACH);
            }
        }
        for (int m = 0; m < M; m++) {
            const float scale = *scales_of(xs[m]);
            for (float& y : found[m]) y *= scale;
            task.put(first + m, found[m]);
        }
    }

    // Few rows of x with ROWS of the weight, one of each stream.
    template <int M, bool NIBBLES, bool AFFINE>
    __attribute__((noinline)) void fused(const Task& task, int64_t row, const float* const* xs, const float* scales,
                                         const float* offsets, F (&sums)[ROWS][M]) const {
        constexpr int64_t BYTES = NIBBLES ? PANEL / 2 : PANEL;
        const uint8_t* from[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            from[r] = task.codes(row + r * EACH);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) sums[r][m] = F{};
        }
        const Z low = _mm512_set1_epi8(15), flip = this->flip(), smallest = _mm512_set1_epi32(job.low);
        const int64_t per = std::max<int64_t>(PANEL / job.block, 1);                    // blocks of a panel
        const U lanes = (as<U>(lane_numbers()) * (uint32_t)(NIBBLES ? 8 : 4)) / (uint32_t)std::min(job.block, PANEL);
        for (int64_t panel = 0; panel < panels; panel++) {
            const int64_t at = panel * BYTES, block = panel * PANEL / job.block;
            const auto of_lanes = [&](int m, int half) { // sums of x
                return _mm512_loadu_si512(lane_sums_of(xs[m]) + (panel * 2 + half) * LANES);
            };
            const bool apart = !NIBBLES && per > 1; // each half has blocks of its own
            Z starts[M], other_starts[M];
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const Z one = of_lanes(m, 0), two = of_lanes(m, 1);
                starts[m] = _mm512_mullo_epi32(apart ? one : _mm512_add_epi32(one, two), smallest);
                if (!NIBBLES) other_starts[m] = _mm512_mullo_epi32(two, smallest);
            }
            const auto product = [&](auto whole) __attribute__((always_inline)) {
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    Z a, b;
#pragma GCC unroll 2
                    for (int64_t i = 0; i < BYTES; i += 64) __builtin_prefetch(from[r] + NEAR + at + i, 0, 3);
                    const auto part = [&](int64_t i) {
                        return whole ? _mm512_loadu_si512(from[r] + at + i) : read_codes(from[r] + at + i, bytes - at - i);
                    };
                    if (NIBBLES) {
                        const Z codes = part(0);
                        a = _mm512_and_si512(codes, low), b = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
                    } else a = _mm512_xor_si512(part(0), flip), b = _mm512_xor_si512(part(64), flip);
                    // Of a half of the panel, or of all of it: what the lanes have of scales, zeros and biases.
                    const auto number = [&](const float* numbers, int half) {
                        const float* const first = numbers + r * EACH * room + block;
                        return per == 1 ? all(*first) : look_up_low(load(first), lanes + (uint32_t)(half * per / 2));
                    };
                    const F scale[2] = {number(scales, 0), apart ? number(scales, 1) : F{}};
                    F offset[2] = {};
                    if (AFFINE) offset[0] = number(offsets, 0), offset[1] = apart ? number(offsets, 1) : F{};
                    const auto add = [&](int m, Z sum, int half) __attribute__((always_inline)) {
                        F value = (F)_mm512_cvtepi32_ps(sum), codes{};
                        if (AFFINE) {
                            const Z mine = of_lanes(m, half);
                            codes = (F)_mm512_cvtepi32_ps(apart ? mine : _mm512_add_epi32(mine, of_lanes(m, 1)));
                        }
                        if (AFFINE && job.zero == 1) value = negative_multiply_add(offset[half], codes, value);
                        sums[r][m] = multiply_add(value, scale[half], sums[r][m]);
                        if (AFFINE && job.zero == 2) sums[r][m] = multiply_add(offset[half], codes, sums[r][m]);
                    };
#pragma GCC unroll 8
                    for (int m = 0; m < M; m++) {
                        const Z* const x = (const Z*)xs[m] + 2 * panel;
                        Z sum = starts[m];
                        add_products(sum, a, x[0]);
                        if (apart) {
                            Z other = other_starts[m];
                            add_products(other, b, x[1]);
                            add(m, sum, 0), add(m, other, 1);
                        } else {
                            add_products(sum, b, x[1]);
                            add(m, sum, 0);
                        }
                    }
                }
            };
            if (at + BYTES <= bytes) product(std::true_type{});
            else product(std::false_type{});
        }
    }

    template <bool NIBBLES> void batch(const Task& task, int64_t from, int64_t count, Scratch& scratch) const {
        const int64_t turns = (count + TOKENS - 1) / TOKENS;
        const float* xs[BATCH];
        for (int64_t i = 0; i < count; i++) xs[i] = task.x_row(from + i);
        memset(scratch.totals.data, 0, count * AT_ONCE * sizeof(float));
        for (int64_t panel = 0; panel < panels; panel++) {
            decode(task, panel, scratch.panel.data);
            for (int64_t turn = 0; turn < turns; turn++) {
                const int64_t a = turn * count / turns, b = (turn + 1) * count / turns;
                with_constant<TOKENS>(b - a, [&](auto tokens) { multiply<tokens, NIBBLES>(panel, xs + a, a, scratch); });
            }
        }
        for (int64_t i = 0; i < count; i++) {
            float* const total = scratch.totals.data + i * AT_ONCE;
            const float scale = groups == 1 ? *scales_of(xs[i]) : 1.0f;
            for (int64_t r = 0; groups == 1 && r < AT_ONCE; r++) total[r] *= scale;
            task.put(from + i, total);
        }
    }

    // Some rows of x with a panel, added to what there is of them.
    template <int T, bool NIBBLES>
    __attribute__((noinline)) void multiply(int64_t panel, const float* const* xs, int64_t token,
                                            Scratch& scratch) const {
        const Z* weights = (const Z*)scratch.panel.data;
        const int64_t per = PANEL / step;
        for (int64_t s = panel * per; s < (panel + 1) * per; s++) {
            const int32_t* x[T];
            Z sums[T][VECTORS];
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                x[t] = (const int32_t*)xs[t] + (NIBBLES ? panel * PANEL / 8 + s * (step / 8) : s * (step / 4));
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) sums[t][v] = _mm512_set1_epi32(sums_of(xs[t])[s] * job.low);
            }
            for (int64_t i = 0; i < step / 8; i++, weights += 2 * VECTORS) {
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    Z w[VECTORS];
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; v++) w[v] = weights[half * VECTORS + v];
#pragma GCC unroll 8
                    for (int t = 0; t < T; t++) {
                        const Z own = _mm512_set1_epi32(x[t][NIBBLES ? i + half * (PANEL / 8) : 2 * i + half]);
#pragma GCC unroll 4
                        for (int v = 0; v < VECTORS; v++) add_products(sums[t][v], w[v], own);
                    }
                }
            }
            const int64_t block = std::min(s * step / job.block, blocks - 1) * AT_ONCE;
            const int64_t group = std::min(s * step / job.x_group, groups - 1);
            const float* const scales = scratch.scales_by_block.data + block;
            const bool plain = job.zero == 0 && groups == 1;
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                float* const totals = scratch.totals.data + (token + t) * AT_ONCE;
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) {
                    const F sum = (F)_mm512_cvtepi32_ps(sums[t][v]), total = load(totals + v * LANES);
                    if (plain) store(totals + v * LANES, multiply_add(sum, load(scales + v * LANES), total));
                    else {
                        const F all_of_it = scaled(sum, block + v * LANES, sums_of(xs[t])[s], scratch);
                        const float own = groups == 1 ? 1.0f : scales_of(xs[t])[group];
                        store(totals + v * LANES, multiply_add(all_of_it, all(own), total));
                    }
                }
            }
        }
    }

    // A sum of products, and what zeros or biases add to it: they meet the sum of the codes of x.
    F scaled(F sum, int64_t at, int32_t codes, const Scratch& scratch) const {
        const F scales = load(scratch.scales_by_block.data + at);
        if (job.zero == 0) return sum * scales;
        const F offset = load(scratch.offsets_by_block.data + at), of_x = all((float)codes);
        return job.zero == 1 ? negative_multiply_add(offset, of_x, sum) * scales : multiply_add(offset, of_x, sum * scales);
    }

    // Rows of a weight in a panel: of every 4 columns, or every other of 8 columns of 4 bits, 4 vectors of 16 rows.
    void decode(const Task& task, int64_t panel, uint8_t* to) const {
        const Z low = _mm512_set1_epi8(15), flip = this->flip();
        for (int v = 0; v < VECTORS; v++)
            for (int half = 0; half < (job.bits == 4 ? 1 : 2); half++) {
                Z words[16];
                read_words(task, v, panel * PANEL + half * 64, words);
                Z* const at = (Z*)to + v + half * 16 * VECTORS;
                for (int i = 0; i < 16; i++)
                    if (job.bits == 4) {
                        at[2 * i * VECTORS] = _mm512_and_si512(words[i], low);
                        at[(2 * i + 1) * VECTORS] = _mm512_and_si512(_mm512_srli_epi32(words[i], 4), low);
                    } else at[i * VECTORS] = _mm512_xor_si512(words[i], flip);
            }
    }
};

} // namespace

#endif
