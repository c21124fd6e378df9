"""Reading a model's report from its module tree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fxquant.errors import ModelError
from fxquant.expert_layouts import expert_name
from fxquant.expert_modules import QExperts
from fxquant.experts import find_experts
from fxquant.install import Record, record_of
from fxquant.linears import find_linears, find_stacked
from fxquant.modules import QLinear
from fxquant.reports import Kept, LayerReport, Report
from fxquant.scheme import Scheme


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
    layers = tuple(_layers(model, record))
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


def _layers(model: nn.Module, record: Record | None) -> Iterator[LayerReport]:
    errors: Mapping[str, float] = record.errors if record else {}
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            shape = module.out_features, module.in_features
            yield _layer(name, "linear", shape, module.scheme, module.dtype, errors)
        elif isinstance(module, QExperts):
            for e, projection, scheme in module.matrices():
                if scheme is not None:
                    full, shape = expert_name(name, e, projection.name), module.matrix_shape(projection)
                    yield _layer(full, "expert", shape, scheme, module.dtype, errors)


def _layer(
    name: str,
    kind: Literal["linear", "expert"],
    shape: tuple[int, int],
    scheme: Scheme,
    dtype: torch.dtype,
    errors: Mapping[str, float],
) -> LayerReport:
    error, (n, k) = errors.get(name), shape
    return LayerReport(
        name=name,
        kind=kind,
        n=n,
        k=k,
        scheme=str(scheme),
        bytes_before=n * k * dtype.itemsize,
        bytes_after=scheme.nbytes(n, k),
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
    yield from _kept_experts(model, planned, unplanned)
    bare = [e for e in record.plan.kept if e.kind == "bare"] if record else []
    yield from (Kept(e.name, math.prod(e.shape), e.bytes_before, e.reason, "bare") for e in bare)


def _kept_experts(model: nn.Module, planned: Mapping[str, str], unplanned: str) -> Iterator[Kept]:
    """Matrix by matrix where some of a stack are quantized; parameter by parameter for whole stacks."""
    containers = {name: m for name, m in model.named_modules() if isinstance(m, QExperts)}
    for name, module in containers.items():
        for e, projection, scheme in module.matrices():
            if scheme is None:
                full, (n, k) = expert_name(name, e, projection.name), module.matrix_shape(projection)
                yield Kept(full, n * k, n * k * module.dtype.itemsize, planned.get(full) or unplanned, "expert")
    firsts = {
        f"{site.name}.{p.parameter}".lstrip("."): planned.get(expert_name(site.name, 0, p.name))
        for site in find_experts(model)
        for p in site.layout.projections
    }
    for stack in find_stacked(model):
        if stack.module_name not in containers:
            reason = planned.get(stack.name) or firsts.get(stack.name) or unplanned
            yield Kept(stack.name, math.prod(stack.shape), stack.nbytes, reason, "stacked")


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
