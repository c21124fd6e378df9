"""The linears of a module tree, and which of them can be replaced: no graph needed.

A module is replaceable when all that it does is `x @ weight.T + bias`. That is read from its forward where the class
does not override it, and measured on random numbers where it does.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fxquant.modules import QLinear

_PROBE_SIZE = 256
"""Features of a probe: enough to tell a linear from anything else, small enough for a 128k vocabulary."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class LinearSite:
    """One linear module of a model, under all its names."""

    name: str
    """The first name in `named_modules` order; empty where the model itself is a linear."""
    aliases: tuple[str, ...]
    """Every name under which the tree holds this very module object, `name` first."""
    module: nn.Module
    transposed: bool
    """The module stores its weight as `[K, N]` (transformers' Conv1D)."""
    obstacle: str | None
    """Why the module cannot be replaced, as the end of a sentence; None where it can."""

    @property
    def n(self) -> int:
        """Output features."""
        return self._features[0]

    @property
    def k(self) -> int:
        """Input features."""
        return self._features[1]

    @property
    def _features(self) -> tuple[int, int]:
        module: Any = self.module
        # A packed, computed or missing weight has not the shape of the matrix that it stands for.
        if self.obstacle is None:
            stored = tuple(module.weight.shape)
        else:
            stored = (module.nx, module.nf) if self.transposed else (module.out_features, module.in_features)
        return (stored[1], stored[0]) if self.transposed else (stored[0], stored[1])

    @property
    def weight(self) -> torch.Tensor:
        """The weight as `[N, K]`, a view of the module's own parameter."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.T if self.transposed else weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias, `[N]`, or None."""
        bias = self.module.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        return bias


def find_linears(model: nn.Module) -> list[LinearSite]:
    """Every `nn.Linear` (subclasses too) and every transformers `Conv1D` of `model`, in `named_modules` order.

    Each module object comes once, with all its names. Nothing is left out: what cannot be replaced says why in
    `obstacle`. Works on any device, meta included; runs no forward of the model.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) or is_conv1d(module):
            names.setdefault(module, []).append(name)
    probes: dict[Hashable, bool] = {}
    return [
        LinearSite(found[0], tuple(found), module, is_conv1d(module), _obstacle(module, probes))
        for module, found in names.items()
    ]


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, a linear that stores its weight as `[K, N]`; imports nothing."""
    return _conv1d_class(module) is not None


def _conv1d_class(module: nn.Module) -> type[Any] | None:
    for base in type(module).__mro__:
        if base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils":
            return base
    return None


def _obstacle(module: nn.Module, probes: dict[Hashable, bool]) -> str | None:
    return _weight_obstacle(module) or _forward_obstacle(module) or _behaviour_obstacle(module, probes)


def _weight_obstacle(module: nn.Module) -> str | None:
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if isinstance(module, QLinear):
        return f"it is quantized already ({module.spelling})"
    if weight is None:
        return "its weight is computed, not a parameter (a parametrization, weight norm or pruning)"
    if type(weight) not in (nn.Parameter, torch.Tensor):
        return f"its weight is a {type(weight).__name__}, not a plain tensor: quantized, sharded or not yet made"
    if weight.dtype not in _FLOATS:
        return f"its weight is {_dtype(weight)}, not a float that can be quantized"
    if weight.dim() != 2:
        return f"its weight has the shape {list(weight.shape)}, not that of a matrix"
    if bias is None and getattr(module, "bias", None) is not None:
        return "its bias is computed, not a parameter"
    if bias is not None and bias.shape != (weight.shape[1 if is_conv1d(module) else 0],):
        return f"its bias has the shape {list(bias.shape)}, its weight {list(weight.shape)}"
    return None


def _forward_obstacle(module: nn.Module) -> str | None:
    extra = [*(n for n in module._parameters if n not in ("weight", "bias")), *module._buffers, *module._modules]
    if extra:
        return f"it holds more than a weight and a bias: {', '.join(extra)}"
    override = vars(module).get("forward")
    # accelerate's hooks wrap forward on the instance and keep the class's own as _old_forward.
    hooked = "_hf_hook" in vars(module) and _is_own_forward(vars(module).get("_old_forward"), module)
    if override is not None and not hooked:
        return f"its forward is overridden on the instance ({_called(override)})"
    return None


def _is_own_forward(function: Any, module: nn.Module) -> bool:
    forward: Any = type(module).forward
    return getattr(function, "__func__", None) is forward


def _behaviour_obstacle(module: Any, probes: dict[Hashable, bool]) -> str | None:
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "it is the output projection of nn.MultiheadAttention, which reads the weight and calls no forward"
    base = _conv1d_class(module) or nn.Linear
    if type(module).forward is base.forward:
        return None
    key = _probe_key(module)
    if key not in probes:
        probes[key] = _behaves_as_linear(module)
    return None if probes[key] else f"its class {type(module).__name__} has a forward that is not x @ weight.T + bias"


def _probe_key(module: Any) -> Hashable:
    scalar = (bool, int, float, str, type(None))
    attributes = (
        (name, value if isinstance(value, scalar) else id(value))
        for name, value in sorted(vars(module).items())
        if not name.startswith("_")
    )
    shape = tuple(module.weight.shape)
    return (type(module), shape, module.bias is None, tuple(attributes))


def _behaves_as_linear(module: Any) -> bool:
    """Run the class's forward on random float32 numbers, on a shallow copy that shares no state that it may write."""
    transposed = is_conv1d(module)
    stored: list[int] = [min(size, _PROBE_SIZE) for size in module.weight.shape]
    n, k = reversed(stored) if transposed else stored
    random = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(shape, generator=random) for shape in (stored, (2, 3, k)))
    bias = None if module.bias is None else torch.randn(n, generator=random)
    shell = copy.copy(module)
    vars(shell)["_parameters"] = {"weight": nn.Parameter(weight), "bias": None if bias is None else nn.Parameter(bias)}
    vars(shell).update(training=False)
    vars(shell).update({"nf": n, "nx": k} if transposed else {"in_features": k, "out_features": n})
    want = functional.linear(x, weight.T if transposed else weight, bias)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            got = type(module).forward(shell, x.clone())
    except Exception:  # whatever a foreign forward raises, it has shown that it is not a linear
        return False
    return isinstance(got, torch.Tensor) and got.shape == want.shape and torch.allclose(got, want, 1e-4, 1e-4)


def _called(function: Any) -> str:
    inner = getattr(function, "func", function)
    return str(getattr(inner, "__qualname__", type(inner).__name__))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class StackedWeight:
    """A parameter that holds several matrices in one tensor: the experts of a mixture, first of all."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    module_name: str
    """The module that holds it."""


_NOT_STACKS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)
_NOT_STACK_NAMES = ("conv", "embed", "norm")


def find_stacked(model: nn.Module) -> list[StackedWeight]:
    """Every parameter that stacks matrices, in `named_modules` order; a parameter with several names comes once.

    That is: three dimensions or more with more than one matrix, not of a convolution, an embedding or a norm; a stack
    of experts even where there is one expert; and the two-dimensional `w1`, `v1`, `w2` of which each holds the rows of
    all experts (DBRX).
    """
    seen: set[int] = set()
    found = []
    for module_name, module in model.named_modules():
        # A parametrization holds what another module's weight is computed from.
        owner = model.get_submodule(module_name.partition(".parametrizations.")[0])
        if isinstance(owner, _NOT_STACKS) or any(word in type(owner).__name__.lower() for word in _NOT_STACK_NAMES):
            continue
        for leaf, parameter in _stacks(module):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name, nbytes = f"{module_name}.{leaf}".lstrip("."), parameter.numel() * parameter.element_size()
            found.append(StackedWeight(name, tuple(parameter.shape), parameter.dtype, nbytes, module_name))
    return found


def _stacks(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    rows, experts = _stacks_rows(module), is_expert_stack(module)
    for name, parameter in module._parameters.items():
        if parameter is not None and (rows or _is_stack(parameter) or (experts and parameter.dim() >= 3)):
            yield name, parameter


def _is_stack(tensor: torch.Tensor) -> bool:
    # A vector per row ([64, 1, 1], say) is a scale or a gate, not a stack of matrices.
    return tensor.dim() >= 3 and tensor.shape[0] > 1 and min(tensor.shape[-2:]) > 1


def _stacks_rows(module: nn.Module) -> bool:
    weights, ffn = [module._parameters.get(name) for name in ("w1", "v1", "w2")], getattr(module, "ffn_hidden_size", 0)
    if any(w is None or w.dim() != 2 for w in weights) or not isinstance(ffn, int) or ffn < 1:
        return False
    shapes = {tuple(w.shape) for w in weights if w is not None}
    return len(shapes) == 1 and all(rows > ffn and rows % ffn == 0 for rows, _ in shapes)


def is_expert_stack(module: nn.Module) -> bool:
    """Whether `module` holds the experts of a mixture as stacked weights: three-dimensional up and down projections.

    The parameters are called `down_proj` and `gate_up_proj` or `up_proj` in every transformers class but those of
    DBRX and JetMoe, whatever the order of their dimensions.
    """

    def stacked(name: str) -> bool:
        tensor = module._parameters.get(name)
        return tensor is not None and tensor.dim() == 3

    return stacked("down_proj") and (stacked("gate_up_proj") or stacked("up_proj"))
