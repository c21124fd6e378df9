"""Between float weights and planes: `quantize` and `dequantize`, for every scheme there is."""

from fxquant.codecs.codec import (
    SCALE_SEARCHES,
    ScaleSearch,
    all_finite,
    dequantize,
    quantize,
    squared_error,
)

__all__ = ["SCALE_SEARCHES", "ScaleSearch", "all_finite", "dequantize", "quantize", "squared_error"]
