"""Products that have been computed before are computed again without Python: `known.cpp`, to which ops come first."""

from __future__ import annotations

import ctypes
import functools
import threading
import warnings
from typing import Any

from fxquant.native.library import PAUSED, load

_INSTEAD = "every product starts in Python instead, which takes longer than some products"
LINEAR, GATED_EXPERTS = 0, 1
"""Kinds of ops, as `known.cpp` counts them."""
_lock = threading.Lock()


@functools.cache
def library() -> ctypes.CDLL | None:
    """What is known; None, after a warning, where it cannot be compiled."""
    libraries = load("way to the products", _INSTEAD, ("known.cpp",), contract=False)
    if libraries is None:
        return None
    (built,) = libraries
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    built.fxquant_remember.argtypes, built.fxquant_remember.restype = [pointer, pointer, *[size] * 4], None
    built.fxquant_go_first.argtypes, built.fxquant_go_first.restype = [ctypes.c_int, pointer], ctypes.c_char_p
    return built


@functools.cache
def _goes_first(kind: int) -> bool:
    """Whether the ops of a kind come to what is known first, from now on."""
    built = library()
    problem = built.fxquant_go_first(kind, ctypes.byref(PAUSED)) if built else b""
    if problem:
        warnings.warn(f"fxquant's ops could not be registered in C++: {problem.decode()}\n  {_INSTEAD}", stacklevel=2)
    return built is not None and not problem


def remember(kind: int, run: Any, jobs: ctypes.Structure | ctypes.Array[Any], columns: int, most: int) -> None:
    """Let the op whose kernel this thread is in be computed like this, when it comes again with the same weights.

    Args:
        kind: of the op.
        run: the compiled function.
        jobs: its first argument: one, or an array of them. It is copied; what it points to has to stay.
        columns: of the result.
        most: rows of x, or slots, for which this is right.
    """
    with _lock:
        built = library() if _goes_first(kind) else None
    if built is not None and not PAUSED.value:
        address = ctypes.cast(run, ctypes.c_void_p)
        count = len(jobs) if isinstance(jobs, ctypes.Array) else 1
        built.fxquant_remember(address, ctypes.byref(jobs), ctypes.sizeof(jobs), count, columns, most)
