"""What transformers cannot read of its own quantizers' formats, though the formats have a place for it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from fxquant.checkpoint_contents import Fit, Matrix
from fxquant.errors import FileError
from fxquant.experts import find_experts
from fxquant.linears import find_linears
from fxquant.transformers_weights import Names

_BITSANDBYTES, _COMPRESSED = "bitsandbytes", "compressed-tensors"


def kept_linears(to: str, model: nn.Module, matrices: Iterable[Matrix]) -> dict[str, Fit]:
    """Linears that have to stay in full precision, by the names of matrices, and why.

    transformers makes quantized modules of plain linears alone: for compressed-tensors not of `Conv1D`, for
    bitsandbytes of no other subclass, nor of those that it keeps in float32.
    """
    if to not in (_BITSANDBYTES, _COMPRESSED):
        return {}
    linears = {site.name: site for site in find_linears(model)}
    kept32 = [*(getattr(model, "_keep_in_fp32_modules", None) or ())]
    found = {}
    for matrix in matrices:
        site = linears.get(matrix.own)
        if site is None:
            continue
        kind = type(site.module)
        if (to == _COMPRESSED and site.transposed) or (
            to == _BITSANDBYTES and kind is not nn.Linear and not site.transposed
        ):
            found[matrix.name] = Fit(None, f"transformers reads no {kind.__name__} in {to}")
        elif to == _BITSANDBYTES and any(re.search(rf"(^|\.){name}(\.|$)", matrix.own) for name in kept32):
            found[matrix.name] = Fit(None, "transformers keeps it in float32")
    return found


def check_experts(to: str, names: Names, matrices: Iterable[Matrix], place: str) -> None:
    """Refuse experts that transformers would fill with random numbers, or stumble over.

    Of bitsandbytes it reads none, of compressed-tensors those that it stacks out of single linears.

    Raises:
        FileError: there are such.
    """
    if to not in (_BITSANDBYTES, _COMPRESSED):
        return
    experts = {name for site in find_experts(names.model) for name, _, _ in site.linears()}
    strange = [
        matrix.name
        for matrix in matrices
        if matrix.own in experts and (to == _BITSANDBYTES or names.renamed(f"{matrix.name}.weight")[1] is None)
    ]
    if strange:
        raise FileError(
            f"{place} has {len(strange)} matrices of experts, which transformers cannot read in {to}\n"
            f"  {strange[0]} is one\n"
            "  leave them out of the recipe (-x '*.experts.*'), or choose fxquant, gguf or, for gpt-oss, gpt-oss"
        )
