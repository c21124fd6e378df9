// Strips: 128 weights of 4 bits in a row, or 64 of others, which are decoded in registers; lane l has the 8 columns from
// 8 l on, or the 4 from 4 l on. A sum has 16 parts, one per lane, each in the order of the strips: other rows of x change
// no bit.

#ifdef FXQUANT_AVX512

#include <algorithm>

namespace {

// The sum of each of ROWS vectors, `apart` from each other: halves are added, then quarters, and so on, as `sum` does it.
inline void sum_rows(const F* v, float* to, int64_t apart) {
    static_assert(ROWS == 4);
    const auto halves = [&](int i) {
        const __m512 a = (__m512)v[i], b = (__m512)v[i + 1];
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    const __m512 a = halves(0), b = halves(2);
    const __m512 c = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    const __m512 d = _mm512_add_ps(c, _mm512_permute_ps(c, 0x4e)), e = _mm512_add_ps(d, _mm512_permute_ps(d, 0xb1));
    for (int i = 0; i < ROWS; i++) to[i * apart] = e[4 * i];
}

// Rows in strips of so many columns.
template <int64_t COLUMNS> struct StripRows {
    static constexpr int64_t WIDTH = COLUMNS, UNITS = WIDTH / LANES;

    const Product& job;
    const int64_t strips, units, bytes, blocks; // of a row; the second of x
    const bool parts;                           // of a strip have scales of their own
    const int64_t per, fold;                    // blocks of a strip; strips whose products are scaled together
    const int64_t room;                         // for numbers of a row

    static bool reads_in_streams(const Product&) { return true; }

    // Whether blocks end with strips, and whether strips do with blocks.
    static bool is_whole(const Product& job) { return job.block >= job.columns || job.block % WIDTH == 0; }
    static bool has_parts(const Product& job) { return WIDTH % job.block == 0; }

    StripRows(const Product& j, int64_t units_of_strip)
        : job(j), strips((j.columns + WIDTH - 1) / WIDTH), units(strips * units_of_strip),
          bytes((j.columns * j.bits + 7) / 8), blocks((j.columns + j.block - 1) / j.block),
          parts(j.block < std::min(j.columns, WIDTH)), per(parts ? WIDTH / j.block : 1),
          fold(j.block >= j.columns ? strips : std::max<int64_t>(j.block / WIDTH, 1)), room(room_of(j, blocks)) {}

    struct Scratch {
        Buffer<float> scales, offsets;
        Buffer<uint8_t> bytes;

        explicit Scratch(int64_t room)
            : scales(AT_ONCE * room + LANES), offsets(AT_ONCE * room + LANES), bytes(EACH * room + 128) {}
    };

    // A strip of a row of x in float32: the first column of every lane, then the second, and so on; zeros behind the last.
    void floats_of(int64_t row, int64_t s, F (&to)[UNITS]) const {
        float natural[WIDTH] = {};
        for (int64_t i = 0; i < WIDTH && s * WIDTH + i < job.columns; i += LANES) {
            const int64_t at = s * WIDTH + i, count = job.columns - at < LANES ? job.columns - at : LANES;
            store(natural + i, floats(job.x, job.x_type, row * job.x_stride + at, count));
        }
        const __m512i columns = _mm512_mullo_epi32((__m512i)lane_numbers(), _mm512_set1_epi32(UNITS));
        for (int j = 0; j < UNITS; j++) to[j] = (F)_mm512_i32gather_ps(columns, natural + j, 4);
    }

    void load_numbers(const Task& task, Scratch& scratch) const {
        const auto load = [&](const Level& level, float* to) {
            task.numbers(level, blocks, room, to, scratch.bytes.data);
            // Columns that are not there have numbers as well, which must not be NaN.
            for (int64_t i = 0; room > blocks && i < AT_ONCE; i++)
                memset(to + i * room + blocks, 0, (room - blocks) * sizeof(float));
        };
        load(job.scales, scratch.scales.data);
        if (job.zero) load(job.offsets, scratch.offsets.data);
    }

    // `function` with the first of up to MOST rows of x, and how many these are, for all of them.
    template <int MOST, class Function> static void in_turns(int64_t count, const Function& function) {
        const int64_t turns = (count + MOST - 1) / MOST;
        for (int64_t turn = 0; turn < turns; turn++) {
            const int64_t first = turn * count / turns, next = (turn + 1) * count / turns;
            with_constant<MOST>(next - first, [&](auto m) { function(first, m); });
        }
    }
};

// Of 4 bits, decoded into vectors of floats. The 8 columns of a lane are 4 bytes, so that their fields are the lowest bits of
// words that begin a byte apart, or are 4 bits further up. Where a strip has one scale, the table is scaled; where it has
// several, products are when it ends, in schemes without zeros.
struct Strips : StripRows<128> {
    static constexpr int FEW = 5; // rows of x at once
    static constexpr int64_t BYTES = WIDTH / 2;

    // What has a scale of its own: a row, whole strips of it, or parts of strips.
    enum class Scaled { ROWS, STRIPS, PARTS };

    const F values;
    const int64_t whole; // strips with 3 bytes of the row behind them, which are read as well
    const Scaled scaled;

    static bool takes(const Product& job) {
        return job.bits == 4 && (is_whole(job) || (has_parts(job) && job.zero == 0));
    }

    explicit Strips(const Product& j)
        : StripRows(j, UNITS), values(load(j.values)), whole((bytes - 3) / BYTES),
          scaled(parts ? Scaled::PARTS : j.block < j.columns || j.zero ? Scaled::STRIPS : Scaled::ROWS) {}

    bool spread(int64_t row, float* to) const {
        for (int64_t s = 0; s < strips; s++, to += WIDTH) {
            F x[UNITS];
            floats_of(row, s, x);
            for (int j = 0; j < UNITS; j++) store(to + j * LANES, x[j]);
        }
        return true;
    }

    void run(const Task& task, Scratch& scratch) const {
        load_numbers(task, scratch);
        in_turns<FEW>(task.count, [&](int64_t first, auto m) {
            if (scaled == Scaled::ROWS) few<m, Scaled::ROWS>(task, first, scratch);
            else if (scaled == Scaled::STRIPS) few<m, Scaled::STRIPS>(task, first, scratch);
            else few<m, Scaled::PARTS>(task, first, scratch);
        });
    }

    template <int M, Scaled SCALED> void few(const Task& task, int64_t first, const Scratch& scratch) const {
        const float* xs[M];
        float found[M][AT_ONCE];
        for (int m = 0; m < M; m++) xs[m] = task.x_row(first + m);
        for (int64_t row = 0; row < task.each; row++) {
            F sums[ROWS][M];
            fused<M, SCALED>(task, row, xs, scratch.scales.data + row * room, scratch.offsets.data + row * room, sums);
            for (int m = 0; m < M; m++) {
                F of_rows[ROWS];
                for (int r = 0; r < ROWS; r++) of_rows[r] = sums[r][m];
                sum_rows(of_rows, found[m] + row, EACH);
            }
        }
        for (int m = 0; m < M; m++) {
            for (int64_t i = 0; SCALED == Scaled::ROWS && i < AT_ONCE; i++) found[m][i] *= scratch.scales.data[i * room];
            task.put(first + m, found[m]);
        }
    }

    // The words of a strip with so many bytes, or more, behind which nothing is read.
    static U words(const uint8_t* from, int64_t rest) {
        if (rest >= BYTES) return read<U>(from);
        uint8_t copy[BYTES] = {};
        memcpy(copy, from, rest);
        return read<U>(copy);
    }

    // What codes stand for in a block of a stream's row.
    F table(const float* scales, const float* offsets, int r) const {
        const int64_t at = r * EACH * room;
        if (job.zero == 0) return values * scales[at];
        return job.zero == 1 ? (values - offsets[at]) * scales[at] : multiply_add(values, all(scales[at]), all(offsets[at]));
    }

    // Few rows of x with ROWS of the weight, one of each stream.
    template <int M, Scaled SCALED>
    __attribute__((noinline)) void fused(const Task& task, int64_t row, const float* const* xs, const float* scales,
                                         const float* offsets, F (&to)[ROWS][M]) const {
        F parts[ROWS][M], sums[ROWS][M], tables[ROWS];
        const uint8_t* from[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            from[r] = task.codes(row + r * EACH);
            tables[r] = SCALED == Scaled::STRIPS ? table(scales, offsets, r) : values;
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) sums[r][m] = parts[r][m] = F{};
        }
        const auto strip = [&](int64_t s, auto&& words) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                F x[M], x_next[M];
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    const float* const at = xs[m] + s * WIDTH + 2 * i * LANES;
                    x[m] = load(at), x_next[m] = load(at + LANES);
                }
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    const U fields = words(r, i);
                    const F w = look_up_low(tables[r], fields), next = look_up_low(tables[r], fields >> 4);
#pragma GCC unroll 8
                    for (int m = 0; m < M; m++) {
                        parts[r][m] = multiply_add(w, x[m], parts[r][m]);
                        parts[r][m] = multiply_add(next, x_next[m], parts[r][m]);
                    }
                }
            }
        };
        const U block = as<U>(lane_numbers() * (int)per >> 4); // of every lane
        const auto scale = [&]() __attribute__((always_inline)) { // where parts of a strip have scales of their own
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const F v = look_up_low(load(scales + r * EACH * room), block);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) sums[r][m] = multiply_add(parts[r][m], v, sums[r][m]), parts[r][m] = F{};
            }
            scales += per;
        };
        int64_t left = fold;
        const auto behind = [&]() __attribute__((always_inline)) {
            if (SCALED == Scaled::PARTS) return scale();
            if (SCALED == Scaled::ROWS || --left) return;
            left = fold, scales++, offsets++;
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) tables[r] = table(scales, offsets, r);
        };
        int64_t s = 0;
        for (; s < whole; s++) {
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) __builtin_prefetch(from[r] + NEAR + s * BYTES, 0, 3);
            strip(s, [&](int r, int i) { return read<U>(from[r] + s * BYTES + i); });
            behind();
        }
        for (; s < strips; s++) {
            U last[ROWS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) last[r] = words(from[r] + s * BYTES, bytes - s * BYTES);
            strip(s, [&](int r, int i) { return last[r] >> 8 * i; });
            behind();
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) to[r][m] = SCALED == Scaled::PARTS ? sums[r][m] : parts[r][m];
    }
};

// Strips that `Derived` multiplies with up to MOST rows of x at once, whose strips are `Lanes`.
template <class Derived, class Lanes, int MOST, int64_t COLUMNS> struct StripsOf : StripRows<COLUMNS> {
    using Rows = StripRows<COLUMNS>;
    using Scratch = typename Rows::Scratch;
    static constexpr int ROWS_OF_X = MOST;

    const int64_t size; // bytes of a strip

    static bool takes(const Product& job) { return Rows::is_whole(job) || Rows::has_parts(job); }

    explicit StripsOf(const Product& j) : Rows(j, sizeof(Lanes) / sizeof(F)), size(COLUMNS * j.bits / 8) {}

    void run(const Task& task, Scratch& scratch) const {
        this->load_numbers(task, scratch);
        this->template in_turns<ROWS_OF_X>(task.count, [&](int64_t first, auto m) {
            with_flag(this->job.zero, [&](auto zero) {
                with_flag(this->parts, [&](auto parts) { multiply<m, parts, zero>(task, first, scratch); });
            });
        });
    }

    template <int M, bool PARTS, bool ZERO> void multiply(const Task& task, int64_t first, const Scratch& scratch) const {
        const Lanes* xs[M];
        float found[M][AT_ONCE];
        for (int m = 0; m < M; m++) xs[m] = (const Lanes*)task.x_row(first + m);
        for (int64_t row = 0; row < task.each; row++) {
            F sums[M][ROWS];
            const int64_t at = row * this->room;
            const float *const scales = scratch.scales.data + at, *const offsets = scratch.offsets.data + at;
            ((const Derived*)this)->template add_up<M, PARTS, ZERO>(task, row, xs, scales, offsets, sums);
            for (int m = 0; m < M; m++) sum_rows(sums[m], found[m] + row, EACH);
        }
        for (int m = 0; m < M; m++) task.put(first + m, found[m]);
    }

  protected:
    // `function` with every strip of rows, the codes of each there, and in every lane the number of that row's block.
    template <bool PARTS, class Function>
    __attribute__((always_inline)) void each_strip(const Task& task, int64_t row, const float* scales, const float* offsets,
                                                   const Function& function) const {
        const uint8_t* from[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) from[r] = task.codes(row + r * EACH);
        const U block = as<U>(lane_numbers() * (int)this->per >> 4); // of every lane
        const int64_t bytes = this->bytes, size = this->size;
        int64_t left = this->fold, at = 0, s = 0;
        const auto strip = [&](auto&& codes) __attribute__((always_inline)) {
            const auto number = [&](const float* of, int r) __attribute__((always_inline)) {
                const float* const own = of + r * EACH * this->room;
                if (!PARTS) return all(*own);
                return look_up_low((F)_mm512_broadcast_f32x8(_mm256_loadu_ps(own)), block); // blocks have 16 columns at least
            };
            const auto scale = [&](int r) __attribute__((always_inline)) { return number(scales, r); };
            const auto offset = [&](int r) __attribute__((always_inline)) { return number(offsets, r); };
            function(s, codes, scale, offset);
            if (PARTS) scales += this->per, offsets += this->per;
            else if (--left == 0) left = this->fold, scales++, offsets++;
        };
        for (; at + 64 <= bytes; s++, at += size) {
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) __builtin_prefetch(from[r] + NEAR + at, 0, 3);
            strip([&](int r) __attribute__((always_inline)) { return _mm512_loadu_si512(from[r] + at); });
        }
        for (; s < this->strips; s++, at += size)
            strip([&](int r) __attribute__((always_inline)) { return Panels::read_codes(from[r] + at, bytes - at); });
    }
};

} // namespace

#endif
