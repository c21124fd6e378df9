"""Why `torch.export` could not capture a model, in a sentence instead of its page."""

from __future__ import annotations

import contextlib
import io
import logging
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

_MESSAGE = 240
"""Characters of a foreign message that are worth a reader's time."""
_OURS = (Path(torch.__file__).parent, Path(__file__).parent)
_STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep back what torch warns of, logs and prints to stderr in an export: the reason says what matters of it."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def reason(model: nn.Module, error: Exception, derived: Mapping[str, object] | None = None) -> str:
    """One paragraph: that `model` cannot be captured, why, and the line of its code where it happened.

    Args:
        model: the model.
        error: what the export raised.
        derived: the example inputs, where nobody gave them: they may be what is wrong.
    """
    lines = [f"{type(model).__name__} cannot be captured as one graph: {_why(error)}"]
    place = _place(error)
    if place:
        lines.append(f"  at {place}")
    if derived is not None and not hasattr(error, "cond"):
        shapes = (f"{name} {list(value.shape)}" for name, value in derived.items() if isinstance(value, Tensor))
        lines.append(f"  tried with {', '.join(shapes)}; pass example_inputs={{...}} if the model takes others")
    return "\n".join(lines)


def _why(error: Exception) -> str:
    if hasattr(error, "cond"):
        return f"what it computes depends on the values of a tensor ({error.cond})"
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {message[:_MESSAGE]}" if message else type(error).__name__


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
