// One weight and its planes. fxquant/native/job.py has the same fields in the same order.

struct Job {
    void* weight;      // [rows, columns], to read when quantizing and to write when dequantizing
    uint8_t* codes;    // [rows, bytes]: packed fields, or one code per byte
    void* scales;      // [rows, blocks]
    void* zeros;       // [rows, blocks]: integers as fields of a byte each, or of the type of the scales; or null
    void* biases;      // [rows, blocks] of the type of the scales, or null
    const float* values;   // of a table or float element, by code
    const float* sorted;   // of a table, by place: 64, the last one repeated
    const int32_t* places; // of a table, the code by place
    const float* bounds;   // of a table, between places: 63, infinite where there is no next
    void* scale_scales;    // [rows, groups], the second level of scales; of 8-bit codes one per 256; or null
    void* bias_scales;     // the same of biases, or null
    const uint8_t* levels; // of scales as 8-bit codes: the code of each of 65536 levels
    const float* code_values; // and the value of each code
    int64_t rows, columns, weight_stride, codes_stride, scales_stride; // strides in elements
    int64_t block;     // columns that share a scale
    int64_t first;     // number of the first row, where blocks run on from row to row, else 0
    int64_t group, groups_stride; // columns that share a second-level number
    int32_t dtype;     // of the weight: 0 float32, 1 bfloat16, 2 float16
    int32_t scale_type; // the same, 3: exponent of a power of two, 4: 8-bit codes
    int32_t zero_type; // 0 none, 1 integer, 2 of the type of the scales
    int32_t kind;      // 0 integer, 1 table of up to 16, 2 table of up to 64, 3 float
    int32_t bits, flip; // bits of a field; what a byte of one is xored with to be a code
    int32_t mantissa, exponent; // of a float: bits, and the smallest normal exponent
    int32_t search, threads; // 0 absmax, 1 least squares, 2 minmax
    int32_t turns;     // whether a search tries scales of both signs
    int32_t flat;      // blocks run on from row to row
    int32_t positive;  // scales are
    int32_t code_low, code_step, code_last, code_flip; // first level: `low + step * field`, up to the last field
    float low, high;   // the smallest and largest code of an integer, value of the others
    float floor, limit; // magnitudes of scales, of the second level where there are two
    float scale_offset; // of scales as 8-bit codes
    float offset_limit, offset_step; // the largest magnitude of float zeros and biases, and relative distance of two
};
