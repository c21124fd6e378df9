// Matrix units (AMX): tiles of 16 rows of 64 bytes, and products of tiles. Threads have to ask the system for them, once
// for all, and each sets the shapes of its tiles before it uses them.

#if defined(FXQUANT_CODES) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__linux__)
#define FXQUANT_AMX

#include <sys/syscall.h>
#include <unistd.h>

namespace {

// Whether the system lets this process use tiles.
inline bool has_tiles() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
}

// As instructions, since headers of compilers have macros of statements. They read and write memory behind a pointer, as
// much as there is, so that what is written before is there, and nothing else is read again.
template <int TILE> inline void load_tile(const void* from, int64_t apart) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(apart), "i"(TILE), "m"(*(const char(*)[])from));
}

template <int TILE> inline void store_tile(void* to, int64_t apart) {
    asm volatile("tilestored %%tmm%c3, (%1,%2,1)" : "=m"(*(char(*)[])to) : "r"(to), "r"(apart), "i"(TILE));
}

template <int TILE> inline void clear_tile() { asm volatile("tilezero %%tmm%c0" : : "i"(TILE)); }

// `sums += w x`, of pairs of bfloat16.
template <int SUMS, int W, int X> inline void add_tile_products() {
    asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" : : "i"(X), "i"(W), "i"(SUMS));
}

// The same of fours of bytes, unsigned ones of the weight and signed ones of x.
template <int SUMS, int W, int X> inline void add_tile_products_of_bytes() {
    asm volatile("tdpbusd %%tmm%c0, %%tmm%c1, %%tmm%c2" : : "i"(X), "i"(W), "i"(SUMS));
}

// While it lives: tiles 0 to 3 are sums, of 16 rows of the weight and up to 16 rows of x, so many bytes of floats; 4 and 5
// are of x, words of some bytes of these rows; 6 and 7 are the same bytes of 16 rows of the weight.
struct TileShapes {
    TileShapes(int64_t bytes, int64_t of_sums) {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        for (int i = 0; i < 8; i++) {
            shapes.bytes[i] = (uint16_t)(i < 6 ? of_sums : bytes);
            shapes.rows[i] = (uint8_t)(i == 4 || i == 5 ? bytes / 4 : 16);
        }
        asm volatile("ldtilecfg %0" : : "m"(shapes));
    }
    ~TileShapes() { asm volatile("tilerelease"); }
    TileShapes(const TileShapes&) = delete;
};

} // namespace

#endif
