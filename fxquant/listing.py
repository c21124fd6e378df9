"""A graph as plain data: what `History` keeps. It holds no module and no tensor, so it keeps no weight alive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxquant.inductor import OpOverload


@dataclass(frozen=True)
class NodeRecord:
    """One node of a graph at one moment."""

    name: str
    op: str
    """`placeholder`, `get_attr`, `call_module`, `call_function`, `call_method` or `output`."""
    target: str
    """The op's name in any dialect (`silu`, `fxquant.linear`), the module's FQN, or the attribute's."""
    kind: str
    """Class of the called module; empty for anything else."""
    args: str
    inputs: tuple[str, ...]
    """Names of the nodes that this one reads."""
    shape: tuple[str, ...] | None
    dtype: str
    path: str
    """FQN of the module whose forward was running."""

    def __str__(self) -> str:
        """One line: `name: bf16[2, 8, 256] = silu(gate)`."""
        shape = f": {self.dtype}[{', '.join(self.shape)}]" if self.shape is not None else ""
        match self.op:
            case "placeholder":
                return f"{self.name}{shape} = input"
            case "get_attr":
                return f"{self.name}{shape} = self.{self.target}"
            case "call_module":
                return f"{self.name}{shape} = {self.kind} {self.target}({self.args})"
            case "output":
                return f"return {self.args}"
        return f"{self.name}{shape} = {self.target}({self.args})"


Listing = tuple[NodeRecord, ...]

_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float8_e4m3fn: "f8",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def op_name(node: fx.Node) -> str:
    """What a node calls, the same in every dialect: `silu` for `F.silu`, `aten.silu.default` and `x.silu()`.

    Ops of other libraries than aten keep their namespace: `fxquant.linear`. Nodes that call nothing give "".
    """
    target: Any = node.target
    if node.op == "call_method":
        return str(target)
    if node.op != "call_function":
        return ""
    qualified = getattr(target, "_qualified_op_name", None)  # OpOverloadPacket
    if isinstance(target, OpOverload):
        qualified = target._schema.name
    if qualified:
        return str(qualified).removeprefix("aten::").replace("::", ".")
    return str(getattr(target, "__name__", target))


def value(node: fx.Node) -> Any:
    """The fake value of a node, under either name that torch gives it, or None."""
    return node.meta.get("val", node.meta.get("example_value"))


def listing(gm: fx.GraphModule) -> Listing:
    """The graph of `gm` as plain data, in execution order."""
    return tuple(_record(gm, node) for node in gm.graph.nodes)


def _record(gm: fx.GraphModule, node: fx.Node) -> NodeRecord:
    fake = value(node)
    tensor = fake if isinstance(fake, torch.Tensor) else None
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    args = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
    return NodeRecord(
        name=node.name,
        op=node.op,
        target=op_name(node) or str(node.target),
        kind=type(gm.get_submodule(str(node.target))).__name__ if node.op == "call_module" else "",
        args=", ".join(args),
        inputs=tuple(n.name for n in node.all_input_nodes),
        shape=None if tensor is None else tuple(str(s) for s in tensor.shape),
        dtype="" if tensor is None else _DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")),
        path=str(stack[-1][0]).removeprefix("L['self'].") if stack else "",
    )


def _text(argument: Any) -> str:
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(_text(a) for a in argument)}]"
    if isinstance(argument, torch.dtype):
        return _DTYPES.get(argument, str(argument))
    return repr(argument) if isinstance(argument, str) else str(argument)
