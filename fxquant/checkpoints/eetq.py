"""EETQ: int8 in the order of FasterTransformer's kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.checkpoints.source import FLOATS, Planes, Source
from fxquant.scheme import ROW

# Of 16 rows along K, the order that suits `ldmatrix` on 8-bit data (sm75 and later).
_ROWS = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)


def planes_of_eetq(tensors: Mapping[str, Tensor], n: int, k: int) -> Planes:
    """The planes of an EETQ linear, in the layout for sm75 and sm80.

    Args:
        tensors: `weight` (`qweight`) int8 `[K, N]`, `weight_scales` `[N]`, which multiply.
        n: output features, even.
        k: input features, a multiple of 64.

    Raises:
        CheckpointError: tensors that are not these.
    """
    source = Source("EETQ", tensors, n, k)
    source.require(n % 2 == 0 and k % 64 == 0, "N is odd, or K no multiple of 64")
    name = "qweight" if "qweight" in tensors else "weight"
    codes = _restored(source.take(name, torch.int8, (k, n)), n, k)
    scales = source.take("weight_scales", FLOATS, (n,), (n, 1), (1, n)).view(n, 1)
    scheme = source.scheme(element="int8", block=ROW, scale=FLOATS[scales.dtype])
    return source.finish(scheme, {"codes": codes, "scales": scales})


def _restored(stored: Tensor, n: int, k: int) -> Tensor:
    """int8 `[N, K]`.

    Codes have 128 added, the middle bytes of each four are swapped, runs of 64 along K of two columns alternate, and
    rows along K are permuted in sixteens.
    """
    octets = stored.view(torch.uint8).view(-1, 4)[:, [0, 2, 1, 3]]
    codes = (octets ^ 0x80).view(torch.int8)
    runs = codes.view(n // 2, k // 64, 2, 64).transpose(1, 2).reshape(n, k // 16, 16)
    out = torch.empty_like(runs)
    out[..., list(_ROWS)] = runs
    return out.view(n, k)
