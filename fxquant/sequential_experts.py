"""`SequentialExperts`: experts as single linears, for whatever needs a module per matrix: hooks, calibration, adapters.

Made of stacked experts, one module after the other:

    for site in find_experts(model):
        model.set_submodule(site.name, sequentialize(site))  # model.layers.3.mlp.experts.17.down_proj is an nn.Linear
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fxquant.errors import ModelError
from fxquant.expert_containers import ExpertsContainer, held_parameters
from fxquant.expert_layouts import ExpertsLayout, Projection, expert_bias, expert_weight
from fxquant.expert_stacks import joined
from fxquant.experts import ExpertSite, layout_of
from fxquant.inductor import FakeTensor
from fxquant.modules import follow_device_hook

_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class SequentialExperts(ExpertsContainer):
    """Experts as children "0", "1", ..., each with a linear per projection: `<module>.17.down_proj`.

    It takes and gives what the class that it stands for does. In eager mode each linear is called with the rows of its
    own expert, in the order of the tokens, and not at all where there are none. Where no data may be looked at (under
    `torch.compile` and `torch.export`, on fake tensors and on the meta device) each linear is called with all rows,
    those of other experts set to zero: the same numbers to rounding, for as many times the work as there are experts.
    """

    def __init__(self, module: nn.Module, layout: ExpertsLayout) -> None:
        """Stand for `module`, with weights that are views of its parameters; see `own_weights`.

        Raises:
            ModelError: the experts of `module` cannot be parted from it.
        """
        problem = _obstacle(module, layout)
        if problem:
            raise ModelError(f"these {type(module).__name__} cannot be made sequential: {problem}")
        super().__init__(module, layout)
        for name, shape in self.stack_shapes.items():
            rest = module.get_parameter(name).detach()[layout.experts :]
            if len(shape) == 3 and len(rest):
                # Experts that do nothing can have rows that nobody reads: kept for the way back, and in no file.
                self.register_buffer(_rest(name), rest, persistent=False)
        for e in range(layout.experts):
            linears = {p.name: _linear(module, layout, p, e) for p in layout.projections}
            self.add_module(str(e), nn.ModuleDict(linears).train(module.training))
        follow_device_hook(self, module)

    def own_weights(self) -> SequentialExperts:
        """Copy every weight, so that what they were views of may be let go; returns the module."""
        parameters = (p for e in range(self.layout.experts) for p in getattr(self, str(e)).parameters())
        for tensor in (*parameters, *self.unread.values()):
            tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)
        return self

    @property
    def unread(self) -> dict[str, Tensor]:
        """Rows of the original parameters that belong to no expert, by the parameter's name."""
        rests = {name: self._buffers.get(_rest(name)) for name in self.stack_shapes}
        return {name: rest for name, rest in rests.items() if rest is not None}

    def project(self, name: str, x: Tensor, ids: Tensor) -> Tensor:
        """As `ExpertsContainer.project`.

        Raises:
            ModelError: there is no projection or parameter of this name.
        """
        parts = self.layout.parts(name) or (self.layout.projection(name),)
        if torch.compiler.is_compiling() or ids.is_meta or isinstance(ids, FakeTensor):
            return self._masked(parts, x, ids)
        return self._routed(parts, x, ids)

    def _routed(self, parts: Sequence[Projection], x: Tensor, ids: Tensor) -> Tensor:
        """Every expert on its own rows."""
        count = self.layout.experts
        bins = torch.where((ids < 0) | (ids >= count), count, ids).flatten()
        sizes = torch.bincount(bins, minlength=count + 1).tolist()
        order = bins.argsort(stable=True)
        outputs = []
        for e, slots in enumerate(order.split(sizes)[:count]):
            if sizes[e]:
                rows = x[slots // ids.shape[1]] if x.dim() == 2 else x.flatten(0, 1)[slots]
                outputs.append(self._one(e, parts, rows))
        if not outputs:
            return x.new_zeros(*ids.shape, sum(getattr(self, "0")[p.name].out_features for p in parts))
        found = torch.cat(outputs)
        result = found.new_zeros(ids.numel(), found.shape[-1]).index_copy(0, order[: len(found)], found)
        return result.view(*ids.shape, -1)

    def _masked(self, parts: Sequence[Projection], x: Tensor, ids: Tensor) -> Tensor:
        """Every expert on all rows, without those of others: what the rows are does not decide what is run."""
        result: Tensor | float = 0.0
        for e in range(self.layout.experts):
            mine = ids == e
            rows = mine.any(-1) if x.dim() == 2 else mine
            output = self._one(e, parts, x.masked_fill(~rows.unsqueeze(-1), 0))
            result = torch.where(mine.unsqueeze(-1), output.unsqueeze(1) if x.dim() == 2 else output, result)
        assert isinstance(result, Tensor)
        return result

    def _one(self, e: int, parts: Sequence[Projection], rows: Tensor) -> Tensor:
        """What one expert makes of rows, the columns of several projections as their parameter has them."""
        expert = getattr(self, str(e))
        return joined([expert[part.name](rows) for part in parts], parts)

    def own_names(self) -> set[str]:
        """Names of attributes, children and buffers that are the container's own."""
        experts, rests = map(str, range(self.layout.experts)), map(_rest, self.stack_shapes)
        return super().own_names() | {*experts, *rests}

    def extra_repr(self) -> str:
        """Which class it stands for, as `print(model)` shows it."""
        return f"of {self.origin.__name__}"


def sequentialize(experts: nn.Module | ExpertSite) -> SequentialExperts:
    """Experts stacked in parameters as modules of their own, bit by bit the same numbers.

    `stack` is the inverse. Goes through one module, on any device, meta included, and leaves it as it is: what is
    needed is room for its weights once more.

    Args:
        experts: a module that holds stacked experts, or a site that `find_experts` found.

    Raises:
        ModelError: the module holds no stacked experts that can be read, they are not its alone, or something else
            than the class computes with them.
    """
    module = experts.module if isinstance(experts, ExpertSite) else experts
    layout = layout_of(module)
    if not isinstance(layout, ExpertsLayout):
        reason = layout or "it holds no stacked experts; find_experts(model) finds those that do"
        raise ModelError(f"this {type(module).__name__} cannot be made sequential: {reason}")
    return SequentialExperts(module, layout).own_weights()


def stack(experts: SequentialExperts) -> nn.Module:
    """The inverse of `sequentialize`: a module of the original class, bit by bit the same numbers.

    Raises:
        ModelError: linears that were replaced, that are called with hooks, share a parameter, or differ in dtype, shape
            or device, or of which some alone require gradients: one stack cannot hold that.
    """
    problem = _stack_obstacle(experts)
    if problem:
        raise ModelError(f"these experts cannot be stacked: {problem}")
    module, layout = experts.restored(), experts.layout
    for name, shape in experts.stack_shapes.items():
        like = next(one for holder, one in _held(experts) if holder == name)
        path, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device), like.requires_grad)
        vars(parameter).update(vars(like))
        module.get_submodule(path).register_parameter(leaf, parameter)
    with torch.no_grad():
        for name, rest in experts.unread.items():
            module.get_parameter(name)[layout.experts :] = rest
        for e in range(layout.experts):
            for p in layout.projections:
                linear = getattr(experts, str(e))[p.name]
                expert_weight(module, layout, p.name, e).copy_(linear.weight)
                bias = expert_bias(module, layout, p.name, e)
                if bias is not None:
                    bias.copy_(linear.bias)
    follow_device_hook(module, experts)
    return module


def _rest(parameter: str) -> str:
    return f"unread_{parameter.replace('.', '_')}"


def _linear(module: nn.Module, layout: ExpertsLayout, projection: Projection, e: int) -> nn.Linear:
    """One matrix of one expert as a linear, whose parameters are views."""
    weight, bias = expert_weight(module, layout, projection.name, e), expert_bias(module, layout, projection.name, e)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = _part(weight, module.get_parameter(projection.parameter))
    if bias is not None:
        linear.bias = _part(bias, module.get_parameter(str(projection.bias)))
    return linear


def _part(view: Tensor, whole: nn.Parameter) -> nn.Parameter:
    part = nn.Parameter(view.detach(), whole.requires_grad)
    vars(part).update(vars(whole))
    return part


def _obstacle(module: nn.Module, layout: ExpertsLayout) -> str | None:
    """Why these experts cannot become modules of their own, or None."""
    own = vars(module)
    if "forward" in own and "_hf_hook" not in own:
        return "its forward is overridden on the instance, and nothing else would be called"
    if getattr(own.get("_hf_hook"), "offload", False):
        return "accelerate has put its weights elsewhere: load the model without offloading"
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name in held_parameters(layout):
        parameter = module.get_parameter(name)
        if len(names[id(parameter)]) > 1:
            return f"{' and '.join(names[id(parameter)])} are one parameter, which would be two"
        if parameter.grad is not None:
            return f"its {name} has a gradient, which would be lost: zero_grad() first"
    return None


def _held(experts: SequentialExperts) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of the linears, behind the name of the parameter that held it."""
    for e in range(experts.layout.experts):
        for p in experts.layout.projections:
            linear = getattr(experts, str(e))[p.name]
            yield p.parameter, linear.weight
            if p.bias is not None:
                yield p.bias, linear.bias


def _stack_obstacle(experts: SequentialExperts) -> str | None:
    """Why these experts cannot be one stack, or None."""
    names = {p.name for p in experts.layout.projections}
    for e in range(experts.layout.experts):
        expert = experts._modules[str(e)]
        if not isinstance(expert, nn.ModuleDict) or set(expert) != names or [*expert.parameters(recurse=False)]:
            return f"{e} is no longer just the linears {', '.join(sorted(names))}"
        for p in experts.layout.projections:
            problem = _linear_obstacle(getattr(experts, str(e))[p.name], experts.matrix_shape(p), p.bias is not None)
            if problem:
                return f"{e}.{p.name} {problem}"
    held = list(_held(experts))
    if len({id(parameter) for _, parameter in held}) < len(held):
        return "some of their parameters are one and the same, and would no longer be"
    for name in experts.stack_shapes:
        kinds = {(one.dtype, one.device, one.requires_grad) for holder, one in held if holder == name}
        if len(kinds) > 1:
            found = "; ".join(sorted(f"{d}, {where}, requires_grad={grad}" for d, where, grad in kinds))
            return f"their parameters would be one {name}, and differ: {found}"
    return None


def _linear_obstacle(linear: nn.Module, shape: tuple[int, int], bias: bool) -> str | None:
    if type(linear) is not nn.Linear:
        return f"is a {type(linear).__name__}, not an nn.Linear: put that back first (fxquant.dequantize, unload)"
    if any(getattr(linear, hooks) for hooks in _CALL_HOOKS) or "forward" in vars(linear):
        return "is called with hooks or a forward of its own, which a stack cannot call: take them off first"
    found, has_bias = tuple(linear.weight.shape), linear.bias is not None
    if found != shape or has_bias != bias:
        return f"is {list(found)} {'with' if has_bias else 'without'} bias, it was {list(shape)} when it was made"
    if any(parameter.grad is not None for parameter in linear.parameters()):
        return "has a gradient, which would be lost: zero_grad() first"
    return None
