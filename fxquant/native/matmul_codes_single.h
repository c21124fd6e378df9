// One row of int8 codes with integers of 4 bits. Vectors of the weight are multiplied as they lie in memory, 128 columns of
// one row each, and the lanes of 16 sums are added up together, to those of 4 steps of 4 rows. With more rows of x that
// takes longer than to bring 4 rows into a vector before, as `matmul_codes.h` does it. Bits are the same.

#ifdef FXQUANT_CODES

namespace {

struct SingleCodes : Codes<1> {
    static constexpr int STEPS = 4; // of ROWS rows at once

    using Codes<1>::Codes;

    void run(const Task& task, Scratch& scratch) const {
        if (task.count > 1 || !takes()) return Codes<1>::run(task, scratch);
        load_numbers(task, scratch);
        with_flag(job.zero, [&](auto affine) {
            if (inputs.per == 1) multiply<1, affine>(task, scratch);
            else if (inputs.per == 2) multiply<2, affine>(task, scratch);
            else multiply<4, affine>(task, scratch);
        });
    }

  private:
    // With scales of every step, or of a row.
    bool takes() const {
        return job.bits == 4 && in_registers(job) && (job.block == inputs.step || job.block >= job.columns);
    }

    template <int PER, bool AFFINE> void multiply(const Task& task, const Scratch& scratch) const {
        float found[AT_ONCE];
        const float* const x = task.x_row(0);
        for (int64_t row = 0; row < task.each; row++) {
            const F totals = add_up<PER, AFFINE>(row, x, scratch);
            for (int r = 0; r < ROWS; r++) found[row + r * EACH] = totals[STEPS * r];
        }
        for (int64_t i = 0; i < AT_ONCE; i++) found[i] = last(found[i], x, scratch.scales.data[i * room]);
        task.put(0, found);
    }

    // The sums of the lanes that belong to a step: of step s and row r in lane 4 r + s.
    template <int PER> static Z by_step(const Z (&v)[ROWS][STEPS / PER]) {
        const auto halves = [](Z a, Z b) { // of both, quarters 0 and 2 and quarters 1 and 3
            return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
        };
        const auto neighbours = [](Z a, Z b) { // of both, quarters 0 and 1 and quarters 2 and 3
            return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
        };
        if constexpr (PER == 1) {
            const auto row = [&](int r) { return add_lanes(v[r][0], v[r][1], v[r][2], v[r][3]); };
            return neighbours(halves(row(0), row(1)), halves(row(2), row(3)));
        } else if constexpr (PER == 2) {
            const auto rows = [&](int r) { return add_lanes(v[r][0], v[r][1], v[r + 1][0], v[r + 1][1]); };
            const Z place = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
            return _mm512_permutexvar_epi32(place, neighbours(rows(0), rows(2)));
        } else {
            const Z place = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            return _mm512_permutexvar_epi32(place, add_lanes(v[0][0], v[1][0], v[2][0], v[3][0]));
        }
    }

    // Numbers of steps of each row.
    F numbers(const float* from) const {
        const int64_t apart = EACH * room;
        if (job.block >= job.columns) return by_row(from, apart);
        __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(from));
        v = _mm512_insertf32x4(v, _mm_loadu_ps(from + apart), 1);
        v = _mm512_insertf32x4(v, _mm_loadu_ps(from + 2 * apart), 2);
        return (F)_mm512_insertf32x4(v, _mm_loadu_ps(from + 3 * apart), 3);
    }

    // Of every row, what a step has, four times.
    template <int S> static Z of_step(Z v) { return _mm512_shuffle_epi32(v, (_MM_PERM_ENUM)(S * 0x55)); }

    // The row of x with ROWS of the weight, one of each stream; row r of these in the lanes from 4 r on.
    template <int PER, bool AFFINE>
    __attribute__((noinline)) F add_up(int64_t row, const float* spread, const Scratch& scratch) const {
        constexpr int PANELS = STEPS / PER;
        constexpr int64_t BYTES = PANEL / 2;
        const uint8_t* from[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) from[r] = scratch.codes[row + r * EACH];
        const Z low = _mm512_set1_epi8(15);
        const int8_t* x = inputs.digits(spread, 0);
        const float *scales = scratch.scales.data + row * room, *offsets = scratch.offsets.data + row * room;
        F total{};
        const auto steps = [&](int64_t count, auto&& codes) __attribute__((always_inline)) {
            Z sums[ROWS][PANELS];
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) {
                    const int8_t* const own = x + p * inputs.stride;
                    const Z w = codes(from[r], p * BYTES);
                    sums[r][p] = Z{};
                    add_products(sums[r][p], _mm512_and_si512(w, low), _mm512_loadu_si512(own));
                    const Z odd = _mm512_and_si512(_mm512_srli_epi16(w, 4), low);
                    add_products(sums[r][p], odd, _mm512_loadu_si512(own + BYTES));
                }
            const auto step = [&](int s) -> const Step& {
                return ((const Step*)(x + s / PER * inputs.stride + PANEL))[s % PER];
            };
            const F starts = by_token<STEPS>([&](int s) { return as<float>(step(s).starts[0][0]); });
            const Z sum = _mm512_add_epi32(by_step<PER>(sums), (Z)starts);
            const F scale = numbers(scales), offset = AFFINE ? numbers(offsets) : F{};
            const auto add = [&](auto s) __attribute__((always_inline)) {
                const Z mine = of_step<s>(sum);
                const F of_x = all(step(s).total), own = all(step(s).scale);
                total = added<AFFINE>(total, &mine, (F)of_step<s>((Z)scale), (F)of_step<s>((Z)offset), of_x, own);
            };
            add(std::integral_constant<int, 0>{});
            if (count > 1) add(std::integral_constant<int, 1>{});
            if (count > 2) add(std::integral_constant<int, 2>{});
            if (count > 3) add(std::integral_constant<int, 3>{});
        };
        const int64_t all_steps = (job.columns + inputs.step - 1) / inputs.step;
        int64_t done = 0, at = 0;
        for (; at + PANELS * BYTES <= bytes; at += PANELS * BYTES, done += STEPS) {
            steps(STEPS, [&](const uint8_t* codes, int64_t i) __attribute__((always_inline)) {
                __builtin_prefetch(codes + at + i + NEAR, 0, 3);
                return _mm512_loadu_si512(codes + at + i);
            });
            x += PANELS * inputs.stride;
            if (job.block < job.columns) scales += STEPS, offsets += STEPS;
        }
        // Behind a row of x there is room. Digits of columns that are not there meet zeros, and other numbers nothing.
        if (done < all_steps)
            steps(all_steps - done, [&](const uint8_t* codes, int64_t i) { return read_codes(codes + at + i, bytes - at - i); });
        return total;
    }
};

} // namespace

#endif
