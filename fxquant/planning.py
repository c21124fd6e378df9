"""From a model and a recipe to the plan, and the graph that it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from fxquant import graph_capture
from fxquant.errors import CaptureError, ModelError
from fxquant.expert_modules import QExperts
from fxquant.experts import find_experts
from fxquant.linears import find_linears, find_stacked
from fxquant.modules import QLinear
from fxquant.plans import Plan
from fxquant.recipe import Recipe
from fxquant.select import select


def plan_for(
    model: nn.Module, recipe: Any, example_inputs: Any = None, exclude: Sequence[str] = ()
) -> tuple[fx.GraphModule | None, Plan]:
    """The plan of a model, and its graph, where it has one.

    Args and errors are those of `fxquant.quantize`.
    """
    check_model(model)
    resolved = Recipe.resolve(recipe)
    if exclude:
        resolved = resolved.excluding(exclude)
    _refuse_quantized(model)
    sites, experts, stacked = find_linears(model), find_experts(model), find_stacked(model)
    if not sites and not experts:
        raise ModelError(f"this {type(model).__name__} holds no linear and no experts: there is nothing to quantize")
    graph, reason = None, ""
    try:
        graph = graph_capture.capture(model, example_inputs)
    except CaptureError as error:
        reason = str(error)
    return graph, select(model, resolved, sites, experts, stacked, graph, reason)


def _refuse_quantized(model: nn.Module) -> None:
    found = [name for name, m in model.named_modules() if isinstance(m, (QLinear, QExperts))]
    if found:
        raise ModelError(
            f"this {type(model).__name__} is quantized already: {len(found)} modules, {found[0]} first\n"
            "  quantize the original model, or call fxquant.dequantize(model) first"
        )


def check_model(model: object) -> None:
    """Refuse what is no model, or one whose modules cannot be replaced.

    Raises:
        ModelError: says why.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"a model is needed, a torch.nn.Module; got {type(model).__name__}\n"
            "  for a checkpoint, load it first: AutoModelForCausalLM.from_pretrained(path)"
        )
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise ModelError(
            "this model is compiled: torch.compile(model) has wrapped it\n"
            "  quantize first, then compile: model = quantize(model, recipe); compiled = torch.compile(model)"
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ModelError(
            f"this {type(model).__name__} is or holds a TorchScript module, whose parts cannot be replaced\n"
            "  quantize the Python module that it was scripted from"
        )
