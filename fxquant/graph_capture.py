"""From a model to one FX graph whose linears and experts are `call_module` nodes on the model's own submodules.

While `torch.export` runs the model on fake tensors, the forward of every linear and of every stack of experts is a
*leaf*: one opaque op that knows the shape of its result. In the graph each leaf becomes a `call_module` node. What a
leaf computes is never traced, so weights may be tied, packed or on the meta device, and the data-dependent loops
of experts do not stand in the way.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.capture_errors import quiet, reason
from fxquant.errors import CaptureError, ModelError
from fxquant.example_inputs import candidates
from fxquant.expert_modules import QExperts
from fxquant.inductor import pytree
from fxquant.linears import find_linears, is_expert_stack
from fxquant.modules import QLinear
from fxquant.unchanged import unchanged


@torch.library.custom_op("fxquant::leaf", mutates_args=())
def leaf(x: Tensor, others: Sequence[Tensor], out_features: int, dtype: torch.dtype, call: int) -> Tensor:
    """Stands for a module's call while `torch.export` traces: `[..., K]` to `[..., out_features]` in `dtype`.

    Args:
        x: `[..., K]`, the module's first tensor.
        others: the other tensors that the module was called with.
        out_features: size of the result's last dimension.
        dtype: dtype of the result: that of x, or autocast's.
        call: which of the recorded calls this is.

    Raises:
        CaptureError: always, outside a capture there is nothing to compute.
    """
    raise CaptureError("fxquant::leaf was run: it stands for a module's call while a capture traces, nowhere else")


@leaf.register_fake
def _leaf_fake(x: Tensor, others: Sequence[Tensor], out_features: int, dtype: torch.dtype, call: int) -> Tensor:
    return x.new_empty([*x.shape[:-1], out_features], dtype=dtype)


@dataclass
class _Calls:
    """The structure of every leaf's call in one trace; a leaf node's last argument is an index into it."""

    recorded: list[tuple[str, pytree.TreeSpec, list[Any]]] = field(default_factory=list)

    def forward(self, name: str, module: nn.Module, shape: tuple[int, int] | None) -> Callable[..., Tensor]:
        """The forward to set on a module: a linear of shape `[N, K]`, or None: the result is like the first tensor."""

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            leaves, structure = pytree.tree_flatten((args, kwargs))
            first, *others = (value for value in leaves if isinstance(value, Tensor))
            features, dtype = first.shape[-1], first.dtype
            if shape is not None:
                features, dtype = shape[0], _result_dtype(name, module, shape[1], first)
            self.recorded.append((name, structure, [_TENSOR if isinstance(v, Tensor) else v for v in leaves]))
            result: Tensor = torch.ops.fxquant.leaf(first, others, features, dtype, len(self.recorded) - 1)
            return result

        return forward

    def call(self, node: fx.Node) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        """Name, args and kwargs of the module call that a leaf node stands for."""
        first, others, _, _, index = node.args
        assert isinstance(others, (list, tuple))
        assert isinstance(index, int)
        name, structure, constants = self.recorded[index]
        tensors = iter((first, *others))
        leaves = [next(tensors) if value is _TENSOR else value for value in constants]
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        return name, args, kwargs


_TENSOR = object()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _result_dtype(name: str, module: nn.Module, k: int, x: Tensor) -> torch.dtype:
    """The dtype of a linear's result; raises where its matmul would."""
    if x.shape[-1] != k:
        raise RuntimeError(f"{name} takes [..., {k}], got {list(x.shape)}")
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
    weight = module._parameters.get("weight")
    if weight is not None and weight.is_floating_point() and weight.dtype != x.dtype:
        raise RuntimeError(f"{name} has a {weight.dtype} weight, its input is {x.dtype}")
    return x.dtype


def capture(
    model: nn.Module, example_inputs: Mapping[str, Any] | Sequence[Any] | Tensor | None = None
) -> fx.GraphModule:
    """One graph of what `model` computes in eval mode, on inputs of the shapes and dtypes of `example_inputs`.

    Every linear (`find_linears`), `QLinear`, stack of experts (`is_expert_stack`) and `QExperts` that the
    model calls is a `call_module` node whose target is the model's own submodule. `get_attr` targets are the model's
    own parameters and buffers, and constants of the trace. The result is called as the model is and returns what it
    returns, without what no graph can hold (caches), which comes back as None. Gradients are those of the ops: no
    region is without them. Nodes keep `meta["val"]`, `meta["nn_module_stack"]` and `meta["stack_trace"]`.
    `meta["example_inputs"]` of the graph holds the args and kwargs that it was captured with. The model is left as it
    was.

    Args:
        model: any module, on any device, meta included: no weight is read.
        example_inputs: keyword arguments, positional arguments or one tensor; None: derived for transformers models.

    Raises:
        ModelError: when `model` is not an `nn.Module`.
        CaptureError: when `torch.export` cannot make one graph of it; says why in one paragraph.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"a model must be a torch.nn.Module, got a {type(model).__name__}")
    inputs = [_as_call(example_inputs)] if example_inputs is not None else [((), c) for c in candidates(model)]
    first_error: Exception | None = None
    for patches, opaque in _attempts(model):
        for args, kwargs in inputs:
            calls = _Calls()
            try:
                with unchanged(model), patches(), _leaves(model, calls, opaque), torch.no_grad(), quiet():
                    program = torch.export.export(model, args, kwargs, strict=False)
            except Exception as error:  # torch.export and the model's own code raise anything
                first_error = first_error or error
            else:
                gm = _to_graph(model, program.module(check_guards=False), calls)
                gm.meta["example_inputs"] = (args, kwargs)
                return gm
    assert first_error is not None
    raise CaptureError(
        reason(model, first_error, None if example_inputs is not None else inputs[0][1])
    ) from first_error


def _as_call(inputs: Mapping[str, Any] | Sequence[Any] | Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})


_Context = Callable[[], contextlib.AbstractContextManager[None]]


def _attempts(model: nn.Module) -> Iterator[tuple[_Context, bool]]:
    """Cheapest first: a context to trace in that leaves nothing behind, and whether experts are leaves as a whole."""
    yield contextlib.nullcontext, False
    patches: _Context = contextlib.nullcontext
    if any(type(module).__module__.startswith("transformers.") for module in model.modules()):
        with contextlib.suppress(ImportError):  # a transformers without exporters
            exporter = importlib.import_module("transformers.exporters.exporter_dynamo")
            patches = functools.partial(exporter.apply_patches, "dynamo")
            yield patches, False
    if any(_name_ends_in_experts(name) for name, _ in model.named_modules()):
        yield patches, True


@contextlib.contextmanager
def _leaves(model: nn.Module, calls: _Calls, opaque: bool) -> Iterator[None]:
    """Put the leaves in place and `model` in eval mode; whoever calls restores the model."""
    model.eval()
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return _without_objects(inner(*args, **kwargs))

    vars(model)["forward"] = forward
    for name, module, shape in _leaf_modules(model, opaque):
        vars(module)["forward"] = calls.forward(name, module, shape)
        # The module's hooks run where the graph calls it: in the graph as well, they would run twice.
        vars(module).update({hooks: {} for hooks in _HOOKS})
        # Some routers cast their linear in forward: a leaf has the dtype of its input, whatever its weight is.
        vars(module)["_apply"] = functools.partial(_unmoved, module)
    yield


def _unmoved(module: nn.Module, *_: Any, **__: Any) -> nn.Module:
    return module


def _leaf_modules(model: nn.Module, opaque: bool) -> Iterator[tuple[str, nn.Module, tuple[int, int] | None]]:
    for site in find_linears(model):
        # A linear that cannot be replaced (its weight is computed or packed already) is called like any other.
        plain = site.obstacle is None or isinstance(site.module, QLinear) or _calls_linear(site.module)
        if site.name and plain:
            yield site.name, site.module, (site.n, site.k)
    for name, module in model.named_modules():
        # One product (JetMoe's experts) takes sizes that the router chose, which no leaf can hold.
        quantized = isinstance(module, QExperts) and len(module.layout.projections) > 1
        if name and (quantized or is_expert_stack(module) or _holds_experts(name, module, opaque)):
            yield name, module, None


def _holds_experts(name: str, module: nn.Module, opaque: bool) -> bool:
    """Whether experts whose weights lie deeper, or under other names, are to be one leaf.

    Linears inside would be out of sight, and each of them is quantized for itself: so only when nothing else works.
    """
    inside = [*module.modules()]
    hidden = any(isinstance(inner, nn.Linear) for inner in inside) and not opaque
    called = type(module).forward not in (nn.ModuleList.forward, nn.ModuleDict.forward)
    return _name_ends_in_experts(name) and called and not hidden and any(inner._parameters for inner in inside)


def _name_ends_in_experts(name: str) -> bool:
    return name.rpartition(".")[2] == "experts"


def _calls_linear(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward and "forward" not in vars(module)


def _without_objects(output: Any) -> Any:
    leaves, structure = pytree.tree_flatten(output)
    kept = [value if isinstance(value, (Tensor, int, float, bool, str)) else None for value in leaves]
    # Where nothing would remain, torch.export shall say what it does not understand.
    if not any(isinstance(value, Tensor) for value in kept):
        return output
    return pytree.tree_unflatten(kept, structure)


def _to_graph(model: nn.Module, exported: fx.GraphModule, calls: _Calls) -> fx.GraphModule:
    root = nn.Module()
    root._modules, root._parameters = dict(model._modules), dict(model._parameters)
    root._buffers = dict(model._buffers)
    root.training = False
    for node in list(exported.graph.nodes):
        if node.op == "get_attr":
            _own_attribute(node, model, exported, root, calls)
        elif node.op == "call_function" and node.target is torch.ops.fxquant.leaf.default:
            _call_module(node, *calls.call(node))
    for node in reversed(exported.graph.nodes):
        if not node.users and not _has_effect(node):
            exported.graph.erase_node(node)
    gm = fx.GraphModule(root, exported.graph, f"Captured{type(model).__name__}")
    gm.graph.lint()
    return gm


def _call_module(node: fx.Node, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Put a call of the module in the place of a leaf, under the module's own last name."""
    with node.graph.inserting_before(node):
        call = node.graph.create_node("call_module", target, args, kwargs, name=target.rpartition(".")[2])
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)


def _has_effect(node: fx.Node) -> bool:
    # Export asserts the dtype of whatever a `.to()` reads: true here, and false as soon as a rewrite changes a dtype.
    if node.target is torch.ops.aten._assert_tensor_metadata.default:
        return False
    return node.op in ("placeholder", "output") or (node.op == "call_function" and node.is_impure())


def _own_attribute(node: fx.Node, model: nn.Module, exported: fx.GraphModule, root: nn.Module, calls: _Calls) -> None:
    """Let a get_attr node read the model's own tensor of that name, or a constant of the trace on the new root."""
    target = str(node.target)
    value, own = _resolve(exported, target), _registered(model, target)
    if own is not None and isinstance(value, Tensor) and own.shape == value.shape:
        return
    name = target.replace(".", "_")
    while hasattr(model, name):
        name += "_"
    if isinstance(value, fx.GraphModule):
        value = _to_graph(model, value, calls)
    root.__dict__[name] = value
    node.target = name


def _registered(model: nn.Module, target: str) -> Tensor | None:
    prefix, _, name = target.rpartition(".")
    owner = _resolve(model, prefix) if prefix else model
    return owner._parameters.get(name, owner._buffers.get(name)) if isinstance(owner, nn.Module) else None


def _resolve(root: object, target: str) -> Any:
    for part in target.split("."):
        root = getattr(root, part, None)
    return root
