"""A region of a graph as the few boxes that a person wants to see: plain data, no geometry."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from fxquant.listing import Listing, NodeRecord

Kind = Literal["quantized", "linear", "op", "input", "output"]

_SPLITS = frozenset({"split", "split_with_sizes", "chunk", "unbind"})
_VIEWS = frozenset(
    {"view", "reshape", "transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "slice", "select"}
)
_MOVES = _SPLITS | _VIEWS | {"getitem", "to", "alias", "contiguous", "cat", "flatten", "clone", "type_as"}
"""Ops that move data and compute nothing: named in a box only where there is nothing else."""
_HEAVY = ("scaled_dot_product_attention", "softmax", "bmm", "matmul", "conv1d", "conv2d")
_OPS_WIDTH = 34


@dataclass(frozen=True)
class Box:
    """One box: a linear, or everything between linears that one module computes."""

    kind: Kind
    title: str
    detail: tuple[str, ...]
    nodes: tuple[str, ...]
    """Names of the graph's nodes in it; weights are folded into the box of the linear that reads them."""


@dataclass(frozen=True)
class Boxes:
    """Boxes in an order in which they can run, and which reads which, by index."""

    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int], ...]


def is_quantized(record: NodeRecord) -> bool:
    """Whether the node is a quantized linear or stack of experts."""
    return record.target in ("fxquant.linear", "fxquant.experts") or record.kind in ("QLinear", "QExperts")


def inside(record: NodeRecord, region: str) -> bool:
    """Whether the node belongs to the module `region` or one below it; everything belongs to ""."""
    return not region or record.path == region or record.path.startswith(f"{region}.")


def first_block(listing: Listing) -> str:
    """FQN of the first of the repeated blocks that hold linears (`model.layers.0`); "" where nothing repeats."""
    numbers: dict[str, dict[str, None]] = {}
    for record in listing:
        if record.op == "call_module" or is_quantized(record):
            parts = record.path.split(".")
            for i, part in enumerate(parts[:-1]):
                if part.isdecimal():
                    numbers.setdefault(".".join(parts[:i]), {})[part] = None
    repeated = [parent for parent, found in numbers.items() if len(found) > 1]
    if not repeated:
        return ""
    parent = min(repeated, key=lambda name: name.count(".") if name else -1)
    return f"{parent}.{next(iter(numbers[parent]))}".lstrip(".")


def weights_of(record: NodeRecord, by_name: Mapping[str, NodeRecord]) -> list[str]:
    """FQNs of the modules whose planes a quantized node reads, each once, in order."""
    reads = [by_name[name] for name in record.inputs if name in by_name]
    return list(dict.fromkeys(r.target.rpartition(".")[0] for r in reads if r.op == "get_attr"))


def scheme_of(record: NodeRecord) -> str:
    """The spelling of the scheme in the arguments of a quantized node, or ""."""
    found = re.search(r"'([^']+)'", record.args)
    return found[1] if found else ""


def shape_text(record: NodeRecord) -> str:
    """`bf16[2, 8, 256]`, or "" for a node that gives no tensor."""
    return "" if record.shape is None else f"{record.dtype}[{', '.join(record.shape)}]"


def to_boxes(listing: Listing, region: str = "") -> Boxes:
    """Fold the nodes of a region.

    A linear is a box of its own. All other nodes are folded into one box where they run in the same module and lie
    next to each other, as long as no box comes to read from itself by way of another.

    Args:
        listing: the graph.
        region: FQN of a module; "" for the whole graph.
    """
    by_name = {r.name: r for r in listing}
    nodes = [r for r in listing if r.op not in ("get_attr", "placeholder", "output") and inside(r, region)]
    groups = _groups(nodes)
    boxes = [_box([by_name[name] for name in group], region, by_name) for group in groups]
    home = {name: index for index, group in enumerate(groups) for name in group}
    edges = {(home[i], home[r.name]): None for r in nodes for i in r.inputs if i in home and home[i] != home[r.name]}
    for names, box in _sources(nodes, home, by_name, region):
        boxes.append(box)
        edges |= {(len(boxes) - 1, home[r.name]): None for r in nodes if names & set(r.inputs)}
    for name, box in _sinks(listing, home, region):
        boxes.append(box)
        edges[home[name], len(boxes) - 1] = None
    return Boxes(tuple(boxes), tuple(edges))


def _glue(record: NodeRecord) -> bool:
    return record.op != "call_module" and not is_quantized(record)


def _groups(nodes: list[NodeRecord]) -> list[list[str]]:
    """Names of the nodes that share a box, boxes in execution order.

    Nodes are numbered such that an edge within a module's glue may keep the number and any other edge raises it; each
    connected piece of one module with one number is a box. A way out of a box and back would have to raise the number.
    """
    records = {r.name: r for r in nodes}

    def step(a: str, b: str) -> int:
        return 0 if _glue(records[a]) and _glue(records[b]) and records[a].path == records[b].path else 1

    level: dict[str, int] = {}
    users: dict[str, list[str]] = {name: [] for name in records}
    for record in nodes:
        reads = [name for name in record.inputs if name in records]
        level[record.name] = max((level[name] + step(name, record.name) for name in reads), default=0)
        for name in reads:
            users[name].append(record.name)
    # As late as possible: what is made early joins the piece that reads it. The pieces of a split stay with the split.
    for record in reversed(nodes):
        if _glue(record) and users[record.name] and record.target != "getitem":
            level[record.name] = min(level[user] - step(record.name, user) for user in users[record.name])
    group = {name: [name] for name in records}
    for record in nodes:
        for name in record.inputs:
            if name in records and not step(name, record.name) and level[name] == level[record.name]:
                _join(group, name, record.name)
    return list({id(members): members for members in group.values()}.values())


def _join(group: dict[str, list[str]], a: str, b: str) -> None:
    if group[a] is not group[b]:
        group[a] += group[b]
        for name in group[b]:
            group[name] = group[a]


def _box(group: list[NodeRecord], region: str, by_name: Mapping[str, NodeRecord]) -> Box:
    first, names = group[0], tuple(r.name for r in group)
    if is_quantized(first):
        weights = weights_of(first, by_name) or [first.target if first.op == "call_module" else first.path]
        title = " + ".join(_tail(weight) for weight in weights)
        return Box("quantized", title, _lines(scheme_of(first) or first.kind, shape_text(first)), names)
    if first.op == "call_module":
        return Box("linear", _tail(first.target), _lines(first.kind, shape_text(first)), names)
    ops = list(dict.fromkeys(r.target for r in group))
    computing = [op for op in ops if op not in _MOVES] or ops
    if first.target in _SPLITS and set(ops) <= _MOVES:
        pieces = " ".join(f"[{', '.join(r.shape)}]" for r in group if r.target == "getitem" and r.shape is not None)
        return Box("op", "split", _lines(pieces), names)
    last = next((r for r in reversed(group) if r.shape is not None), group[-1])
    if len(computing) == 1 or first.path == region:
        return Box("op", _ops_text(computing), _lines(shape_text(last)), names)
    return Box("op", _tail(first.path), _lines(_ops_text(computing), shape_text(last)), names)


def _ops_text(ops: Iterable[str]) -> str:
    ordered = sorted(ops, key=lambda op: op not in _HEAVY)
    text = ordered[0]
    for op in ordered[1:]:
        if len(text) + len(op) > _OPS_WIDTH:
            return f"{text}, ..."
        text += f", {op}"
    return text


def _lines(*lines: str) -> tuple[str, ...]:
    return tuple(line for line in lines if line)


def _tail(path: str) -> str:
    """The last part of a path, and the part before it where the last is a number: `layers.3`."""
    parts = path.split(".")
    return ".".join(parts[-2:] if parts[-1].isdecimal() else parts[-1:])


def _sources(
    nodes: list[NodeRecord], home: Mapping[str, int], by_name: Mapping[str, NodeRecord], region: str
) -> list[tuple[set[str], Box]]:
    """What the region reads from outside: one box per module that makes it, weights left out."""
    outside: dict[str, list[NodeRecord]] = {}
    for record in nodes:
        for name in record.inputs:
            source = by_name.get(name)
            if source is not None and name not in home and source.op != "get_attr" and not _is_weight(source, record):
                own = source.op == "placeholder" or f"{region}.".startswith(f"{source.path}.") or not source.path
                outside.setdefault(name if own else _tail(source.path), []).append(source)
    return [
        (
            {r.name for r in found},
            Box("input", title, _lines(shape_text(found[0])), tuple(dict.fromkeys(r.name for r in found))),
        )
        for title, found in outside.items()
    ]


def _is_weight(source: NodeRecord, reader: NodeRecord) -> bool:
    """In the graph that `torch.compile` sees, weights are placeholders: all but the first input of a quantized op."""
    return source.op == "placeholder" and is_quantized(reader) and source.name != reader.inputs[0]


def _sinks(listing: Listing, home: Mapping[str, int], region: str) -> list[tuple[str, Box]]:
    """Which nodes of the region are read from outside, and by whom."""
    readers: dict[str, dict[str, None]] = {}
    depth = region.count(".") + 1
    for record in listing:
        if record.name not in home:
            reader = "output" if record.op == "output" else _tail(".".join(record.path.split(".")[:depth]))
            for name in record.inputs:
                if name in home:
                    readers.setdefault(name, {})[reader] = None
    return [(name, Box("output", ", ".join(found), (), ())) for name, found in readers.items()]
