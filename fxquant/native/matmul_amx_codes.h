// int8 codes of x and codes of a weight for matrix units, added up as integers: into the same bits as by `Codes<1>`.

#ifdef FXQUANT_AMX

namespace {

struct AmxCodes : Panels {
    static constexpr int64_t PANEL = Inputs<1>::PANEL, TURN = 16; // columns; rows of x that meet a panel at a time
    static constexpr int64_t turn = TURN;
    static constexpr bool NARROW = false;
    static constexpr int MOST_EACH = 2;      // tiles of x that a step may have
    static constexpr bool ASKS_FOR_X = true; // before it is multiplied
    static constexpr int64_t TILE = 1024, CHUNKS = PANEL / 64, ROOM = VECTORS * CHUNKS * TILE; // bytes; of a panel
    static constexpr int64_t TOGETHER = 4; // panels that are decoded before rows of x meet them, or fewer

    const Inputs<1> inputs;
    const bool one_scale; // of a row of x, with which it is multiplied at the end
    const int64_t panels, step, per; // as there
    const int64_t stride; // bytes of a panel of a turn: tiles; of every step what it begins with, the sum of x and its scale
    const int64_t units;
    static constexpr int KINDS = 6;
    const int kind; // how sums meet scales: what offsets are, and whether a row of x has one scale

    AmxCodes(const Product& j, int64_t)
        : Panels(j), inputs(j), one_scale(j.x_group >= j.columns), panels(inputs.panels), step(inputs.step), per(inputs.per),
          stride(CHUNKS * TILE + per * 3 * TURN * 4), units(panels * stride / 64), kind(2 * j.zero + one_scale) {}

    // Digits of a weight of 4 bits lie in two halves, the low ones of a panel first.
    int64_t tile_bytes() const { return std::min<int64_t>(job.bits == 4 ? step / 2 : step, 64); }

    static constexpr int64_t pairs() { return 1; }
    bool direct() const { return inputs.whole; }
    int64_t together() const { return direct() ? TOGETHER : 1; }
    static constexpr bool rounded = false;

    template <class Each> void each_product(int64_t s, const Each& product) const {
        const int64_t size = tile_bytes();
        for (int64_t i = 0; i < step / size; i++) {
            const int64_t at = job.bits == 4 ? s * size + i * 64 : s * step + i * size;
            product(at / 64 * TILE + at % 64 * 16, at / 64 * TILE + at % 64);
        }
    }

    template <int SUMS, int W> static void multiply() { add_tile_products_of_bytes<SUMS, W, 4>(); }

    // Up to 16 rows of x as tiles: words of four codes, row by row.
    bool spread(const int64_t* slots, int64_t count, float* to) const {
        const int64_t width = panels * inputs.stride / 4;
        Buffer<float> rows(count * width);
        for (int64_t i = 0; i < count; i++)
            if (!inputs.spread(slots[i] / job.picks, rows.data + i * width)) return false;
        for (int64_t panel = 0; panel < panels; panel++) {
            uint8_t* const at = (uint8_t*)to + panel * stride;
            float* const numbers = (float*)(at + CHUNKS * TILE);
            memset(numbers, 0, per * 3 * TURN * 4);
            for (int64_t chunk = 0; chunk < CHUNKS; chunk++) {
                Z words[TURN] = {};
                for (int64_t i = 0; i < count; i++)
                    words[i] = _mm512_loadu_si512(inputs.digits(rows.data + i * width, panel) + chunk * 64);
                transpose(words);
                memcpy(at + chunk * TILE, words, TILE);
            }
            for (int64_t s = 0; s < per; s++)
                for (int64_t i = 0; i < count; i++) {
                    const auto& of_x = inputs.steps(rows.data + i * width, panel)[s];
                    float* const own = numbers + s * 3 * TURN + i;
                    write(own, of_x.starts[0][0]), own[TURN] = of_x.total, own[2 * TURN] = of_x.scale;
                }
            if (panel && direct()) { // all of them begin in the first panel
                float* const starts = (float*)of_step((uint8_t*)to, 0);
                write(starts, read<I>(starts) + read<I>(numbers));
            }
        }
        return true;
    }

    static const float* of_step(const uint8_t* x, int64_t s) { return (const float*)(x + CHUNKS * TILE) + s * 3 * TURN; }

    // The total and a step's sums, of a row of the weight and all rows of x of a turn.
    template <int KIND, int>
    static F added(F total, const float* sums, const float* scale, const float* offset, const float* of_x) {
        constexpr int ZERO = KIND / 2;
        const F sum = __builtin_convertvector(read<I>(sums) + read<I>(of_x), F);
        const F zeros = ZERO ? all(*offset) : F{};
        return add_sum<ZERO != 0>(total, sum, all(*scale), zeros, load(of_x + TURN), load(of_x + 2 * TURN), ZERO, KIND % 2);
    }

    F last(F total, float scale, const uint8_t* x) const {
        const float* const own = of_step(x, 0);
        if (direct()) total = __builtin_convertvector((I)total + read<I>(own), F) * all(scale);
        return one_scale ? total * load(own + 2 * TURN) : total;
    }

    static constexpr int64_t behind(int64_t) { return 0; }

    // A panel of a row: 128 bytes, in the order of digits of x.
    template <class Scratch, class Function> void with_decoder(int64_t, const Scratch&, const Function& function) const {
        if (job.bits == 4) return function([low = _mm512_set1_epi8(15)](const uint8_t* from, uint8_t* to, int64_t) {
            const Z codes = _mm512_loadu_si512(from);
            _mm512_store_si512(to, _mm512_and_si512(codes, low));
            _mm512_store_si512(to + TILE, _mm512_and_si512(_mm512_srli_epi16(codes, 4), low));
        });
        const Z flip = _mm512_set1_epi8(job.bits == 8 && job.low ? (char)0x80 : 0);
        if (job.bits == 8) return function([flip](const uint8_t* from, uint8_t* to, int64_t) {
            _mm512_store_si512(to, _mm512_xor_si512(_mm512_loadu_si512(from), flip));
            _mm512_store_si512(to + TILE, _mm512_xor_si512(_mm512_loadu_si512(from + 64), flip));
        });
        function([bits = job.bits](const uint8_t* from, uint8_t* to, int64_t) {
            uint8_t codes[PANEL + 64];
            unpack(from, PANEL, bits, codes);
            memcpy(to, codes, 64), memcpy(to + TILE, codes + 64, 64);
        });
    }
};

} // namespace

#endif
