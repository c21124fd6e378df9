// From weights to planes with float zeros, `(code - zero) * scale`, or biases, `code * scale + bias`, of one level.

namespace {

struct Offsets {
    const Job& job;
    const Ints element;
    const Scales scales, offsets;
    const LineGrid grid;

    explicit Offsets(const Job& j)
        : job(j), element(j), scales{j.scale_type, j.floor, j.limit},
          offsets{j.scale_type, 0, j.offset_limit}, grid(j) {}

    struct Stored {
        uint32_t scale, offset;
        float value, shift; // of the scale, and of the bias or zero
    };

    void operator()(int64_t row, int64_t start, int64_t stop, const Room& room) const {
        const bool as_zeros = job.zero_type == 2;
        for (int64_t c = start; c < stop; c += job.block) {
            const int64_t n = stop - c < job.block ? stop - c : job.block;
            take(job, row, c, n, room.x);
            const Stored found = choose(room.x, room.t, n);
            const int64_t at = row * job.scales_stride + c / job.block;
            scales.put(job.scales, at, found.scale);
            offsets.put(as_zeros ? job.zeros : job.biases, at, found.offset);
            encode(job, element, room.x, n, found.value, as_zeros ? 0 : found.shift, as_zeros ? found.shift : 0,
                   job.flat && n < job.block, room.fields + (c - start));
        }
        pack_piece(job, row, start, stop, room.fields);
    }

    Stored choose(const float* x, float* t, int64_t n) const {
        const Range range = span(x, n);
        if (job.search == 1) return least_squares(x, t, n, range);
        return job.search ? spanning(range) : spanning({smaller(range.low, 0), larger(range.high, 0)});
    }

    // The rules of fxquant/codecs/{affine,offsets}.py, to the last bit.
    Stored spanning(Range r) const {
        // Of the halves, because the difference can be more than float32 holds.
        const float scale = (r.high / 2 - r.low / 2) / ((job.high - job.low) / 2), bias = r.low - scale * job.low;
        Stored found = with_scale(held(scale, bias));
        return with_bias(found, bias + (scale - found.value) * job.low);
    }

    // A scale so large that the zero is within reach, and rounded to less than a step; 1 step for a constant.
    float held(float scale, float bias) const {
        if (job.zero_type != 2) return scale;
        const float size = std::fabs(bias);
        return scale > 0 ? larger(scale, size * job.offset_step) : size;
    }

    Stored with_scale(float scale) const {
        const uint32_t code = scales.encode(scale);
        return {code, 0, scales.decode(code), 0};
    }

    Stored with_bias(Stored found, float bias) const {
        if (job.zero_type == 2) bias = -bias * (1 / bounded(found.value));
        found.offset = offsets.encode(bias);
        found.shift = offsets.decode(found.offset);
        return found;
    }

    float bias(const Stored& found) const {
        return job.zero_type == 2 ? -found.shift * found.value : found.shift;
    }

    Stored least_squares(const float* x, float* t, int64_t n, Range range) const {
        const Range with_zero = {smaller(range.low, 0), larger(range.high, 0)};
        if (larger(-with_zero.low, with_zero.high) < SMALLEST) return spanning(with_zero);
        const float middle = range.low / 2 + range.high / 2, half = range.high / 2 - range.low / 2;
        const float unit = bounded(larger(half, larger(-with_zero.low, with_zero.high) * 1e-6f)), inverse = 1 / unit;
        for (int64_t i = 0; i < n; i += LANES) store(t + i, (load(x + i) - middle) * all(inverse));
        const LineSearch<Ints> search(element, job, t, n, INFINITY);
        const Range ends = {(range.low - middle) * inverse, (range.high - middle) * inverse};
        const Line line = best_line(search, grid, ends);
        Stored candidates[] = {spanning(with_zero), spanning(range), {}};
        Stored& last = candidates[2];
        const float found = line.bias * unit + middle, scale = line.scale * unit;
        last = with_scale(held(scale, found));
        // The mean of the weights stays where it is when the scale is rounded.
        const float mean = search.norms.sum / (float)n * unit + middle;
        last = with_bias(last, found + (scale - last.value) * ((mean - found) / bounded(scale)));
        float scales[3], biases[3], error[3];
        for (int i = 0; i < 3; i++) {
            scales[i] = candidates[i].value * inverse;
            biases[i] = (bias(candidates[i]) - middle) * inverse;
        }
        errors(element, job, t, n, scales, biases, error);
        int best = 0;
        for (int i = 1; i < 3; i++) best = error[i] < error[best] ? i : best;
        return candidates[best];
    }
};

} // namespace

extern "C" void fxquant_quantize_offsets(const Job* job) { in_pieces(*job, job->block, Offsets(*job)); }
