// A product of rows of x with planes. fxquant/native/matmul_job.py has the same fields in the same order.

// One number per block: scales, zeros or biases. Strides in bytes; a second level has one number for `per` blocks.
struct Level {
    const void* stored;
    const void* outer;
    const float* table;  // of type 5: the value of a byte
    const float* offset; // added to the product of both levels, or null
    int64_t stride, expert, outer_stride, outer_expert, offset_expert;
    int64_t rows, outer_rows; // rows of the weight for a row of the grid
    int64_t per;
    int64_t flat;       // blocks of a row, where those of the second level run on from row to row; else 0
    int32_t type;       // 0 float32, 1 bfloat16, 2 float16, 3 power of two, 4 e4m3, 5 table, 6 integer, 7 none
    int32_t bits, flip; // of a field, and what it is xored with, of type 6
    int32_t outer_type; // as type: 0 to 2, or 7
    float low, step;    // of type 6
};

struct Product {
    const void* x;
    void* y;
    const void* addend;   // the bias, or null
    const uint8_t* codes;
    const float* values;  // by code, as many as there are patterns, at least 16
    const int64_t* ids;   // the expert of every slot, or null
    Level scales, offsets;
    int64_t slots, picks; // rows of y, and how many of them share a row of x
    int64_t experts, rows, columns, block; // `columns` of a weight, `block` of them under one scale
    int64_t x_stride, y_stride, addend_expert; // elements
    int64_t codes_stride, codes_expert;        // bytes
    const float* x_scales; // of codes of x, or the one of all codes that are made
    int64_t x_scales_stride, x_group; // elements from row to row; columns of x under one scale
    int32_t dtype, x_type, addend_type; // of y, of x and of the bias: 0 float32, 1 bfloat16, 2 float16
    int32_t kind;       // 0 integer, 1 table, 2 e4m3, 3 e5m2
    int32_t bits, low;  // of a field; the integer that the field 0 stands for
    int32_t zero;       // 0 none, 1 subtracted before the scale, 2 added behind it
    int32_t x_codes;    // 0 x is floats; 1 it is codes; 2 codes are made of it, 3 with the scale that is there
    int32_t threads;
};

// A layer of experts with a gate: two products, and what is between and behind them.
struct Gated {
    Product first, second; // of all that x has in common with the job; y of the first is x of the second
    const void* weights;   // of every slot, contiguous
    void* y;               // [tokens, rows of the second]
    int32_t weights_type, dtype;
};
