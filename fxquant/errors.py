"""Every error that is the caller's or a file's fault. One voice: the fact, the place, what was there, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxquantError(Exception):
    """Base of all errors raised by fxquant on purpose; anything else is a bug in fxquant."""


class SchemeError(FxquantError):
    """A scheme that does not exist, contradicts itself, or cannot hold a weight of the given shape."""


class RecipeError(FxquantError):
    """A recipe that cannot be read, or whose rules do not fit the model."""


class ModelError(FxquantError):
    """A model that cannot be quantized as asked: not a module, quantized already, weights not finite."""


class CaptureError(FxquantError):
    """A model that `torch.export` cannot turn into one graph, or that needs example inputs."""


class RewriteError(FxquantError):
    """A pass that left the graph illegal, or that failed; names the pass and those that ran before it."""


class FileError(FxquantError):
    """A path that cannot be read or written, or a file that does not hold what its name promises."""


class CheckpointError(FxquantError):
    """Tensors of a quantized checkpoint that are not what their format says, or that fxquant cannot express."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """The known names most like `word`, as the end of a sentence: `"; did you mean a, b?"`, or nothing."""
    close = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=count, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
