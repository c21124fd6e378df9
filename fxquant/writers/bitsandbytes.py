"""bitsandbytes, as transformers saves it: all linears in 4 bits, or all in 8."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from fxquant.checkpoint_contents import Contents, Fit, Matrix, Unit, Writer
from fxquant.checkpoints.bitsandbytes_tensors import (
    BLOCK_SIZES,
    bnb4_obstacles,
    bnb8_obstacles,
    tensors_of_bnb4,
    tensors_of_bnb8,
)
from fxquant.errors import FileError
from fxquant.scheme import ROW, Activation, Block, Scheme
from fxquant.writers.nearest import alike, choose, code_bits
from fxquant.writers.settings import check_left_out, compute_dtype, left_out, require_quantized
from fxquant.writers.units import TensorsOf, all_units

_LABEL = "bitsandbytes"
_TABLES = ("nf4", "fp4")
_THRESHOLD, _BLOCK = 6.0, 64
"""What bitsandbytes has by default."""


def fit(matrices: Mapping[str, Matrix]) -> dict[str, Fit]:
    """All matrices in 8 bits where most weights have codes of more than 4 bits, and otherwise in 4.

    In 4 bits: the same scheme where it is `nf4` or `fp4` in blocks of 32, 64, ... 4096 of the flattened weight, with
    fp32 scales, or with double quantization. Else the same codes in such blocks with fp32 scales; or else `nf4` in
    the largest such blocks within its own, at least 32, and 64 where those are whole rows. What has more than 4 bits
    stays in full precision rather than lose some.

    In 8 bits: symmetric integers with one scale for each row, inputs as in LLM.int8, with the outliers' threshold
    that most have. Scales are stored times 127, and may change in the last place.
    """
    weights = sum(matrix.n * matrix.k for matrix in matrices.values())
    if 2 * sum(matrix.n * matrix.k for matrix in matrices.values() if _is_wide(matrix.scheme)) > weights:
        inputs = Activation("int8", threshold=_threshold(matrices))
        fit_of = functools.cache(functools.partial(_fit8, inputs))
    else:
        fit_of = functools.cache(_fit4)
    return {key: fit_of(matrix.scheme, matrix.n, matrix.k) for key, matrix in matrices.items()}


def _is_wide(scheme: Scheme) -> bool:
    return code_bits(scheme) > 4


def _threshold(matrices: Mapping[str, Matrix]) -> float:
    inputs = [matrix.scheme.activation for matrix in matrices.values()]
    found = Counter(each.threshold for each in inputs if each and each == Activation("int8", threshold=each.threshold))
    return found.most_common(1)[0][0] if found else _THRESHOLD


def _fit4(scheme: Scheme, n: int, k: int) -> Fit:
    if _is_wide(scheme):
        return Fit(None, f"{_LABEL} has 4-bit codes in all linears of this checkpoint, not {scheme.element}")
    own = max(scheme.block.columns or _BLOCK, BLOCK_SIZES[0])
    size = max(size for size in BLOCK_SIZES if size <= own)
    element = scheme.element if scheme.element in _TABLES else "nf4"
    others = itertools.chain(alike(scheme, ("fp32",)), [Scheme(element, Block(1, size, flat=True), "fp32")])
    return choose(_LABEL, scheme, n, k, bnb4_obstacles, others)


def _fit8(inputs: Activation, scheme: Scheme, n: int, k: int) -> Fit:
    obstacles = functools.partial(bnb8_obstacles, threshold=inputs.threshold)
    like = [replace(other, activation=inputs) for other in alike(scheme.weight_only, ("fp32",))]
    fitted = choose(_LABEL, scheme, n, k, obstacles, [*like, Scheme("int8", ROW, "fp32", activation=inputs)])
    stored = "scales are stored times 127, and may change in the last place"
    return Fit(fitted.scheme, f"{fitted.reason}; {stored}" if fitted.reason else stored)


def units(contents: Contents) -> Iterator[Unit]:
    """The tensors of each matrix, and all other tensors.

    Raises:
        FileError: there is no quantized matrix, or some have 4 bits and some 8.
    """
    return all_units(contents, _tensors_of(contents))


def config(contents: Contents) -> dict[str, Any]:
    """As transformers writes it; of 4-bit linears the most common settings, for their tensors tell their own.

    Raises:
        FileError: there is no quantized matrix; some have 4 bits and some 8, or other thresholds; or one in full
            precision has a name that is the end of that of a quantized one.
    """
    four = not _is_eight(contents)
    excluded = left_out(contents)
    check_left_out(contents, excluded)
    schemes = [matrix.scheme for matrix in contents.matrices.values()]
    element, double = Counter((s.element, s.double) for s in schemes).most_common(1)[0][0]
    return {
        "quant_method": _LABEL,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_quant_type": element if four else "fp4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": str(compute_dtype(contents)).removeprefix("torch.") if four else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": _THRESHOLD if four else _one_threshold(contents),
        "llm_int8_skip_modules": excluded,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def _tensors_of(contents: Contents) -> TensorsOf:
    eight, dtype = _is_eight(contents), compute_dtype(contents)
    written: TensorsOf = tensors_of_bnb8 if eight else functools.partial(tensors_of_bnb4, dtype=dtype)
    return written


def _is_eight(contents: Contents) -> bool:
    require_quantized(contents, _LABEL)
    four = {matrix.scheme.element in _TABLES: matrix for matrix in contents.matrices.values()}
    if len(four) == 2:
        raise FileError(
            f"{contents.path}: a checkpoint of bitsandbytes has 4 bits in all linears, or 8: {four[True].name} is "
            f"{four[True].scheme}, and {four[False].name} is {four[False].scheme}\n  give all linears the same"
        )
    return False in four


def _one_threshold(contents: Contents) -> float:
    found = {m.scheme.activation.threshold: m for m in contents.matrices.values() if m.scheme.activation}
    if len(found) > 1:
        one, other, *_ = found.values()
        raise FileError(
            f"{contents.path}: a checkpoint of bitsandbytes has one threshold of outliers: {one.name} is {one.scheme}, "
            f"and {other.name} is {other.scheme}\n  give all linears the same"
        )
    return next(iter(found), _THRESHOLD)


WRITER_OF_BITSANDBYTES = Writer(fit, units, config)
