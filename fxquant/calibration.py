"""Calibration: what the inputs of linears reach on examples, for schemes with static activation scales."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.activation_codecs import FLOOR, LARGEST
from fxquant.errors import ModelError
from fxquant.plans import Plan, PlanEntry
from fxquant.progress import batch_progress


def check_calibration(model: nn.Module, plan: Plan, calibration: Iterable[Any] | None) -> None:
    """Refuse a plan with static schemes and no examples for them, and examples that nothing asks for.

    Layers on the meta device need none: they have no numbers at all.

    Raises:
        ModelError: names the layers.
    """
    static = _static(plan)
    real = [e.name for e in static if not _weight(model, e).is_meta]
    if calibration is None and real:
        scheme = next(e.scheme for e in static)
        raise ModelError(
            f"{len(real)} of {len(plan.quantized)} layers have static activation scales, which take calibration: "
            f"{_listed(real)} in {scheme}\n"
            "  pass quantize(model, recipe, calibration=batches), some inputs as the model will see them,\n"
            "  or let the scales follow each token: a scheme that ends in +int8 or +fp8, without -static"
        )
    if calibration is not None and not static:
        raise ModelError(
            "calibration is given, and no layer of this plan has static activation scales: nothing would use it\n"
            "  leave it out, or name a static scheme, such as int8+int8-static"
        )
    if isinstance(calibration, (Tensor, Mapping, str)):
        raise ModelError(
            f"calibration is an iterable of inputs, got one {type(calibration).__name__}: pass [inputs] for one batch"
        )


def input_scales(
    model: nn.Module, plan: Plan, calibration: Iterable[Any] | None, *, progress: bool
) -> dict[str, float]:
    """The input scale of every layer with a static scheme: the largest magnitude of its inputs by the largest code.

    The model runs as it is, in eval mode and without gradients; training flags are put back and nothing else of it is
    touched, whatever happens.

    Args:
        model: in full precision.
        plan: tells the layers.
        calibration: inputs of one forward each: a tensor, positional arguments (tuple, list) or keyword arguments.
        progress: show a progress bar on stderr.

    Returns:
        By the name of the layer; nothing for layers on the meta device.

    Raises:
        ModelError: there is no batch, a batch is none or its forward fails, or layers that no batch reaches, that get
            inf or nan, or only zeros.
    """
    entries = [e for e in _static(plan) if not _weight(model, e).is_meta]
    if not entries or calibration is None:
        return {}
    absmax: dict[str, Tensor] = {}
    with _watched(model, entries, absmax), batch_progress(_length(calibration), enabled=progress) as done:
        for i, batch in enumerate(calibration):
            args, kwargs = _call(batch, i)
            try:
                model(*args, **kwargs)
            except Exception as error:
                raise ModelError(
                    f"the model fails on calibration batch {i}: {type(error).__name__}: {error}\n"
                    "  the model was not changed: batches are what it is called with, on its own device"
                ) from error
            done()
    _refuse_useless(entries, absmax)
    return {e.name: _scale(e, absmax[e.name]) for e in entries}


def _static(plan: Plan) -> list[PlanEntry]:
    return [e for e in plan.quantized if e.scheme and e.scheme.activation and e.scheme.activation.static]


def _weight(model: nn.Module, entry: PlanEntry) -> Tensor:
    return model.get_submodule(entry.name).get_parameter("weight")


@contextlib.contextmanager
def _watched(model: nn.Module, entries: list[PlanEntry], absmax: dict[str, Tensor]) -> Iterator[None]:
    """Record into `absmax` what the inputs of these layers reach; the model is in eval mode meanwhile."""
    training = [(module, module.training) for module in model.modules()]
    handles = []
    try:
        for entry in entries:
            hook = _recorder(entry.name, absmax)
            handles.append(model.get_submodule(entry.name).register_forward_pre_hook(hook, with_kwargs=True))
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training:
            module.training = flag


def _recorder(name: str, absmax: dict[str, Tensor]) -> Callable[..., None]:
    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if x.numel():
            found = x.detach().abs().amax().to(torch.float32)
            absmax[name] = torch.maximum(absmax[name].to(found.device), found) if name in absmax else found

    return record


def _call(batch: Any, i: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    raise ModelError(
        f"calibration batch {i} is a {type(batch).__name__}: a batch is what the model is called with, a tensor, a "
        "tuple of positional arguments or a dict of keyword arguments"
    )


def _length(calibration: Iterable[Any]) -> int | None:
    return len(calibration) if isinstance(calibration, Sized) else None


def _refuse_useless(entries: list[PlanEntry], absmax: dict[str, Tensor]) -> None:
    names = [e.name for e in entries]
    reached = {name: value.item() for name, value in absmax.items()}
    problems = {
        "are reached by no calibration batch": [n for n in names if n not in reached],
        "get inf or nan from the calibration batches": [n for n in reached if not reached[n] < float("inf")],
        "get only zeros from the calibration batches": [n for n in reached if reached[n] == 0],
    }
    for problem, found in problems.items():
        if found:
            raise ModelError(
                f"{len(found)} of {len(names)} layers with static activation scales {problem}: {_listed(found)}\n"
                "  the model was not changed: calibrate on other inputs, or give these layers a scheme without -static"
            )


def _scale(entry: PlanEntry, absmax: Tensor) -> float:
    assert entry.scheme is not None
    assert entry.scheme.activation is not None
    return float((absmax / LARGEST[entry.scheme.activation.element]).clamp(min=FLOOR).item())


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
