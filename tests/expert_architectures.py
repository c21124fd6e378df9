"""Tiny random models of every architecture of transformers that has experts, found in its source."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from expert_classes import experts_classes
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant.example_inputs import candidates

AUTO_CLASSES = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoBackbone": "MODEL_FOR_BACKBONE_MAPPING_NAMES",
}
INPUTS: dict[str, dict[str, Tensor | None]] = {
    # Half of the tokens as if they came from an image, which other experts see to.
    "ernie4_5_vl_moe": {"moe_mm_token_type_ids": torch.tensor([[0, 1] * 4])},
    # With tokens it looks for an attribute that it does not have.
    "qwen3_omni_moe_talker_text": {"input_ids": None, "inputs_embeds": torch.linspace(-1, 1, 512).view(1, 8, 64)},
    "vitpose_backbone": {"dataset_index": torch.tensor([1])},
}
"""What models need for their experts to be called, besides what their signature asks for; by model type."""


@functools.cache
def architectures() -> dict[str, tuple[str, ...]]:
    """Folder of transformers/models: the classes in it that hold experts, stacked or as a list or dict of modules."""
    found: dict[str, set[str]] = {}
    for name, module in (experts_classes() | _containers()).items():
        found.setdefault(module.split(".")[2], set()).add(name)
    return {folder: tuple(sorted(names)) for folder, names in sorted(found.items())}


def _containers() -> dict[str, str]:
    """Classes of experts that are a `ModuleList` or a `ModuleDict`, found in the source: name and module."""
    import transformers

    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        source = path.read_text()
        if "(nn.ModuleList)" not in source and "(nn.ModuleDict)" not in source:
            continue
        for node in ast.parse(source).body:
            bases = {ast.unparse(base) for base in getattr(node, "bases", ())}
            if bases & {"nn.ModuleList", "nn.ModuleDict"} and "num_experts" in ast.unparse(node):
                found[node.name] = f"transformers.models.{path.parent.name}.{path.stem}"  # type: ignore[attr-defined]
    return found


def _choices(folder: str) -> Iterator[tuple[Any, Any]]:
    """A config (a model type or a class) and a model class of an architecture: those of auto classes first."""
    from transformers import PreTrainedModel
    from transformers.models.auto import configuration_auto, modeling_auto

    to_folder = configuration_auto.model_type_to_module_name
    kinds = [kind for kind in configuration_auto.CONFIG_MAPPING_NAMES if to_folder(kind) == folder]
    for auto_class, mapping in AUTO_CLASSES.items():
        yield from ((kind, auto_class) for kind in kinds if kind in getattr(modeling_auto, mapping))
    module = importlib.import_module((experts_classes() | _containers())[architectures()[folder][0]])
    classes = [cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == module.__name__]
    yield from ((cls.config_class, cls) for cls in classes if issubclass(cls, PreTrainedModel) and cls.config_class)


def built(folder: str) -> tuple[list[tuple[nn.Module, dict[str, Any]]], str]:
    """Models that together call all classes of experts of an architecture, with inputs; what is wrong if they do not.

    Every module of experts in them is called.
    """
    missing, problem = set(architectures()[folder]), "no config"
    models = []
    for kind, cls in _choices(folder):
        try:
            model = tiny_model(kind, cls, experts=True)
            held = {type(module).__name__ for module in experts_of(model).values()}
            if not held & missing:
                continue
            inputs = _inputs(model)
        except Exception as error:  # whatever a foreign model raises at this size
            problem = f"{type(error).__name__}: {error}"
            continue
        models.append((model, inputs))
        missing -= held
        if not missing:
            return models, ""
    return models, f"{', '.join(sorted(missing))} not reached: {problem}"


def _inputs(model: nn.Module) -> dict[str, Any]:
    """Inputs with which the model calls all its experts.

    Raises:
        RuntimeError: there are none.
        Exception: what the model raised for all inputs.
    """
    problem: Exception = RuntimeError("its forward does not call its experts")
    special = INPUTS.get(model.config.model_type, {})  # type: ignore[union-attr]
    for inputs in candidates(model):
        try:
            if set(run(model, inputs | special)[1]) == set(experts_of(model)):
                return inputs | special
        except Exception as error:  # these inputs are not the ones
            problem = error
    raise problem


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of a class that holds experts, by its first name."""
    classes = {name for names in architectures().values() for name in names}
    return {name: module for name, module in model.named_modules() if type(module).__name__ in classes}


def expert_weights(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that hold the matrices of experts; biases and norms are none."""
    return {
        name: _of_experts(module, tuple(parameter.shape))
        for name, parameter in module.named_parameters()
        if parameter.dim() > 1 and "bias" not in name
    }


def _of_experts(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    # LongCat's experts that do nothing have rows among the others' gates, which nothing reads.
    routed = getattr(module, "num_routed_experts", None)
    return shape if routed is None else (routed, *shape[1:])


def run(model: nn.Module, inputs: Mapping[str, Any], names: tuple[str, ...] = ()) -> tuple[Tensor, dict[str, Tensor]]:
    """The first output, and that of each module of experts that is called; `names` of those, or found by class."""
    called: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: called.update({name: out}))
        for name in names or experts_of(model)
    ]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            output = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    first = next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return first.double(), {name: out.double() for name, out in called.items()}
