// Vectors of 16 floats, on whatever the compiler has: GCC's and Clang's vector extensions, and AVX-512 where plain
// C++ does not get there. Every step rounds as torch's own kernels do: no reassociation, no contraction.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <vector>
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define FXQUANT_AVX512
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
constexpr float TINY = 1e-38f;
constexpr int TABLE = 64; // the largest table

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(32)));
typedef uint8_t U8 __attribute__((vector_size(16)));

struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

template <class To, class From> inline To as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

template <class V> inline V read(const void* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}

template <class V> inline void write(void* to, const V& v) { memcpy(to, &v, sizeof v); }

inline F all(float value) { return value - F{}; }

inline I lane_numbers() { return I{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

inline float smaller(float a, float b) { return a < b ? a : b; }
inline float larger(float a, float b) { return a > b ? a : b; }
inline float clamped(float v, float low, float high) { return smaller(larger(v, low), high); }

// GCC takes these conversions apart, lane by lane.
#ifdef FXQUANT_AVX512
inline U widen(U16 v) { return (U)_mm512_cvtepu16_epi32((__m256i)v); }
inline I widen(U8 v) { return (I)_mm512_cvtepu8_epi32((__m128i)v); }
inline U16 narrow(U v) { return (U16)_mm512_cvtepi32_epi16((__m512i)v); }
inline U8 narrow(I v) { return (U8)_mm512_cvtepi32_epi8((__m512i)v); }
#else
inline U widen(U16 v) { return __builtin_convertvector(v, U); }
inline I widen(U8 v) { return __builtin_convertvector(v, I); }
inline U16 narrow(U v) { return __builtin_convertvector(v, U16); }
inline U8 narrow(I v) { return __builtin_convertvector(as<U>(v), U8); }
#endif

inline F least(F a, F b) {
#ifdef FXQUANT_AVX512
    return (F)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return a < b ? a : b;
#endif
}

inline F most(F a, F b) {
#ifdef FXQUANT_AVX512
    return (F)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

// Where rounding need not be torch's: in the sums of a search.
inline F multiply_add(F a, F b, F c) {
#ifdef FXQUANT_AVX512
    return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

// `c - a b`
inline F negative_multiply_add(F a, F b, F c) {
#ifdef FXQUANT_AVX512
    return (F)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return c - a * b;
#endif
}

inline float sum(F v) {
#ifdef FXQUANT_AVX512
    return _mm512_reduce_add_ps((__m512)v);
#else
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
#endif
}

inline float lowest(F v) {
#ifdef FXQUANT_AVX512
    return _mm512_reduce_min_ps((__m512)v);
#else
    float found = v[0];
    for (int i = 1; i < LANES; i++) found = v[i] < found ? v[i] : found;
    return found;
#endif
}

// The first lane that holds a value that one of them holds.
inline int which(F v, float value) {
#ifdef FXQUANT_AVX512
    return __builtin_ctz(_mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(value), _CMP_EQ_OQ) | 0x8000);
#else
    int lane = 0;
    while (lane < LANES - 1 && v[lane] != value) lane++;
    return lane;
#endif
}

// Half to even, up to 2^22 in magnitude.
inline F rounded(F v) {
    const F magic = all(12582912.0f);
    return (v + magic) - magic;
}

inline F load(const float* from) { return read<F>(from); }

inline F load(const Bf16* from) { return as<F>(widen(read<U16>(from)) << 16); }

inline F load(const Fp16* from) {
#ifdef FXQUANT_AVX512
    return (F)_mm512_cvtph_ps(read<__m256i>(from));
#else
    F v;
    for (int i = 0; i < LANES; i++) v[i] = (float)as<_Float16>(from[i]);
    return v;
#endif
}

inline void store(float* to, F v) { write(to, v); }

inline void store(Bf16* to, F v) {
    const U bits = as<U>(v);
    const U even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const U nan = (bits >> 16) | 0x40;
    write(to, narrow((bits & 0x7fffffff) > 0x7f800000 ? nan : even));
}

inline void store(Fp16* to, F v) {
#ifdef FXQUANT_AVX512
    write(to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < LANES; i++) to[i] = as<Fp16>((_Float16)v[i]);
#endif
}

// The first `count` of a vector; nothing is touched behind them.
template <class T> inline F load_some(const T* from, int64_t count) {
#ifdef FXQUANT_AVX512
    const __mmask16 mask = (1u << count) - 1;
    if constexpr (sizeof(T) == sizeof(float)) return (F)_mm512_maskz_loadu_ps(mask, from);
    alignas(32) T some[2 * LANES];
    _mm512_store_si512(some, _mm512_maskz_loadu_epi16(mask, from));
#else
    T some[LANES] = {};
    memcpy(some, from, count * sizeof(T));
#endif
    return load(some);
}

template <class T> inline void store_some(T* to, F v, int64_t count) {
    T some[LANES];
    store(some, v);
    memcpy(to, some, count * sizeof(T));
}

inline float load_one(const void* from, int dtype, int64_t i) {
    if (dtype == 0) return ((const float*)from)[i];
    if (dtype == 1) return as<float>((uint32_t)((const uint16_t*)from)[i] << 16);
    return (float)as<_Float16>(((const uint16_t*)from)[i]);
}

// `table[i]` by lane, for tables of 16, 32 or 64 entries.
template <int N> inline F look_up(const float* table, I i) {
#ifdef FXQUANT_AVX512
    const auto at = [&](int j) { return (__m512)read<F>(table + j); };
    if constexpr (N == 16) return (F)_mm512_permutexvar_ps((__m512i)i, at(0));
    const __m512 low = _mm512_permutex2var_ps(at(0), (__m512i)i, at(16));
    if constexpr (N == 32) return (F)low;
    const __m512 high = _mm512_permutex2var_ps(at(N / 2), (__m512i)i, at(N / 2 + 16));
    return (F)_mm512_mask_blend_ps(_mm512_test_epi32_mask((__m512i)i, _mm512_set1_epi32(32)), low, high);
#else
    F v;
    for (int l = 0; l < LANES; l++) v[l] = table[i[l] & (N - 1)]; // lanes behind the end of a row hold anything
    return v;
#endif
}

// A table of 16 values, repeated where fields have fewer bits: what stands above a field is not looked at.
inline F look_up_low(F table, U fields) {
#if defined(FXQUANT_AVX512)
    return (F)_mm512_permutexvar_ps((__m512i)fields, (__m512)table);
#elif defined(__AVX2__)
    __m256 halves[2];
    __m256i codes[2];
    write(halves, table), write(codes, fields);
    for (__m256i& code : codes) {
        const __m256 low = _mm256_permutevar8x32_ps(halves[0], code), high = _mm256_permutevar8x32_ps(halves[1], code);
        code = _mm256_castps_si256(_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28))));
    }
    return read<F>(codes);
#else
    F v;
    for (int l = 0; l < LANES; l++) v[l] = table[fields[l] & 15];
    return v;
#endif
}

// `2 i + (v > bound)`
inline I descend(I i, F v, F bound) {
#ifdef FXQUANT_AVX512
    const __m512i twice = _mm512_add_epi32((__m512i)i, (__m512i)i);
    const __mmask16 above = _mm512_cmp_ps_mask((__m512)v, (__m512)bound, _CMP_GT_OQ);
    return (I)_mm512_mask_add_epi32(twice, above, twice, _mm512_set1_epi32(1));
#else
    return i + i - (v > bound);
#endif
}

} // namespace
