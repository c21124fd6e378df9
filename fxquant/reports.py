"""What was quantized: sizes, bits and errors of a model, read from its module tree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from fxquant.errors import ModelError
from fxquant.install import Record, record_of
from fxquant.linears import find_linears, find_stacked
from fxquant.modules import QLinear
from fxquant.plans import merged_name, name_pattern
from fxquant.tables import Table, bytes_text

_WORST = 3


@dataclass(frozen=True)
class LayerReport:
    """One quantized linear."""

    name: str
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
        """Bytes of the quantized linears' weights in full precision."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the quantized linears' planes."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def model_bytes_before(self) -> int:
        """Bytes of all parameters and buffers before quantization."""
        return self.model_bytes_after - self.bytes_after + self.bytes_before

    @property
    def ratio(self) -> float:
        """How many times smaller the quantized linears are."""
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

    def _notes(self) -> Iterator[str]:
        yield (
            f"{len(self.layers)} linears quantized: {_percent(self.coverage)} of the weights of linears and experts, "
            f"{_percent(self.weights / self.parameters)} of all parameters"
        )
        yield (
            f"quantized linears: {bytes_text(self.bytes_before)} -> {bytes_text(self.bytes_after)}, "
            f"{self.ratio:.2f} times smaller, {self.bits_per_weight:.4g} bits per weight"
        )
        before, after = self.model_bytes_before, self.model_bytes_after
        yield (
            f"whole model: {bytes_text(before)} -> {bytes_text(after)}, {before / after:.2f} times smaller, "
            f"{8 * after / self.parameters:.4g} bits per parameter"
        )
        if worst := self.worst():
            names = ", ".join(f"{x.name} {x.error:.2e} ({_db(x.sqnr_db)})" for x in worst)
            yield f"largest errors |W - W'|^2 / |W|^2: {names}"
        else:
            yield "errors are not known: the weights were not quantized here, or have no values (meta device)"
        by_reason: dict[str, list[Kept]] = {}
        for kept in self.kept:
            by_reason.setdefault(kept.reason, []).append(kept)
        for reason, found in by_reason.items():
            names = ", ".join(x.name for x in found[:_WORST]) + (", ..." if len(found) > _WORST else "")
            yield f"in full precision: {len(found)} ({bytes_text(sum(x.nbytes for x in found))}), {reason}: {names}"


def report(model: nn.Module) -> Report:
    """What is quantized in a model: per layer scheme, bits, bytes and error; totals; what is not quantized, and why.

    Read from the module tree, so it holds for submodules and copies too. Errors and reasons are what `quantize` left
    on the model; where there is nothing of that, errors are None.

    Args:
        model: a quantized model, a copy or a part of one.

    Raises:
        ModelError: not a module, or nothing in it is quantized.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"a model is needed, a torch.nn.Module; got {type(model).__name__}")
    record = record_of(model)
    layers = tuple(_layer(name, m, record) for name, m in model.named_modules() if isinstance(m, QLinear))
    if not layers:
        raise ModelError(
            f"nothing in this {type(model).__name__} is quantized by fxquant\n"
            '  quantize it first: fxquant.quantize(model, "int4")'
        )
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    parameters = sum(p.numel() for p in model.parameters()) + sum(x.n * x.k for x in layers)
    return Report(
        model=type(model).__name__,
        layers=layers,
        kept=tuple(_kept(model, record)),
        parameters=parameters,
        model_bytes_after=sum(_nbytes(t) for t in tensors.values()),
    )


def sqnr_db(error: float | None) -> float | None:
    """Signal to quantization noise ratio in dB of a relative squared error; None for None, inf for 0."""
    if error is None:
        return None
    return -10 * math.log10(error) if error > 0 else math.inf


def _layer(name: str, module: QLinear, record: Record | None) -> LayerReport:
    error = record.errors.get(name) if record else None
    n, k = module.out_features, module.in_features
    return LayerReport(
        name=name,
        n=n,
        k=k,
        scheme=module.spelling,
        bytes_before=n * k * module.dtype.itemsize,
        bytes_after=sum(_nbytes(plane) for plane in module.planes.values()),
        error=None if error is None or math.isnan(error) else error,
    )


def _kept(model: nn.Module, record: Record | None) -> Iterator[Kept]:
    planned: Mapping[str, str] = {e.name: e.reason for e in record.plan.kept} if record else {}
    unplanned = "no rule reaches it" if record else "not quantized"
    for site in find_linears(model):
        if not isinstance(site.module, QLinear):
            weight = site.module._parameters.get("weight")
            nbytes = 0 if weight is None else _nbytes(weight)
            reason = planned.get(site.name) or site.obstacle or unplanned
            yield Kept(site.name, site.n * site.k, nbytes, reason)
    for stack in find_stacked(model):
        reason = planned.get(stack.name) or unplanned
        yield Kept(stack.name, math.prod(stack.shape), stack.nbytes, reason)
    bare = [e for e in record.plan.kept if e.kind == "bare"] if record else []
    yield from (Kept(e.name, math.prod(e.shape), e.bytes_before, e.reason) for e in bare)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


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
