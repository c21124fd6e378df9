"""The compiled library: built on first use, one per process, and whether a weight is worth it."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import resources

import torch
from torch import Tensor

from fxquant.inductor import compile_cpp

_SOURCES = (
    *("vectors.h", "bits.h", "job.h", "elements.h", "search.h", "lines.h", "levels.h", "pieces.h"),
    *("quantize.cpp", "offsets.cpp", "leveled.cpp", "global.cpp", "dequantize.cpp"),
)
_FUNCTIONS = (
    "fxquant_quantize",
    "fxquant_quantize_offsets",
    "fxquant_quantize_leveled",
    "fxquant_quantize_globally",
    "fxquant_dequantize",
)
# Inductor's own flags come before these. What it leaves on of -ffast-math treats -0 as 0; and it may be told, by its
# configuration, to do more of that.
_FLAGS = (
    "-w",
    "-fno-fast-math",
    "-fno-unsafe-math-optimizations",
    "-fno-associative-math",
    "-fno-reciprocal-math",
    "-fno-finite-math-only",
    "-fsigned-zeros",
    "-ffp-contract=off",
)
_smallest: ContextVar[float] = ContextVar("smallest", default=1 << 16)
"""Importing Inductor takes a second or two, in which plain torch has done with many small weights."""


@contextmanager
def from_size(weights: float) -> Iterator[None]:
    """Compiled codecs for tensors of at least so many weights only; infinity: plain torch for all.

    For the calling thread. The default is 65536. Planes and weights are the same with either, bit for bit, but for the
    scales that a least-squares search finds.
    """
    token = _smallest.set(weights)
    try:
        yield
    finally:
        _smallest.reset(token)


def serves(*tensors: Tensor) -> bool:
    """Whether these are plain CPU tensors, the first of them large enough, outside of any tracing."""
    return (
        tensors[0].numel() >= _smallest.get()
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in tensors)
        and not torch.compiler.is_compiling()
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None, after a warning, where they cannot be compiled or loaded."""
    try:
        source = "\n".join((resources.files("fxquant.native") / name).read_text() for name in _SOURCES)
        built = compile_cpp(source, _FLAGS)
    except Exception as error:  # a compiler can fail in any way, and nothing here depends on it
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(
            f"the C++ codecs of fxquant could not be compiled: {reason[0]}\n"
            "  weights are quantized and dequantized by plain torch instead, several times slower; see the C++ compiler"
            " that torch.compile needs on a CPU",
            stacklevel=2,
        )
        return None
    for name in _FUNCTIONS:
        function = getattr(built, name)
        function.argtypes, function.restype = [ctypes.c_void_p], None
    return built
