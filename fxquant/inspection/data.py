"""What `inspect` finds: plain data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from fxquant.errors import FxquantError


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, or worth knowing."""

    place: str
    """A tensor, a module, a file; empty where it is about the whole checkpoint."""
    text: str
    severe: bool = True
    """Whether it keeps the checkpoint from being loaded, or makes its numbers wrong. Others are remarks."""


@dataclass(frozen=True)
class StoredFile:
    """A file with tensors of the model."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class StoredKind:
    """All tensors in the files that have one dtype; in GGUF, one type."""

    dtype: str
    tensors: int
    elements: int
    """Weights, where GGUF says how many a block has; else numbers of the dtype."""
    nbytes: int


@dataclass(frozen=True)
class HeldWeight:
    """A parameter of the model as the files hold it: of linears and quantized experts, one matrix each."""

    name: str
    """Of the module of a linear or of a matrix of an expert; of all other tensors, their own."""
    shape: tuple[int, ...]
    """`(N, K)` of linears and of matrices of experts."""
    kind: str
    """Class of the module that has it."""
    scheme: str | None
    """How it is quantized; None: it is not, or cannot be read."""
    dtype: str
    """Of its tensor in the files, the largest one if there are several; empty where there is none."""
    nbytes: int
    """In the files."""
    bits: float
    """Per weight: of all planes of the scheme, or of the tensor; 0 where neither is known."""
    note: str = ""
    """Why it is in full precision, or which other weight it is."""

    @property
    def weights(self) -> int:
        """Numbers that it stands for."""
        return math.prod(self.shape)


@dataclass(frozen=True, repr=False)
class Inspection:
    """What is in a checkpoint; `fxquant.checkpoint_tables` shows it as tables."""

    path: str
    format: str
    """`gptq`, `gguf`, `full precision`, `fxquant`: see `fxquant.families.detect.FAMILIES`; `unknown`."""
    variant: str
    """What the config calls the layout within that format; empty where there is but one."""
    settings: Mapping[str, Any]
    """Single values of what the config says about quantization; of GGUF, of its metadata."""
    producer: str
    """What made it, as far as it says so."""
    model: str
    """Class of transformers; empty where no model can be built of the config."""
    model_type: str
    dtype: str
    """Of the model, by its config."""
    parameters: int
    """Of the model, shared ones once."""
    tokenizer: bool
    """Whether there are files of one, or metadata."""
    files: tuple[StoredFile, ...]
    kinds: tuple[StoredKind, ...]
    weights: tuple[HeldWeight, ...]
    """In the order of the model; where there is no model, the tensors of the files."""
    found: tuple[Problem, ...]
    """Problems, and remarks."""
    complete: bool
    """Whether every tensor was read; False: schemes are those of the first matrix of each kind."""

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What keeps the checkpoint from being loaded, or makes its numbers wrong."""
        return tuple(one for one in self.found if one.severe)

    @property
    def remarks(self) -> tuple[Problem, ...]:
        """What else is worth knowing."""
        return tuple(one for one in self.found if not one.severe)

    @property
    def quantized(self) -> tuple[HeldWeight, ...]:
        """Weights whose scheme is known."""
        return tuple(one for one in self.weights if one.scheme is not None)

    @property
    def schemes(self) -> dict[str, int]:
        """How many weights are in each scheme."""
        return dict(Counter(one.scheme for one in self.weights if one.scheme is not None))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(kind.nbytes for kind in self.kinds)

    @property
    def bits_per_weight(self) -> float | None:
        """Bits per quantized weight, scales and zeros counted in; None where nothing is quantized."""
        count = sum(one.weights for one in self.quantized)
        return sum(one.bits * one.weights for one in self.quantized) / count if count else None

    @property
    def bits_per_parameter(self) -> float | None:
        """Bits of all tensors in the files per parameter of the model; None where the model is not known."""
        return 8 * self.nbytes / self.parameters if self.parameters else None

    def __repr__(self) -> str:
        """The most important of it in a line, and a line for each problem."""
        schemes = ", ".join(f"{count} in {scheme}" for scheme, count in self.schemes.items()) or "nothing quantized"
        lines = [f"{self.path}: {self.format}, {self.model or 'no model'}, {schemes}, {len(self.problems)} problems"]
        return "\n  ".join([*lines, *(f"{one.place or 'the checkpoint'}: {one.text}" for one in self.problems)])

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able data."""
        data = asdict(self)
        derived = ("nbytes", "bits_per_weight", "bits_per_parameter", "schemes")
        problems = {
            kind: [{"place": one.place, "text": one.text} for one in found]
            for kind, found in (("problems", self.problems), ("remarks", self.remarks))
        }
        del data["found"]
        return {**data, **{name: getattr(self, name) for name in derived}, **problems}


@dataclass
class Notes:
    """Collects problems and remarks, each once."""

    found: dict[Problem, None] = field(default_factory=dict)

    @property
    def problems(self) -> list[Problem]:
        """Those that are severe."""
        return [one for one in self.found if one.severe]

    def problem(self, place: str, text: object) -> None:
        """Something is wrong."""
        self.found[Problem(place, str(text))] = None

    def remark(self, place: str, text: str) -> None:
        """Something is worth knowing."""
        self.found[Problem(place, text, severe=False)] = None

    @contextmanager
    def noted(self, place: str = "") -> Iterator[None]:
        """Errors of fxquant become problems; all others are bugs, and stay errors."""
        try:
            yield
        except FxquantError as error:
            self.problem(place, error)

    def tried(self, call: Callable[[], Any], place: str = "") -> Any:
        """The result; None where an error of fxquant became a problem."""
        result = None
        with self.noted(place):
            result = call()
        return result
