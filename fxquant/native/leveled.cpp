// From weights to planes with scales (and biases) of two levels within a row: GGUF's K-quants.

namespace {

// A group of blocks, and the first and second level that it gets.
struct Group {
    int count; // of blocks
    const float* x;
    float unit, inverse;
    Range spans[MOST];
    float scales[MOST], biases[MOST], weights[MOST]; // what blocks would have if one level could store it, in units
    float ideal;                                     // their squared error then
    float sums[MOST], squares[MOST];                 // of the weights, in units
};

struct Found {
    uint32_t tops[2];
    uint8_t fields[2][MOST];
    float error = INFINITY;
};

template <class E, bool BIASED> struct Leveled {
    static constexpr int ROUNDS = 2;
    static constexpr float UNEVEN = BIASED ? 1.2f : 1.03f; // how much worse than the ideal is worth another start
    const Job& job;
    const E element;
    const Codes codes;
    const Second seconds[2];
    const Grid grid;
    const LineGrid lines;

    explicit Leveled(const Job& j) : job(j), element(j), codes(j), seconds{{j, false}, {j, true}}, grid(j), lines(j) {}

    void operator()(int64_t row, int64_t start, int64_t stop, const Room& room) const {
        Group group;
        group.count = (int)(job.group / job.block), group.x = room.x;
        for (int64_t c = start; c < stop; c += job.group) {
            take(job, row, c, job.group, room.x);
            for (int b = 0; b < group.count; b++) group.spans[b] = span(room.x + b * job.block, job.block);
            const Found found = job.search == 1 ? least_squares(group, room.t) : spanning(group, job.search == 0);
            write(group, found, row, c, room.fields + (c - start));
        }
        pack_piece(job, row, start, stop, room.fields);
    }

    float top(const Found& found, int level) const { return seconds[level].format.decode(found.tops[level]); }

    float value(const Found& found, int level, int block) const {
        return codes.value(found.fields[level][block]) * top(found, level);
    }

    void write(const Group& group, const Found& found, int64_t row, int64_t column, uint8_t* fields) const {
        const int64_t block = job.block, first = row * job.scales_stride + column / block;
        const int64_t above = row * job.groups_stride + column / job.group;
        seconds[0].format.put(job.scale_scales, above, found.tops[0]);
        if (BIASED) seconds[1].format.put(job.bias_scales, above, found.tops[1]);
        for (int b = 0; b < group.count; b++) {
            const float *x = group.x + b * block, scale = value(found, 0, b);
            ((uint8_t*)job.scales)[first + b] = found.fields[0][b] ^ job.code_flip;
            if constexpr (BIASED) {
                ((uint8_t*)job.biases)[first + b] = found.fields[1][b] ^ job.code_flip;
                encode(job, element, x, block, scale, value(found, 1, b), 0, false, fields + b * block);
            } else encode(job, element, x, block, scale, 0, E::divides, fields + b * block);
        }
    }

    Line spanning_line(Range r, bool with_zero) const {
        if (with_zero || job.positive || !BIASED) r.low = smaller(r.low, 0);
        if (with_zero || !BIASED) r.high = larger(r.high, 0);
        if (!BIASED) return {spanning_scale(job, r).scale, 0};
        const float scale = (r.high / 2 - r.low / 2) / ((job.high - job.low) / 2);
        return {scale, r.low - scale * job.low};
    }

    // By the range of each block, with 0 in it or not, and of their scales: as plain torch, to the last bit.
    Found spanning(const Group& group, bool with_zero) const {
        float values[2][MOST];
        for (int b = 0; b < group.count; b++) {
            const Line line = spanning_line(group.spans[b], with_zero);
            values[0][b] = line.scale, values[1][b] = line.bias;
        }
        Found found;
        for (int level = 0; level <= BIASED; level++) {
            found.tops[level] = seconds[level].spanning(values[level], group.count);
            const float above = bounded(top(found, level));
            for (int b = 0; b < group.count; b++)
                found.fields[level][b] = (uint8_t)codes.nearest(values[level][b] / above);
        }
        return found;
    }

    Found least_squares(Group& group, float* t) const {
        float size = 0;
        for (int b = 0; b < group.count; b++) size = larger(size, larger(-group.spans[b].low, group.spans[b].high));
        if (size < SMALLEST) return spanning(group, true);
        group.unit = bounded(size), group.inverse = 1 / group.unit, group.ideal = 0;
        for (int b = 0; b < group.count; b++) ideal(group, b, t);
        for (int64_t i = 0; i < job.group; i += LANES) store(t + i, load(group.x + i) * all(group.inverse));
        Found best = better_spanning(group, t);
        improve(group, t, best);
        for (int with_zero = !BIASED; with_zero < 2 && best.error > UNEVEN * group.ideal; with_zero++) {
            for (int b = 0; b < group.count; b++) {
                const Line line = spanning_line(group.spans[b], with_zero);
                group.scales[b] = line.scale * group.inverse, group.biases[b] = line.bias * group.inverse;
            }
            improve(group, t, best);
        }
        return best;
    }

    // Fits the second level to what blocks would have, the first one to that, and so on.
    void improve(const Group& group, const float* t, Found& best) const {
        Found found;
        found.tops[0] = fitting(group, 0, group.scales);
        if (BIASED) found.tops[1] = fitting(group, 1, group.biases);
        for (int round = 0; round < ROUNDS; round++) {
            float steps[2];
            settle(group, t, found).solve(steps);
            if (found.error < best.error) best = found;
            for (int level = 0; level <= BIASED; level++)
                found.tops[level] = seconds[level].store(top(found, level) * (1 + steps[level]));
        }
    }

    uint32_t fitting(const Group& group, int level, const float* values) const {
        float natural[MOST], weights[MOST];
        for (int b = 0; b < group.count; b++) {
            natural[b] = values[b] * group.unit;
            weights[b] = level ? 1 : group.weights[b];
        }
        return seconds[level].fitting(natural, weights, group.count);
    }

    // Of the choices by range.
    Found better_spanning(const Group& group, const float* t) const {
        Found found[] = {spanning(group, true), spanning(group, false)};
        float sums[2] = {};
        for (int b = 0; b < group.count; b++) {
            float scales[2], biases[2], error[2];
            for (int i = 0; i < 2; i++) {
                scales[i] = value(found[i], 0, b) * group.inverse;
                biases[i] = BIASED ? value(found[i], 1, b) * group.inverse : 0;
            }
            errors(element, job, t + b * job.block, job.block, scales, biases, error);
            sums[0] += error[0], sums[1] += error[1];
        }
        const int at = BIASED && sums[1] < sums[0];
        found[at].error = sums[at];
        return found[at];
    }

    // `t` is room for a block.
    void ideal(Group& group, int b, float* t) const {
        const float* x = group.x + b * job.block;
        const Range r = group.spans[b], with_zero = {smaller(r.low, 0), larger(r.high, 0)};
        if constexpr (BIASED) {
            for (int64_t i = 0; i < job.block; i += LANES) store(t + i, load(x + i) * all(group.inverse));
            const LineSearch<E> search(element, job, t, job.block, job.positive ? 0 : INFINITY);
            const Range ends = {r.low * group.inverse, r.high * group.inverse};
            const Line line = best_line(search, lines, ends);
            group.scales[b] = line.scale, group.biases[b] = line.bias, group.ideal += line.error;
            norms(group, b, search.norms);
        } else {
            const float unit = bounded(unit_scale(job, with_zero).scale), factor = unit * group.inverse;
            for (int64_t i = 0; i < job.block; i += LANES) store(t + i, load(x + i) * all(1 / unit));
            const Search<E> search{element, job, job.block};
            const Best fit = best_fit(search, grid, t, 0);
            group.scales[b] = fit.scale * factor, group.ideal += fit.error * (factor * factor);
            norms(group, b, Norms(t, job.block));
            group.sums[b] *= factor, group.squares[b] *= factor * factor;
        }
        const float spread = group.squares[b] - (BIASED ? group.sums[b] * group.sums[b] / (float)job.block : 0);
        const float scale = bounded(group.scales[b]);
        group.weights[b] = smaller(spread / (scale * scale), 1e9f);
    }

    static void norms(Group& group, int b, const Norms& norms) {
        group.sums[b] = norms.sum, group.squares[b] = norms.squares;
    }

    // The first level under the second one in `found`, and how to improve that.
    Normal settle(const Group& group, const float* t, Found& found) const {
        Normal normal;
        const float above[] = {top(found, 0) * group.inverse, BIASED ? top(found, 1) * group.inverse : 0};
        found.error = 0;
        for (int b = 0; b < group.count; b++) {
            if (BIASED) settle_biased(group, t, found, above, b, normal);
            else settle_scale(group, t, found, above[0], b, normal);
        }
        return normal;
    }

    // The best of the fields around the ideal.
    void settle_scale(const Group& group, const float* t, Found& found, float above, int b, Normal& normal) const {
        const float ratio = group.scales[b] / bounded(above);
        const F beside = load(lines.code_steps);
        F centre = all(codes.nearest(ratio));
        // Where both signs are worth trying, half of the lanes do the other one.
        if (job.turns) centre = lane_numbers() < LANES / 2 ? centre : all(codes.nearest(-ratio));
        const F fields = least(most(centre + beside, F{}), all(codes.last)), scale = codes.value(fields) * above;
        const Moments m = moments<false>(element, job, t + b * job.block, job.block, scale, F{});
        const float error = lowest(m.ee);
        const int at = which(m.ee, error);
        found.error += error;
        found.fields[0][b] = (uint8_t)fields[at];
        normal.scale += scale[at] * m.qe[at];
        normal.scale_scale += group.squares[b] - 2 * scale[at] * m.qe[at] - m.ee[at];
    }

    // The best of the scales around the ideal, with the biases that leave the mean in place, and those next to them.
    void settle_biased(const Group& group, const float* t, Found& found, const float (&above)[2], int b,
                       Normal& normal) const {
        const float n = (float)job.block, mean = group.sums[b] / n;
        float scale = group.scales[b], bias = group.biases[b];
        const float centre = codes.nearest(scale / bounded(above[0])), code = (mean - bias) / bounded(scale);
        const F fields = least(most(centre + load(lines.scale_steps), F{}), all(codes.last));
        const F scales = codes.value(fields) * above[0], target = bias + (scale - scales) * code;
        const F near = codes.nearest(target * (1 / bounded(above[1]))) + load(lines.bias_steps);
        const F lower = least(most(near, F{}), all(codes.last)), biases = codes.value(lower) * above[1];
        const Moments m = moments<true>(element, job, t + b * job.block, job.block, scales, biases);
        const float error = lowest(m.ee);
        const int at = which(m.ee, error);
        scale = scales[at], bias = biases[at];
        found.error += error;
        found.fields[0][b] = (uint8_t)fields[at], found.fields[1][b] = (uint8_t)lower[at];
        const float values = group.sums[b] - n * bias - m.e[at];
        const float centred = group.squares[b] + bias * (n * bias - 2 * group.sums[b]);
        normal.scale += scale * m.qe[at], normal.bias += bias * m.e[at];
        normal.scale_scale += centred - 2 * scale * m.qe[at] - m.ee[at];
        normal.bias_bias += n * bias * bias, normal.scale_bias += bias * values;
    }
};

template <class E> void quantize_leveled(const Job& job) { in_pieces(job, job.group, Leveled<E, false>(job)); }

} // namespace

extern "C" void fxquant_quantize_leveled(const Job* job) {
    if (job->biases) in_pieces(*job, job->group, Leveled<Ints, true>(*job));
    else if (job->kind == 0) quantize_leveled<Ints>(*job);
    else if (job->kind == 1) quantize_leveled<Tables<4>>(*job);
    else if (job->kind == 2) quantize_leveled<Tables<6>>(*job);
    else quantize_leveled<Floats>(*job);
}
