// The numbers of one row of the grid of blocks, in float32.

#include <algorithm>

namespace {

inline F small_float(I codes) { // e4m3 as half a float16, which has the exponents for it
    const U bits = as<U>(codes), half = ((bits & 0x80) << 8) | ((bits & 0x7f) << 7);
    const U16 halves = narrow(half);
    Fp16 patterns[LANES];
    write(patterns, halves);
    const F v = load(patterns) * 256.0f;
    return (bits & 0x7f) == 0x7f ? all(NAN) : v;
}

inline F power_of_two(I codes) {
    const F v = as<F>(codes << 23);
    const F low = codes == 0 ? as<F>(I{} + 0x400000) : v;
    return codes == 255 ? all(NAN) : low;
}

// What bytes stand for.
inline F looked_up(const float* table, const uint8_t* bytes) {
#ifdef FXQUANT_AVX512
    return (F)_mm512_i32gather_ps((__m512i)widen(read<U8>(bytes)), table, 4);
#else
    F v;
    for (int l = 0; l < LANES; l++) v[l] = table[bytes[l]];
    return v;
#endif
}

inline F floats(const void* from, int type, int64_t i, int64_t count) {
    if (type == 0) return count < LANES ? load_some((const float*)from + i, count) : load((const float*)from + i);
    if (type == 1) return count < LANES ? load_some((const Bf16*)from + i, count) : load((const Bf16*)from + i);
    return count < LANES ? load_some((const Fp16*)from + i, count) : load((const Fp16*)from + i);
}

inline int64_t over(int64_t a, int64_t b) { return b == 1 ? a : a / b; } // a division takes as long as 16 weights

inline const uint8_t* numbers_at(const Level& level, int64_t expert, int64_t row) {
    return (const uint8_t*)level.stored + expert * level.expert + over(row, level.rows) * level.stride;
}

__attribute__((noinline)) void numbers_of_levels(const Level& level, int64_t expert, int64_t row, int64_t blocks,
                                                 float* to, uint8_t* bytes) {
    const uint8_t* const stored = numbers_at(level, expert, row);
    if (level.type > 2) unpack(stored, blocks, level.bits, bytes);
    const uint8_t* const outer =
        (const uint8_t*)level.outer + expert * level.outer_expert + over(row, level.outer_rows) * level.outer_stride;
    const F offset = all(level.offset ? level.offset[expert * level.offset_expert] : 0);
    // `above` has the numbers of the second level of the 16 blocks from i on, one by one.
    const auto go_on = [&](auto&& above) __attribute__((always_inline)) {
        for (int64_t i = 0; i < blocks; i += LANES) {
            F v;
            if (level.type <= 2) v = floats(stored, level.type, i, blocks - i);
            else if (level.type == 5) v = looked_up(level.table, bytes + i);
            else {
                const I codes = widen(read<U8>(bytes + i) ^ (uint8_t)level.flip);
                if (level.type == 3) v = power_of_two(codes);
                else if (level.type == 4) v = small_float(codes);
                else v = __builtin_convertvector(codes, F) * level.step + level.low;
            }
            v = above(v, i);
            store(to + i, level.offset ? v + offset : v);
        }
    };
    if (level.outer_type == 7) return go_on([](F v, int64_t) { return v; });
    // In most schemes a row has its own numbers of the second level, each for a power of two of blocks.
    if (level.flat == 0 && (level.per & (level.per - 1)) == 0) {
        const int shift = __builtin_ctzll(level.per);
        const int64_t count = ((blocks - 1) >> shift) + 1;
        int64_t behind = 0; // the 16 of them that are at hand
        F some{};
        return go_on([&](F v, int64_t i) __attribute__((always_inline)) {
            const int64_t from = i >> shift;
            for (; behind <= from; behind += LANES)
                some = floats(outer, level.outer_type, behind, std::min<int64_t>(count - behind, LANES));
            return v * look_up_low(some, as<U>((lane_numbers() >> shift) + (int)(from % LANES)));
        });
    }
    // Where the number is that a block is under, and the first block that is not under it.
    const int64_t first = level.flat * row;
    int64_t at = first / level.per, next = (at + 1) * level.per - first;
    go_on([&](F v, int64_t i) __attribute__((always_inline)) {
        const int64_t end = i + LANES < blocks ? i + LANES : blocks;
        F above = all(load_one(outer, level.outer_type, at));
        for (; next < end; next += level.per) {
            const F value = all(load_one(outer, level.outer_type, ++at));
            above = lane_numbers() < (int)(next - i) ? above : value;
        }
        if (next == end) at++, next += level.per;
        return v * above;
    });
}

// Whether the numbers of rows lie behind each other, without anything between them or above them.
inline bool in_one_piece(const Level& level, int64_t blocks) {
    const int64_t bits = level.type == 0 ? 32 : level.type <= 2 ? 16 : level.bits;
    return level.outer_type == 7 && level.rows == 1 && level.stride * 8 == blocks * bits;
}

// `[blocks]` of one row of one expert; room for whole vectors behind them, in `bytes` as well.
inline void numbers(const Level& level, int64_t expert, int64_t row, int64_t blocks, float* to, uint8_t* bytes) {
    if (level.type > 2 || level.outer_type != 7 || level.offset)
        return numbers_of_levels(level, expert, row, blocks, to, bytes);
    const uint8_t* const stored = numbers_at(level, expert, row);
    for (int64_t i = 0; i < blocks; i += LANES) store(to + i, floats(stored, level.type, i, blocks - i));
}

} // namespace
