"""Compiled libraries: built on first use, one of each kind per process, and whether a weight is worth it."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import resources

import torch
from torch import Tensor

from fxquant.inductor import compile_cpp, keeps_matrix_units

_SOURCES = (
    *("vectors.h", "bits.h", "job.h", "elements.h", "search.h", "lines.h", "levels.h", "pieces.h"),
    *("quantize.cpp", "offsets.cpp", "leveled.cpp", "global.cpp", "dequantize.cpp", "squares.cpp"),
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
    _add_to_paused(1)
    try:
        yield
    finally:
        _add_to_paused(-1)
        _smallest.reset(token)


PAUSED = ctypes.c_int64(0)
"""Not 0 while any thread has another limit than the default: what is known, `fxquant.native.known`, waits."""
_paused_lock = threading.Lock()


def _add_to_paused(number: int) -> None:
    with _paused_lock:
        PAUSED.value += number


smallest = _smallest.get
"""So many weights are enough for compiled code, where it is called."""


def serves(*tensors: Tensor) -> bool:
    """Whether these are plain CPU tensors, the first of them large enough, outside of any tracing."""
    return (
        tensors[0].numel() >= _smallest.get()
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in tensors)
        and not torch.compiler.is_compiling()
    )


def load(what: str, instead: str, *parts: Sequence[str], contract: bool) -> tuple[ctypes.CDLL, ...] | None:
    """Libraries that files of this package make, compiled side by side; None, after a warning, where one cannot be.

    Args:
        what: is compiled, for the warning.
        instead: what happens without it, for the warning.
        parts: of each library the names of its files, in the order in which they are one text.
        contract: whether a product and a sum may become one operation, which is rounded once.
    """
    # Kernels for pairs of bfloat16 are compiled where those for matrix units are not.
    denied = ("-U__AMX_BF16__",) if keeps_matrix_units() else ()
    flags = (*_FLAGS, *denied, f"-ffp-contract={'fast' if contract else 'off'}")

    def build(names: Sequence[str]) -> ctypes.CDLL:
        text = "\n".join((resources.files("fxquant.native") / name).read_text() for name in names)
        return compile_cpp(text, flags)

    try:
        # A compiler takes some 400 MB: no more of them than processors.
        with ThreadPoolExecutor(os.cpu_count()) as compilers:
            return tuple(compilers.map(build, parts))
    except Exception as error:  # a compiler can fail in any way, and nothing here depends on it
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(
            f"the C++ {what} of fxquant could not be compiled: {reason[0]}\n"
            f"  {instead}; see the C++ compiler that torch.compile needs on a CPU",
            stacklevel=3,
        )
        return None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled codecs; None, after a warning, where they cannot be compiled or loaded."""
    instead = "weights are quantized and dequantized by plain torch instead, several times slower"
    libraries = load("codecs", instead, _SOURCES, contract=False)
    if libraries is None:
        return None
    (built,) = libraries
    for name in _FUNCTIONS:
        function = getattr(built, name)
        function.argtypes, function.restype = [ctypes.c_void_p], None
    built.fxquant_squares.restype = None
    return built
