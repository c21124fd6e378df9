"""Every class of transformers that holds the experts of a mixture, and random modules of it, tiny."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.experts import ExpertsLayout, layout_of


@functools.cache
def experts_classes() -> dict[str, str]:
    """Class name: module. Those with the decorator `use_experts_implementation`, and those whose parameters stack.

    The latter are found in the source: a parameter of three dimensions, of which the first counts experts.
    """
    import transformers

    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        source = path.read_text()
        if "xperts" not in source:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and (_is_decorated(node) or _stacks(node)):
                found[node.name] = f"transformers.models.{path.parent.name}.{path.stem}"
    return found


def _is_decorated(node: ast.ClassDef) -> bool:
    return any("use_experts_implementation" in ast.unparse(decorator) for decorator in node.decorator_list)


def _stacks(node: ast.ClassDef) -> bool:
    """Whether a class that is named after experts makes a stacked parameter, or DBRX's, in a child."""
    made = [ast.unparse(call) for call in ast.walk(node) if isinstance(call, ast.Call)]
    stacked = any("Parameter(torch." in call and "expert" in call and call.count(",") >= 2 for call in made)
    return "Expert" in node.name and (stacked or "DbrxExpertGLU(config)" in made)


SIZES: tuple[tuple[str, Any], ...] = (
    (r"_experts_implementation", "eager"),
    (r"n_shared_experts|zero_expert_num", 2),
    (r".*experts", 4),
    (r".*(intermediate_size|ffn_hidden_size)", 128),
    (r".*(hidden_size|latent_size)", 64),
    (r".*hidden_act(ivation)?", "silu"),
    (r"ffn_act_fn", {"name": "gelu"}),
    (r".*(limit|alpha|softcap)", 1.5),
    (r".*eps", 1e-6),
)


class TinyConfig:
    """Has what an experts class reads from its config; small, and by nothing but the name."""

    def __getattr__(self, name: str) -> Any:
        for pattern, value in SIZES:
            if re.fullmatch(pattern, name):
                return value
        raise AttributeError(f"tests/expert_classes.py has no size for config.{name}")


def experts_module(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random module of a class by its name, which runs its own forward."""
    cls = getattr(importlib.import_module(experts_classes()[name]), name)
    takes_config = "config" in inspect.signature(cls.__init__).parameters
    module = cls(TinyConfig()) if takes_config else cls(4, 64, 128)
    return randomized(module, seed).to(dtype)


def randomized(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def read(module: nn.Module) -> ExpertsLayout:
    layout = layout_of(module)
    assert isinstance(layout, ExpertsLayout), layout
    return layout


def arguments(module: Any, tokens: int = 9, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """What the module's forward takes, random, for so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    layout, name = read(module), type(module).__name__
    k = next(iter(layout.projections))
    weight = module.get_parameter(k.parameter)
    width = weight.shape[-2] if k.transposed and weight.dim() == 3 else weight.shape[-1]
    x = torch.randn(tokens, width, generator=generator)
    if name == "Llama4TextExperts":
        hit = torch.rand(layout.experts, tokens, 1, generator=generator) < 0.4
        return ((x * hit).reshape(-1, width).to(dtype),)
    if name == "JetMoeParallelExperts":
        sizes = [tokens // 2, 0, tokens - tokens // 2]
        return x.to(dtype), [*sizes, *[0] * (layout.experts - 3)]  # type: ignore[return-value]
    if name == "InklingSharedExperts":
        return x.to(dtype), torch.rand(tokens, layout.experts, generator=generator).to(dtype)
    experts = getattr(module, "total_experts", layout.experts)
    ids = torch.rand(tokens, experts, generator=generator).topk(2).indices
    weights = torch.rand(tokens, 2, generator=generator)
    x = x.unsqueeze(0) if name == "DbrxExperts" else x
    return x.to(dtype), ids, weights.to(dtype)
