// Products of codes, or of floats as whole numbers, and of many rows in float32.

extern "C" void fxquant_give_codes(Kernels* to) {
#ifdef FXQUANT_CODES
    to->single_codes = multiply<SingleCodes>;
    to->digit_codes = multiply<Codes<3>>;
#endif
#ifdef FXQUANT_AVX512
    to->tiles = multiply<Tiles>;
#endif
}
