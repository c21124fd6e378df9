"""What was quantized, as data and as a table: sizes, bits and errors of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fxquant.plans import merged_name, name_pattern, without_numbers
from fxquant.scheme import Scheme
from fxquant.speed_notes import Multiplied, speed_notes
from fxquant.tables import Table, bytes_text

_WORST = 3


@dataclass(frozen=True)
class LayerReport:
    """One quantized linear, or one quantized matrix of one expert of a stack."""

    name: str
    kind: Literal["linear", "expert"]
    n: int
    """Output features."""
    k: int
    """Input features."""
    scheme: str
    bytes_before: int
    """Bytes of the weight in full precision."""
    bytes_after: int
    """Bytes of all its planes."""
    error: float | None
    """Relative squared error |W - W'|^2 / |W|^2; None where it was not measured on this model."""

    @property
    def bits(self) -> float:
        """Bits per weight, scales and zeros counted in."""
        return 8 * self.bytes_after / max(self.n * self.k, 1)

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise ratio of the weight in dB: -10 log10(error)."""
        return sqnr_db(self.error)


@dataclass(frozen=True)
class Kept:
    """One matmul weight in full precision."""

    name: str
    weights: int
    nbytes: int
    reason: str
    kind: Literal["linear", "expert", "stacked", "bare"] = "linear"
    """As in `fxquant.plans.PlanEntry`; of a stack of experts, of which none is quantized, `stacked`."""


@dataclass(frozen=True)
class Report:
    """What is quantized in a model, what is not, and what that costs; `print(report)` shows it as a table."""

    model: str
    """Class of the model."""
    layers: tuple[LayerReport, ...]
    kept: tuple[Kept, ...]
    parameters: int
    """All parameters of the model, quantized weights counted in, shared ones once."""
    model_bytes_after: int
    """Bytes of all parameters and buffers as they are now."""

    @property
    def weights(self) -> int:
        """Number of quantized weights."""
        return sum(layer.n * layer.k for layer in self.layers)

    @property
    def bytes_before(self) -> int:
        """Bytes of the quantized weights in full precision."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the planes of the quantized weights."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def model_bytes_before(self) -> int:
        """Bytes of all parameters and buffers before quantization."""
        return self.model_bytes_after - self.bytes_after + self.bytes_before

    @property
    def ratio(self) -> float:
        """How many times smaller the quantized weights are."""
        return self.bytes_before / self.bytes_after

    @property
    def bits_per_weight(self) -> float:
        """Bits per quantized weight, scales and zeros counted in."""
        return 8 * self.bytes_after / self.weights

    @property
    def coverage(self) -> float:
        """Share of the weights of linears and experts that is quantized, 0 to 1."""
        return self.weights / (self.weights + sum(kept.weights for kept in self.kept))

    def worst(self, count: int = _WORST) -> list[LayerReport]:
        """The layers with the largest relative error, worst first."""
        return sorted((x for x in self.layers if x.error is not None), key=lambda x: -(x.error or 0.0))[:count]

    def table(self, *, full: bool = False) -> Table:
        """The report as a table; unless `full`, layers that differ in the numbers of their names share a row."""
        groups: dict[Any, list[LayerReport]] = {}
        for x in self.layers:
            key = x.name if full else (name_pattern(x.name), x.n, x.k, x.scheme, x.bytes_before)
            groups.setdefault(key, []).append(x)
        return Table(
            title=f"report: {self.model}",
            columns=("weight", "shape", "scheme", "bits", "before", "after", "error", "SQNR"),
            rows=tuple(_row(group) for group in groups.values()),
            right=frozenset({3, 4, 5, 6, 7}),
            notes=tuple(self._notes()),
        )

    def __str__(self) -> str:
        """The table, one row for layers that differ in the numbers of their names alone."""
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().to_html()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data: one entry per layer, and the totals."""
        totals = ("weights", "bytes_before", "bytes_after", "ratio", "bits_per_weight", "coverage")
        return {
            "model": self.model,
            "parameters": self.parameters,
            **{name: getattr(self, name) for name in totals},
            "model_bytes_before": self.model_bytes_before,
            "model_bytes_after": self.model_bytes_after,
            "layers": [{**asdict(x), "bits": x.bits, "sqnr_db": _finite(x.sqnr_db)} for x in self.layers],
            "kept": [asdict(kept) for kept in self.kept],
        }

    @property
    def counted(self) -> str:
        """How many weights are quantized, in words."""
        experts = sum(layer.kind == "expert" for layer in self.layers)
        linears = f"{len(self.layers) - experts} linears"
        return f"{linears} and {experts} matrices of experts" if experts else linears

    def _multiplied(self) -> list[Multiplied]:
        schemes = {spelling: Scheme.parse(spelling) for spelling in {x.scheme for x in self.layers}}
        found = [Multiplied(x.n, x.k, x.bytes_before, schemes[x.scheme], x.kind == "expert") for x in self.layers]
        kept = [
            x for x in self.kept if x.kind != "stacked"
        ]  # how much of a stack a token reads, its shape does not tell
        return found + [Multiplied(1, x.weights, x.nbytes, None, x.kind == "expert") for x in kept]

    def _notes(self) -> Iterator[str]:
        yield (
            f"{self.counted} quantized: {_percent(self.coverage)} of the weights of linears and experts, "
            f"{_percent(self.weights / self.parameters)} of all parameters"
        )
        yield (
            f"quantized weights: {bytes_text(self.bytes_before)} -> {bytes_text(self.bytes_after)}, "
            f"{self.ratio:.2f} times smaller, {self.bits_per_weight:.4g} bits per weight"
        )
        before, after = self.model_bytes_before, self.model_bytes_after
        yield (
            f"whole model: {bytes_text(before)} -> {bytes_text(after)}, {before / after:.2f} times smaller, "
            f"{8 * after / self.parameters:.4g} bits per parameter"
        )
        yield from speed_notes(self._multiplied())
        if worst := self.worst():
            names = ", ".join(f"{x.name} {x.error:.2e} ({_db(x.sqnr_db)})" for x in worst)
            yield f"largest errors |W - W'|^2 / |W|^2: {names}"
        else:
            yield "errors are not known: the weights were not quantized here, or have no values (meta device)"
        by_reason: dict[str, list[Kept]] = {}
        for kept in self.kept:
            by_reason.setdefault(without_numbers(kept.reason), []).append(kept)
        for found in by_reason.values():
            names = ", ".join(x.name for x in found[:_WORST]) + (", ..." if len(found) > _WORST else "")
            size = bytes_text(sum(x.nbytes for x in found))
            yield f"in full precision: {len(found)} ({size}), {found[0].reason}: {names}"


def sqnr_db(error: float | None) -> float | None:
    """Signal to quantization noise ratio in dB of a relative squared error; None for None, inf for 0."""
    if error is None:
        return None
    return -10 * math.log10(error) if error > 0 else math.inf


def _row(group: list[LayerReport]) -> tuple[str, ...]:
    """One line of the table; the error is the mean over the layers of the line."""
    first, errors = group[0], [x.error for x in group if x.error is not None]
    mean = sum(errors) / len(errors) if errors else None
    return (
        merged_name([x.name for x in group]),
        f"{first.n}x{first.k}",
        first.scheme,
        f"{first.bits:.4g}",
        bytes_text(sum(x.bytes_before for x in group)),
        bytes_text(sum(x.bytes_after for x in group)),
        "-" if mean is None else f"{mean:.2e}",
        _db(sqnr_db(mean)),
    )


def _db(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} dB"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
