"""Questions about a captured graph: who reads a weight, what chooses experts, which linears share an input.

Every answer maps names to the reason, as the end of a sentence. Graphs nested in the captured one (autocast regions,
branches) count like the rest of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn

from fxquant.linears import LinearSite, is_conv1d, is_expert_stack
from fxquant.listing import op_name

_MATMULS = frozenset(
    {"linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "_grouped_mm", "grouped_mm_fallback", "mv", "dot"}
)
# Ops that move or reinterpret numbers and leave each what it is.
_VIEWS = frozenset(
    {
        *("t", "numpy_T", "transpose", "permute", "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze"),
        *("unsqueeze", "expand", "expand_as", "slice", "select", "narrow", "chunk", "split", "split_with_sizes"),
        *("unbind", "getitem", "contiguous", "clone", "alias", "detach", "to", "_to_copy", "type_as", "movedim", "mT"),
        *("swapaxes", "lift_fresh_copy", "index", "index_select", "repeat", "cat", "stack"),
    }
)
# What may lie between a router's linear and the choice: a score per expert stays a score per expert.
_SCORES = _VIEWS | frozenset(
    {
        *("softmax", "_softmax", "log_softmax", "sigmoid", "tanh", "softplus", "sqrt", "exp", "relu", "abs", "neg"),
        *("add", "sub", "rsub", "mul", "div", "masked_fill", "where", "clamp", "nan_to_num", "dropout", "scatter"),
    }
)
_CHOICES = frozenset({"topk", "sort", "argsort", "argmax", "max", "kthvalue", "one_hot"})
# Ops that only say again what their input is, where dtype and shape stay the same.
_REPEATS = frozenset({"to", "_to_copy", "alias", "contiguous", "detach", "clone", "dropout", "lift_fresh_copy"})


def read_elsewhere(gm: fx.GraphModule, sites: Sequence[LinearSite]) -> dict[str, str]:
    """Linears whose weight or bias other code than their own forward reads, such as `nn.MultiheadAttention`'s."""
    owners = {
        id(tensor): (site, kind)
        for site in sites
        for kind, tensor in site.module._parameters.items()
        if tensor is not None
    }
    reasons: dict[str, str] = {}
    for graph, node in _nodes(gm):
        site, kind = owners.get(id(_attribute(graph, node)), (None, ""))
        if site is None:
            continue
        readers = [user for user in node.users if _place(user) not in site.aliases]
        if readers:
            reasons.setdefault(site.name, f"its {kind} is read by {_described(readers[0])}")
    return reasons


def routers(gm: fx.GraphModule, sites: Sequence[LinearSite]) -> dict[str, str]:
    """Linears whose output decides which experts run.

    From the linear's call, along ops that keep a score a score, to a `topk`, `sort`, `argmax` or the like; and from
    there, through no other linear, to experts of the same numbered block (the residual stream leads to every other).
    """
    names = {alias: site.name for site in sites for alias in site.aliases}
    reasons: dict[str, str] = {}
    for graph, node in _nodes(gm):
        if node.op != "call_module" or node.target not in names:
            continue
        block = _block(str(node.target))
        for choice in (found for found in _reached(node, _SCORES) if _op(found) in _CHOICES):
            experts = (found for found in _reached(choice, None) if _runs_experts(graph, found))
            if any(_place(found).startswith(block) for found in experts):
                reasons.setdefault(names[str(node.target)], f"it chooses experts ({_op(choice)} in {_where(choice)})")
    return reasons


def _reached(start: fx.Node, through: frozenset[str] | None) -> Iterator[fx.Node]:
    """Nodes that `start` flows into: along ops in `through`, None: along everything that calls no module or matmul."""
    seen, queue = {start}, [start]
    while queue:
        for user in queue.pop().users:
            if user in seen:
                continue
            seen.add(user)
            yield user
            opaque = user.op != "call_function" or _op(user) in _MATMULS or "attention" in _op(user)
            if not opaque if through is None else _op(user) in through:
                queue.append(user)


def _runs_experts(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return any(weight.dim() > 2 for _, weight in _weights_of(gm, node))
    module = gm.get_submodule(str(node.target))
    return is_expert_stack(module) or not _is_linear(module) or "experts" in str(node.target).split(".")


def _block(name: str) -> str:
    """The name up to its first number: `model.layers.3.` of `model.layers.3.mlp.gate`."""
    found = re.match(r"(.*?\.)?\d+\.", name)
    return found[0] if found else ""


def bare_matmuls(gm: fx.GraphModule, sites: Sequence[LinearSite] = ()) -> dict[str, str]:
    """Parameters that the graph multiplies by without a linear module, by name, with the place where it does.

    Routers that call `F.linear` on a parameter of their own, `in_proj_weight` of `nn.MultiheadAttention`, tables used
    as output embeddings. No linear module: such a weight cannot be replaced, and a plan has to say so. The weights of
    `sites` are left out, also those that other code reads (see `read_elsewhere`).
    """
    known = {id(p) for site in sites for p in site.module._parameters.values()}
    known |= {id(p) for graph, node in _nodes(gm) for p in _parameters_of_call(graph, node)}
    reasons: dict[str, str] = {}
    for graph, node in _nodes(gm):
        for name, weight in _weights_of(graph, node):
            if id(weight) not in known:
                reasons.setdefault(name, f"{_op(node)} in {_where(node)}")
    return reasons


def _parameters_of_call(gm: fx.GraphModule, node: fx.Node) -> list[Tensor]:
    return list(gm.get_submodule(str(node.target)).parameters()) if node.op == "call_module" else []


def _weights_of(gm: fx.GraphModule, node: fx.Node) -> list[tuple[str, nn.Parameter]]:
    """Parameters, perhaps viewed otherwise, that a matmul multiplies by: name and value."""
    if _op(node) not in _MATMULS:
        return []
    # The first argument of linear is the input: a learned query there is no weight.
    operands = node.all_input_nodes[1:2] if _op(node) == "linear" else node.all_input_nodes
    found = []
    for source in map(_unviewed, operands):
        value = _attribute(gm, source)
        if isinstance(value, nn.Parameter) and value.dim() > 1:
            found.append((str(source.target), value))
    return found


def _unviewed(node: fx.Node) -> fx.Node:
    while _op(node) in _VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def uncalled(gm: fx.GraphModule, sites: Sequence[LinearSite]) -> dict[str, str]:
    """Linears that the graph neither calls nor reads: nothing is known about their dataflow."""
    used = {str(node.target) for _, node in _nodes(gm) if node.op == "call_module"}
    read = {id(_attribute(graph, node)) for graph, node in _nodes(gm)}
    return {
        site.name: "the captured graph never calls it"
        for site in sites
        if used.isdisjoint(site.aliases) and id(site.module._parameters.get("weight")) not in read
    }


def siblings(gm: fx.GraphModule) -> list[tuple[str, ...]]:
    """Groups of two or more linears that read the same tensor each time that they are called (q/k/v, gate/up)."""
    sources: dict[str, list[fx.Node]] = {}
    for graph, node in _nodes(gm):
        if node.op == "call_module" and node.args and _is_linear(graph.get_submodule(str(node.target))):
            first = node.args[0]
            if isinstance(first, fx.Node):
                sources.setdefault(str(node.target), []).append(_source(first))
    groups: dict[tuple[fx.Node, ...], list[str]] = {}
    for name, nodes in sources.items():
        groups.setdefault(tuple(nodes), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def routers_by_structure(model: nn.Module) -> dict[str, str]:
    """Linears that are or belong to a router, told by names alone: for models of which there is no graph.

    A router is a module called `router` or `gate`, or of a class called `...Router`, with `experts` beside it.
    """
    reasons: dict[str, str] = {}
    for name, parent in model.named_modules():
        if "experts" not in parent._modules:
            continue
        for child_name, child in parent.named_children():
            if child_name in ("router", "gate") or type(child).__name__.endswith("Router"):
                path = f"{name}.{child_name}".lstrip(".")
                for inner, module in child.named_modules():
                    if _is_linear(module):
                        reasons[f"{path}.{inner}".rstrip(".")] = f"it is a router: {path} stands beside experts"
    return reasons


def _nodes(gm: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, fx.Node]]:
    """Every node of the graph and of the graphs nested in it, with the module that its targets are names in."""
    for node in gm.graph.nodes:
        yield gm, node
        if node.op == "get_attr":
            inner = _attribute(gm, node)
            if isinstance(inner, fx.GraphModule):
                yield from _nodes(inner)


def _attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    if node.op != "get_attr":
        return None
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _op(node: fx.Node) -> str:
    return op_name(node).rpartition(".")[2].rstrip("_")


def _source(node: fx.Node) -> fx.Node:
    while _op(node) in _REPEATS and isinstance(node.args[0], fx.Node):
        before, after = (_kind(one.meta.get("val")) for one in (node.args[0], node))
        if before is None or before != after:
            break
        node = node.args[0]
    return node


def _kind(value: object) -> tuple[object, ...] | None:
    return (value.dtype, value.shape, value.device) if isinstance(value, Tensor) else None


def _stack(node: fx.Node) -> tuple[str, str]:
    """Name and class of the innermost module that `node` was traced in."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    name, kind = stack[-1] if stack else ("", "")
    kind = kind if isinstance(kind, str) else kind.__name__
    return re.sub(r"@\d+$", "", str(name)), kind.rpartition(".")[2]


def _place(node: fx.Node) -> str:
    return _stack(node)[0]


def _where(node: fx.Node) -> str:
    name, kind = _stack(node)
    return f"{name} ({kind})" if name else kind or "the graph"


def _described(node: fx.Node) -> str:
    return f"{_op(node)} in {_where(node)}" if node.op == "call_function" else f"the graph's {node.op}"
