// Fields of 1 to 8 bits as a little-endian stream, as fxquant/bits.py has them: field i at bits [i b, (i + 1) b).

namespace {

typedef uint16_t Pairs __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(32)));

#ifdef FXQUANT_AVX512
inline Bytes narrow(Pairs v) { return (Bytes)_mm512_cvtepi16_epi8((__m512i)v); }
inline Pairs widen(Bytes v) { return (Pairs)_mm512_cvtepu8_epi16((__m256i)v); }
#else
inline Bytes narrow(Pairs v) { return __builtin_convertvector(v, Bytes); }
inline Pairs widen(Bytes v) { return __builtin_convertvector(v, Pairs); }
#endif

// Eight fields, one per byte, moved together to the lowest 8 b bits; and back.
inline uint64_t gather_fields(uint64_t x, int b) {
    x = (x & 0x00ff00ff00ff00ff) | ((x & 0xff00ff00ff00ff00) >> (8 - b));
    x = (x & 0x0000ffff0000ffff) | ((x & 0xffff0000ffff0000) >> (16 - 2 * b));
    return (x & 0x00000000ffffffff) | ((x & 0xffffffff00000000) >> (32 - 4 * b));
}

inline uint64_t scatter_fields(uint64_t x, int b) {
    const uint64_t one = (1ull << b) - 1, two = (1ull << 2 * b) - 1, four = (1ull << 4 * b) - 1;
    x = (x & four) | ((x & (four << 4 * b)) << (32 - 4 * b));
    x = (x & (two * 0x100000001)) | ((x & ((two << 2 * b) * 0x100000001)) << (16 - 2 * b));
    return (x & (one * 0x0001000100010001)) | ((x & ((one << b) * 0x0001000100010001)) << (8 - b));
}

// `fields` has room behind its n for 64 more, which are overwritten.
inline void pack(uint8_t* fields, int64_t n, int b, uint8_t* to) {
    if (b == 8) {
        memcpy(to, fields, n);
        return;
    }
    memset(fields + n, 0, 64);
    uint8_t* const end = to + (n * b + 7) / 8;
    if (b == 4)
        for (; to + sizeof(Bytes) <= end; to += sizeof(Bytes), fields += sizeof(Pairs)) {
            const Pairs pairs = read<Pairs>(fields);
            write(to, narrow(pairs | (pairs >> 4)));
        }
    for (; to < end; to += b, fields += 8) {
        const uint64_t word = gather_fields(read<uint64_t>(fields), b);
        memcpy(to, &word, end - to < 8 ? end - to : 8);
    }
}

// `fields` has room behind its n for 64 more. Nothing behind the packed bytes is read.
inline void unpack(const uint8_t* from, int64_t n, int b, uint8_t* fields) {
    if (b == 8) {
        memcpy(fields, from, n);
        return;
    }
    const uint8_t* const end = from + (n * b + 7) / 8;
    if (b == 4)
        for (; from + sizeof(Bytes) <= end; from += sizeof(Bytes), fields += sizeof(Pairs)) {
            const Pairs pairs = widen(read<Bytes>(from));
            write(fields, (pairs | (pairs << 4)) & 0x0f0f);
        }
#if defined(FXQUANT_AVX512) && defined(__AVX512VBMI__) && defined(__AVX512DQ__)
    // 64 fields at once: a word gets the b bytes of 8 of them, and a byte of the result is any 8 bits of a word.
    constexpr int64_t EACH_BYTE = 0x0101010101010101, NUMBERS = 0x0706050403020100;
    const __m512i words = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), mask = _mm512_set1_epi8((char)((1 << b) - 1));
    const __m512i first = _mm512_mullo_epi64(words, _mm512_set1_epi64(EACH_BYTE * b));
    const __m512i places = _mm512_add_epi8(first, _mm512_set1_epi64(NUMBERS)), shifts = _mm512_set1_epi64(NUMBERS * b);
    for (; from < end; from += 8 * b, fields += 64) {
        const int64_t count = end - from < 8 * b ? end - from : 8 * b;
        const __m512i bytes = _mm512_maskz_loadu_epi8((1ull << count) - 1, from);
        const __m512i found = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(places, bytes));
        write(fields, _mm512_and_si512(found, mask));
    }
#else
    for (; from < end; from += b, fields += 8) {
        uint64_t word = 0;
        memcpy(&word, from, end - from < 8 ? end - from : 8);
        write(fields, scatter_fields(word, b));
    }
#endif
}

} // namespace
