// What multiplies: kernels of several libraries, which as many compilers make at once. False, and nothing is written, where
// rows of x or blocks of the weight are not for a kernel. Null, where the processor has no instructions for it.

struct Kernels {
    bool (*general)(const Product&);
    bool (*strips)(const Product&);        // float32: few rows
    bool (*tiles)(const Product&);         // float32: many rows
    bool (*float_strips)(const Product&);  // pairs of bfloat16: few rows
    bool (*float_words)(const Product&);   // pairs of bfloat16: many rows
    bool (*digit_strips)(const Product&);  // floats as whole numbers: one or two rows
    bool (*digit_codes)(const Product&);   // floats as whole numbers: more rows
    bool (*single_codes)(const Product&);  // codes of x: few rows
    bool (*code_words)(const Product&);    // codes of x: many rows
    bool (*tiled_floats)(const Product&);  // matrix units
    bool (*tiled_codes)(const Product&);   // matrix units, codes of x
};
