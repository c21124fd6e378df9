"""Graphs as plain data, made by hand and at random."""

from __future__ import annotations

from hypothesis import strategies as st

from fxquant.listing import Listing, NodeRecord


def node(name: str, inputs: tuple[str, ...] = (), path: str = "", op: str = "call_function", **more: str) -> NodeRecord:
    values = {"target": "add", "kind": "", "args": ", ".join(inputs), "dtype": "f32", **more}
    return NodeRecord(name=name, op=op, inputs=inputs, shape=("2", "3"), path=path, **values)


def llama_like(layers: int) -> Listing:
    """A listing as capture gives it: per layer a norm of three ops, two linears on it, a product, a sum."""
    records, last = [node("tokens", op="placeholder", target="tokens")], "tokens"
    for i in range(layers):
        p = f"model.layers.{i}"
        names = {key: f"{key}_{i}" for key in ("pow", "rsqrt", "mul", "gate", "up", "silu", "prod", "down", "sum")}
        records += [
            node(names["pow"], (last,), f"{p}.norm", target="pow"),
            node(names["rsqrt"], (names["pow"],), f"{p}.norm", target="rsqrt"),
            node(names["mul"], (last, names["rsqrt"]), f"{p}.norm", target="mul"),
            *(
                node(
                    names[key], (names["mul"],), f"{p}.mlp.{key}", "call_module", target=f"{p}.mlp.{key}", kind="Linear"
                )
                for key in ("gate", "up")
            ),
            node(names["silu"], (names["gate"],), f"{p}.mlp", target="silu"),
            node(names["prod"], (names["silu"], names["up"]), f"{p}.mlp", target="mul"),
            node(
                names["down"], (names["prod"],), f"{p}.mlp.down", "call_module", target=f"{p}.mlp.down", kind="Linear"
            ),
            node(names["sum"], (last, names["down"]), p, target="add"),
        ]
        last = names["sum"]
    return (*records, node("output", (last,), op="output"))


@st.composite
def graphs(draw_value: st.DrawFn) -> Listing:
    """Random graphs whose nodes run in a few modules, some of them linears."""
    records: list[NodeRecord] = []
    for i in range(draw_value(st.integers(0, 25))):
        known = [r.name for r in records]
        inputs = tuple(draw_value(st.lists(st.sampled_from(known), max_size=3, unique=True))) if known else ()
        kind = draw_value(
            st.sampled_from(["op", "op", "op", "linear", "quantized", "getitem", "placeholder", "weight"])
        )
        path = draw_value(st.sampled_from(["", "m", "m.0", "m.0.a", "m.0.b", "m.1"]))
        match kind:
            case "linear":
                records.append(node(f"n{i}", inputs[:1], path, "call_module", target="m.0.lin", kind="Linear"))
            case "quantized":
                records.append(node(f"n{i}", inputs, path, target="fxquant.linear", args="x, 'int4'"))
            case "placeholder":
                records.append(node(f"n{i}", (), path, "placeholder"))
            case "weight":
                records.append(node(f"n{i}", (), path, "get_attr", target=f"m.0.w{i}.codes"))
            case _:
                records.append(node(f"n{i}", inputs, path, target="getitem" if kind == "getitem" else "add"))
    return (*records, node("output", tuple(r.name for r in records[-1:]), op="output"))
