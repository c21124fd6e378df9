"""How far decoded weights are from the weights, compiled."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fxquant.native.job import DTYPES
from fxquant.native.library import library, serves


def squares(values: Tensor, weights: Tensor) -> tuple[float, float] | None:
    """The sums of `(value - weight)^2` and of `weight^2`, in float64; None for the reasons that `quantize` has.

    Args:
        values: float32 `[rows, columns]`, contiguous.
        weights: `[rows, columns]`, float32, bfloat16 or float16, the elements of a row side by side.
    """
    shape = values.shape
    if weights.dtype not in DTYPES or not serves(weights, values) or weights.shape != shape or not shape.numel():
        return None
    if not values.is_contiguous() or values.dtype != torch.float32 or weights.stride(1) != 1:
        return None
    built = library()
    if built is None:
        return None
    sums = (ctypes.c_double * 2)()
    size, number, pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
    built.fxquant_squares(
        pointer(values.data_ptr()),
        pointer(weights.data_ptr()),
        size(shape[0]),
        size(shape[1]),
        size(weights.stride(0)),
        number(DTYPES[weights.dtype]),
        number(torch.get_num_threads()),
        sums,
    )
    return sums[0], sums[1]
