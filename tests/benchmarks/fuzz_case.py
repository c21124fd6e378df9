"""One damaged checkpoint: what `load` makes of it, how long it takes and how much memory."""

from __future__ import annotations

import functools
import os
import random
import re
import shutil
import signal
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoint_mutations import MARKER, MUTATIONS, Mutation
from safetensors import SafetensorError
from tensor_mutations import TENSOR_MUTATIONS
from torch import Tensor, nn

import fxquant
from fxquant.errors import FxquantError
from fxquant.expert_modules import QExperts
from fxquant.modules import QLinear

KINDS: Mapping[str, Mutation] = {**MUTATIONS, **TENSOR_MUTATIONS}
SAFETENSORS = {"header_bytes", "data_bytes", "header_length", "header_offsets", "header_declared", "metadata", "shards"}
SAFETENSORS |= {kind for kind in TENSOR_MUTATIONS if not kind.startswith("gguf")}
SECONDS = 10
GROWTH = 1 << 30
"""What a case may take, in time and bytes."""
TOKENS = 14
VALUES_CHANGE = {
    "header_bytes",
    "gguf_table",
    "data_bytes",
    "odd_floats",
    "odd_integers",
    "noise",
    "tensor_swapped",
    "tensor_transposed",
    "gguf_bytes",
    "header_offsets",
}
VALUES_CHANGE |= {"tensor_resized", "tensor_cast", "tensor_reshaped", "header_declared"}
"""Kinds after which a file may hold any numbers, such as are not finite: what comes of them may be so as well."""
CONFIG_CHANGES = {"config_sizes", "config_method", "gguf_metadata", "gguf_names", "side_file"} | {
    kind for kind in KINDS if kind.startswith("json_")
}
"""Kinds that may describe another model that has the same tensors, and that cannot run: more experts for a token."""
_NO_MEMORY = re.compile(r"MemoryError|can.t allocate memory|not enough memory|[Cc]annot allocate memory|Unable to mmap")


class TooLong(BaseException):
    """No Exception, so that nobody takes it for a fault of the file."""


@dataclass
class Result:
    """What became of a case."""

    source: str
    kind: str
    seed: str
    what: str = ""
    outcome: str = ""
    """`loads`; `loads, other logits`, `... not finite`, `... cannot run`; or the class of an error."""
    text: str = ""
    problem: str = ""
    """Why this must not be; empty where all is well."""
    seconds: float = 0.0
    growth: int = 0


def run_case(folder: Path, kind: str, seed: str, load: Callable[..., nn.Module] = fxquant.load) -> Result | None:
    """Damage a copy of a checkpoint, and load it; None where it has nothing that could be damaged in this way."""
    undamaged = undamaged_logits(folder)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as made:
        copy = Path(made) / "model"
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("expected.safetensors", "meta.json"))
        for path in (copy, *copy.iterdir()):
            path.chmod(0o755)
        what = KINDS[kind](copy, random.Random(seed))
        if what is None:
            return None
        result = Result(folder.name, kind, seed, what)
        files = sorted(copy.glob("*.gguf"))
        path = files[0] if len(files) == 1 and seed[-1] in "02468" else copy
        _measure(result, lambda: load(path, progress=False), undamaged)
        if any(path.exists() for path in (copy / MARKER, Path(made) / MARKER)):
            result.problem = "code of the checkpoint has run"
    return result


def _measure(result: Result, load: Callable[[], nn.Module], undamaged: Tensor) -> None:
    before, start = _reset_peak(), time.perf_counter()
    try:
        model = _limited(load)
        result.outcome = "loads"
        result.problem, logits = check(model)
        result.outcome, result.text = _judged(result, logits, undamaged)
    except FxquantError as error:
        result.outcome, result.text = type(error).__name__, str(error)
        result.problem = _hidden(error)
    except TooLong:
        result.outcome, result.problem = "too long", f"more than {SECONDS} s\n{traceback.format_exc()[-1500:]}"
    except Exception as error:
        result.outcome, result.text = type(error).__name__, str(error)
        result.problem = traceback.format_exc()[-2500:]
    result.seconds, result.growth = time.perf_counter() - start, max(0, _peak() - before)
    if result.growth > GROWTH:
        result.problem = result.problem or f"{result.growth >> 20} MiB more memory"


def _judged(result: Result, logits: Tensor | str, undamaged: Tensor) -> tuple[str, str]:
    """Outcome and text for a model that was loaded; sets the problem where it must not be so."""
    if isinstance(logits, str):
        if result.kind not in CONFIG_CHANGES | {"tensor_cast"}:  # own files tell the dtype of each tensor
            result.problem = result.problem or f"a model that cannot run: {logits}"
        return "loads, cannot run", logits
    if not bool(logits.isfinite().all()):
        if result.kind not in CONFIG_CHANGES | VALUES_CHANGE:
            result.problem = result.problem or "a model whose logits are not finite"
        return "loads, not finite", ""
    if logits.shape == undamaged.shape and torch.allclose(logits, undamaged, rtol=1e-3, atol=1e-3):
        return "loads", ""
    if result.kind not in CONFIG_CHANGES | VALUES_CHANGE:
        result.problem = result.problem or "a model with other logits, by files that say the same or cannot be read"
    return "loads, other logits", ""


@functools.lru_cache(maxsize=64)
def undamaged_logits(folder: Path) -> Tensor:
    """What the model of a checkpoint gives when nothing is wrong with it."""
    logits = check(fxquant.load(folder, progress=False))[1]
    assert isinstance(logits, Tensor), logits
    return logits


def _hidden(error: BaseException) -> str:
    """What an error that is well-behaved hides: memory that was not there, faults of fxquant's own."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    text = " ".join(f"{type(one).__name__}: {one}" for one in chain)
    if _NO_MEMORY.search(text):
        return f"it asked for too much memory: {text[:300]}"
    for one in chain:
        if not isinstance(one, (FxquantError, SafetensorError, OSError)) and one.__traceback__ is not None:
            frame = traceback.extract_tb(one.__traceback__)[-1]
            # a function mode passes on what torch says to transformers
            if os.path.dirname(fxquant.__file__) in frame.filename and frame.name != "__torch_function__":
                return f"{type(one).__name__} of fxquant itself, at {frame.filename}:{frame.lineno}: {one}"
    return ""


def check(model: nn.Module) -> tuple[str, Tensor | str]:
    """What is wrong with a model that was loaded; and its logits, or why there are none."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            return f"{name} was never loaded", ""
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            specs = module.scheme.planes(module.out_features, module.in_features)
            found = {key: (tuple(plane.shape), plane.dtype) for key, plane in module.planes.items()}
            if found != {key: (spec.shape, spec.dtype) for key, spec in specs.items()}:
                return f"{name} has planes that are not those of {module.scheme}", ""
        elif isinstance(module, QExperts) and module.members_problem():
            return f"{name}: {module.members_problem()}", ""
    return "", _logits(model)


def _logits(model: Any) -> Tensor | str:
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(TOKENS).view(1, -1) % max(1, min(vocabulary, 256))
    try:
        with torch.no_grad():
            logits: Tensor = _limited(lambda: model(ids, use_cache=False).logits)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return logits.float() if tuple(logits.shape) == (1, TOKENS, vocabulary) else f"logits {list(logits.shape)}"


def _limited(call: Callable[[], Any]) -> Any:
    def stop(_: int, frame: types.FrameType | None) -> None:
        raise TooLong

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _reset_peak() -> int:
    """Bytes that are in use now; the peak starts from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def kinds_for(folder: Path) -> list[str]:
    """The mutations that a checkpoint can have."""
    gguf = any(folder.glob("*.gguf"))
    return [kind for kind in KINDS if (kind not in SAFETENSORS if gguf else not kind.startswith("gguf"))]


def cases(folders: Sequence[Path], count: int, seed: int) -> Iterator[tuple[Path, str, str]]:
    """Checkpoint, kind and seed of each case: checkpoints in turn, and of each one all kinds in turn."""
    kinds = [kinds_for(folder) for folder in folders]
    for i in range(count):
        at = i % len(folders)
        yield folders[at], kinds[at][(i // len(folders) + 5 * at) % len(kinds[at])], f"{seed}:{i}"
