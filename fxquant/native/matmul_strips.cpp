// Products of few rows of floats, in strips.

#ifdef FXQUANT_BFLOAT16
namespace {

bool multiply_strips(const Product& job) {
    bool done = false;
    with_values(job, [&](auto values) {
        using Kernel = FloatStrips<values>;
        done = Kernel::takes(job) && multiply<Kernel>(job);
    });
    return done;
}

} // namespace
#endif

extern "C" void fxquant_give_strips(Kernels* to) {
#ifdef FXQUANT_AVX512
    to->strips = multiply<Strips>;
#endif
#ifdef FXQUANT_BFLOAT16
    to->float_strips = multiply_strips;
#endif
#ifdef FXQUANT_CODES
    to->digit_strips = multiply<DigitStrips>;
#endif
}
