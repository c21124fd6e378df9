"""The public calls: each is its stages in order and nothing else."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx, nn

from fxquant import graph_capture, model_report
from fxquant.calibration import check_calibration, input_scales
from fxquant.errors import ModelError
from fxquant.install import check_weights, install, record_of, uninstall
from fxquant.passes import DEFAULT
from fxquant.planning import check_model, plan_for
from fxquant.plans import Plan
from fxquant.progress import layer_progress
from fxquant.reports import Report
from fxquant.rewrite import History, Pass, run_passes


def quantize(
    model: nn.Module,
    recipe: Any,
    *,
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    passes: Sequence[Pass] = DEFAULT,
    exclude: Sequence[str] = (),
    progress: bool = True,
) -> nn.Module:
    """Store the weights of a model's linears and experts in 2 to 8 bits, in place.

    Args:
        model: any `nn.Module`, on any device, the meta device included.
        recipe: a `Recipe`, a preset's name ("int4"), a scheme or its spelling ("nf4-dq"), a list of rules, the path of
            a YAML file, or a torchao config.
        example_inputs: keyword arguments (dict) or positional ones (tuple) for one forward; derived for models of
            transformers. Used for tracing alone, never computed with.
        calibration: inputs of one forward each, as `example_inputs`; the model runs on them, in full precision, to find
            the scales of static activations (`int8+int8-static`). Needed for such schemes, and for no others.
        passes: the rewrites to run over the captured graph, in order.
        exclude: patterns of modules to leave as they are, in front of the recipe's rules.
        progress: show a progress bar on stderr.

    Returns:
        The same model object. `report(model)` says what was done, `history(model)` what happened to the graph.

    Raises:
        ModelError: not a module, quantized already, weights with inf or nan, a weight that cannot be replaced, no
            calibration where a scheme needs it, or none that reaches a layer.
        RecipeError: a recipe that cannot be read, or a rule that matches nothing.
        SchemeError: an unknown scheme, or a layer that cannot hold the one asked for.
        RewriteError: a pass failed. Every check runs before the first weight changes.
    """
    graph, made = plan_for(model, recipe, example_inputs, exclude)
    check_weights(model, made)
    check_calibration(model, made, calibration)
    modules: dict[str, nn.Module] = {}
    history = run_passes(graph, made, passes, modules) if graph is not None else History(reason=made.graph)
    del graph
    # What torch.export makes refers to itself in circles, and through them to every weight: without this, no weight
    # would be let go before Python's next full collection.
    gc.collect()
    scales = input_scales(model, made, calibration, progress=progress)
    with layer_progress(made, enabled=progress) as done:
        install(model, made, history, modules, done, scales)
    plugin = _plugin(model)
    if plugin is not None:
        plugin.attach(model)
    return model


def plan(model: nn.Module, recipe: Any, *, example_inputs: Any = None, exclude: Sequence[str] = ()) -> Plan:
    """What `quantize` would do, touching nothing: every weight by name, shape, scheme, bytes, rule and reason.

    Args and errors are those of `quantize`.
    """
    return plan_for(model, recipe, example_inputs, exclude)[1]


def capture(model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
    """The model as one FX graph whose linears and experts are `call_module` nodes on the model's own submodules.

    Args:
        model: any `nn.Module`; left as it was.
        example_inputs: as for `quantize`.

    Raises:
        CaptureError: when `torch.export` cannot trace the model, or no example inputs can be derived.
        ModelError: when it is no module.
    """
    return graph_capture.capture(model, example_inputs)


def history(model: nn.Module) -> History:
    """The graph before and after each pass that `quantize` ran; readable text, and HTML in a notebook.

    Raises:
        ModelError: when the model was not quantized by `quantize`.
    """
    record = record_of(model)
    if record is None:
        raise ModelError(f"this {type(model).__name__} has no history: it was not quantized by fxquant.quantize")
    return record.history


def report(model: nn.Module) -> Report:
    """What was quantized: counts, bits per weight, bytes, error per layer; prints as a table.

    Raises:
        ModelError: when nothing in the model is quantized.
    """
    return model_report.report(getattr(model, "_orig_mod", model))  # what torch.compile wraps


def dequantize(model: nn.Module) -> nn.Module:
    """Put back modules of the original classes, with the dequantized weights, in place.

    Returns:
        The same model object.

    Raises:
        ModelError: when nothing in the model is quantized.
    """
    check_model(model)
    if not uninstall(model):
        raise ModelError(f"nothing in this {type(model).__name__} is quantized by fxquant")
    plugin = _plugin(model)
    if plugin is not None:
        plugin.detach(model)
    return model


def _plugin(model: nn.Module) -> Any:
    """What tells transformers of a model of its own; None for any other, which need not import it."""
    loaded = sys.modules.get("transformers.modeling_utils")
    if loaded is None or not isinstance(model, loaded.PreTrainedModel):
        return None
    return importlib.import_module("fxquant.integrations.transformers")
