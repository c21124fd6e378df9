// int8 codes of x and codes of a weight as words of four columns, added up as integers: into the same bits as by `Codes<1>`.

#ifdef FXQUANT_CODES

namespace {

struct CodeWords : Panels {
    static constexpr int64_t PANEL = Inputs<1>::PANEL, WORDS = PANEL / 4; // columns, and words of them
    static constexpr int OF_NIBBLES = 2;        // words that are made of one of 4 bits
    static constexpr int64_t NUMBERS = 3;       // of a step of a row of x: what sums lack, the sum of codes, their scale
    static constexpr bool rounded = false;      // weights are not, with their scales
    static constexpr bool ADDS_OFFSETS = false; // to sums, as they are: `settle` does

    const Inputs<1> inputs;
    const bool one_scale;            // of a row of x, with which it is multiplied at the end
    const int64_t panels, step, per; // as there
    const int64_t stride;            // bytes of a panel of a turn: words, and numbers of every step
    const int64_t units;             // of a turn
    const bool plain;                // sums meet scales of the weight and nothing else
    const InTurn in_turn;

    explicit CodeWords(const Product& j)
        : Panels(j), inputs(j), one_scale(j.x_group >= j.columns), panels(inputs.panels), step(inputs.step), per(inputs.per),
          stride((WORDS + per * NUMBERS) * TOKENS * 4), units((panels * stride + 63) / 64),
          plain(one_scale && !inputs.whole && !j.zero) {}

    void prepare(Scratch&) const {}

    // Rows of x, word by word: with codes of 4 bits of the weight, of every 8 columns first the even ones.
    bool spread(const int64_t* slots, int64_t count, float* to) const {
        const int64_t width = inputs.units * LANES;
        Buffer<float> rows(count * width);
        for (int64_t t = 0; t < count; t++)
            if (!inputs.spread(slots[t] / job.picks, rows.data + t * width)) return false;
        const Z first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const Z second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        for (int64_t panel = 0; panel < panels; panel++) {
            int32_t* const words = (int32_t*)((char*)to + panel * stride);
            Z low[TOKENS] = {}, high[TOKENS] = {};
            for (int64_t t = 0; t < count; t++) {
                const int8_t* const digits = inputs.digits(rows.data + t * width, panel);
                const Z a = read<Z>(digits), b = read<Z>(digits + sizeof a);
                low[t] = job.bits == 4 ? _mm512_permutex2var_epi32(a, first, b) : a;
                high[t] = job.bits == 4 ? _mm512_permutex2var_epi32(a, second, b) : b;
                for (int64_t s = 0; s < per; s++) {
                    const auto& of_x = inputs.steps(rows.data + t * width, panel)[s];
                    int32_t* const own = words + (WORDS + s * NUMBERS) * TOKENS + t;
                    own[0] = of_x.starts[0][0], own[TOKENS] = as<int32_t>(of_x.total);
                    own[2 * TOKENS] = as<int32_t>(of_x.scale);
                }
            }
            in_turn(low, words), in_turn(high, words + WORDS / 2 * TOKENS);
        }
        return true;
    }

    // One of the numbers of a step.
    template <class T> static T number(const char* of_step, int64_t t, int64_t i) {
        return read<T>(of_step + (i * TOKENS + t) * sizeof(T));
    }

    // What sums of a step lack. They do not begin with it, since that takes longer than to begin with zeros.
    static Z missing(const char* of_step, int64_t t) { return _mm512_set1_epi32(number<int32_t>(of_step, t, 0)); }

    static __attribute__((always_inline)) void add(Z& sum, Z w, Z x) {
        asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    }

    static F added(F total, Z sum, Z missing, F scale) {
        return multiply_add((F)_mm512_cvtepi32_ps(_mm512_add_epi32(sum, missing)), scale, total);
    }

    void settle(const char* of_step, int64_t t, const Z* found, const float* scales, const float* offsets,
                float* totals) const {
        const F of_x = all(number<float>(of_step, t, 1)), scale_of_x = all(number<float>(of_step, t, 2));
        for (int64_t i = 0; i < AT_ONCE; i += LANES) {
            const Z whole = _mm512_add_epi32(found[i / LANES], missing(of_step, t));
            const F total = load(totals + i), sum = (F)_mm512_cvtepi32_ps(whole), scale = load(scales + i);
            if (inputs.whole) store(totals + i, (F)_mm512_add_epi32((Z)total, whole));
            else if (job.zero)
                store(totals + i,
                      add_sum<true>(total, sum, scale, load(offsets + i), of_x, scale_of_x, job.zero, one_scale));
            else store(totals + i, add_sum<false>(total, sum, scale, F{}, of_x, scale_of_x, 0, one_scale));
        }
    }

    void finish(const char* of_step, int64_t t, const float* scales, float* totals) const {
        const F own = all(number<float>(of_step, t, 2));
        for (int64_t i = 0; one_scale && i < AT_ONCE; i += LANES) {
            F total = load(totals + i);
            if (inputs.whole) total = (F)_mm512_cvtepi32_ps((Z)total) * load(scales + i);
            store(totals + i, total * own);
        }
    }

    static bool turns() { return true; }
    static bool decodes() { return false; }

    static void decode(int64_t, const Z*, const Scratch&, Z*) {}

    static Z key() { return _mm512_set1_epi8(15); }

    // The codes of a word that are first of two, or second. In the order in which it is written, as products are.
    template <int I> static __attribute__((always_inline)) Z of_nibbles(const Z* word, Z low) {
        Z to;
        if constexpr (I == 0) asm volatile("vpandd %1, %2, %0" : "=v"(to) : "m"(*word), "v"(low));
        else {
            asm volatile("vpsrld $4, %1, %0" : "=v"(to) : "m"(*word));
            asm volatile("vpandd %1, %0, %0" : "+v"(to) : "v"(low));
        }
        return to;
    }
};

} // namespace

#endif
