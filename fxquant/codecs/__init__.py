"""Between float weights and planes: `quantize` and `dequantize`, for every scheme there is."""

from fxquant.codecs.decode import dequantize, squared_error
from fxquant.codecs.encode import check_search, check_values, quantize
from fxquant.codecs.finite import all_finite
from fxquant.codecs.search import SCALE_SEARCHES, ScaleSearch

__all__ = [
    "SCALE_SEARCHES",
    "ScaleSearch",
    "all_finite",
    "check_search",
    "check_values",
    "dequantize",
    "quantize",
    "squared_error",
]
