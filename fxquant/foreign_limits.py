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


def experts_note(to: str, names: Names, matrices: Iterable[Matrix], place: str) -> tuple[str, ...]:
    """What to say of experts that transformers would fill with random numbers: those that it does not stack itself.

    Raises:
        FileError: the format is bitsandbytes, of which nothing reads experts.
    """
    experts = {name for site in find_experts(names.model) for name, _, _ in site.linears()}
    found = [matrix.name for matrix in matrices if matrix.own in experts]
    if to == _BITSANDBYTES and found:
        raise FileError(
            f"{place} has {len(found)} matrices of experts, which transformers cannot read in {to}\n"
            f"  {found[0]} is one\n"
            "  leave them out of the recipe (-x '*.experts.*'), or choose another format"
        )
    strange = [name for name in found if names.renamed(f"{name}.weight")[1] is None]
    if to != _COMPRESSED or not strange:
        return ()
    return (
        f"transformers does not read {len(strange)} matrices of experts in {to}, such as {strange[0]}: it would fill "
        "them with random numbers, after a warning; fxquant.load reads them",
    )
