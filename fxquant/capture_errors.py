"""Why `torch.export` could not capture a model, in a sentence instead of its page."""

from __future__ import annotations

import contextlib
import io
import logging
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

_MESSAGE = 240
"""Characters of a foreign message that are worth a reader's time."""
_OURS = (Path(torch.__file__).parent, Path(__file__).parent)
_STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep back what torch logs and prints to stderr about a failing export: the reason says what matters of it."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def reason(model: nn.Module, error: Exception) -> str:
    """One paragraph: that `model` cannot be captured, why, and the line of its code where it happened."""
    place = _place(error)
    expression = getattr(error, "cond", None)
    if expression is not None:
        why = f"what it computes depends on the values of a tensor ({expression})"
    else:
        message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        why = f"{type(error).__name__}: {message[:_MESSAGE]}" if message else type(error).__name__
    return f"{type(model).__name__} cannot be captured as one graph: {why}" + (f"\n  at {place}" if place else "")


def _place(error: BaseException) -> str | None:
    """The innermost line of code that is neither torch's, fxquant's nor the standard library's."""
    frames: list[traceback.FrameSummary] = []
    link: BaseException | None = error
    while link is not None:
        frames += [frame for frame in traceback.extract_tb(link.__traceback__) if _is_foreign(Path(frame.filename))]
        link = link.__cause__ or link.__context__
    if not frames:
        return None
    last = frames[-1]
    return f"{Path(last.filename).name}:{last.lineno} in {last.name}: {last.line}"


def _is_foreign(path: Path) -> bool:
    if any(path.is_relative_to(folder) for folder in _OURS) or not path.is_absolute():
        return False
    return "site-packages" in path.parts or not path.is_relative_to(_STANDARD_LIBRARY)
