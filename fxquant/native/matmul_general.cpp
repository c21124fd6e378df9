// Products by `Kernel`, with every element.

namespace {

template <bool AFFINE> void multiply_wide(const Product& job) {
    if (job.bits == 5) multiply<Kernel<Wide<5, AFFINE>>>(job);
    else if (job.bits == 6) multiply<Kernel<Wide<6, AFFINE>>>(job);
    else if (job.low) multiply<Kernel<Signed8<AFFINE>>>(job);
    else multiply<Kernel<Wide<8, AFFINE>>>(job);
}

bool multiply_generally(const Product& job) {
    if (job.bits == 1) multiply<Kernel<Few<1>>>(job);
    else if (job.bits == 2) multiply<Kernel<Few<2>>>(job);
    else if (job.bits == 3) multiply<Kernel<Few<3>>>(job);
    else if (job.bits == 4) multiply<Kernel<Few<4>>>(job);
    else if (job.kind == 1) multiply<Kernel<Table6>>(job);
    else if (job.kind == 2) multiply<Kernel<Float8<true>>>(job);
    else if (job.kind == 3) multiply<Kernel<Float8<false>>>(job);
    else if (job.zero) multiply_wide<true>(job);
    else multiply_wide<false>(job);
    return true;
}

} // namespace

extern "C" void fxquant_give_general(Kernels* to) { to->general = multiply_generally; }
