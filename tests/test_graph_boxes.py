"""Folding a region of a graph into a few boxes."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from xml.etree import ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.graph_boxes import Boxes, first_block, inside, to_boxes
from fxquant.graph_picture import draw
from fxquant.listing import Listing

sys.path.insert(0, str(Path(__file__).parent))

from listings import graphs, llama_like, node

SVG = "{http://www.w3.org/2000/svg}"


def titles(boxes: Boxes) -> list[str]:
    return [box.title for box in boxes.boxes]


def test_a_block_is_folded_into_linears_and_what_lies_between_them() -> None:
    found = to_boxes(llama_like(3), "model.layers.1")
    assert titles(found) == ["norm", "gate", "up", "mlp", "down", "add", "layers.0", "layers.2"]
    kinds = [box.kind for box in found.boxes]
    assert kinds == ["op", "linear", "linear", "op", "linear", "op", "input", "output"]
    assert found.boxes[0].nodes == ("pow_1", "rsqrt_1", "mul_1")
    assert found.boxes[0].detail == ("pow, rsqrt, mul", "f32[2, 3]")
    wanted = {(0, 1), (0, 2), (1, 3), (2, 3), (3, 4), (4, 5), (6, 0), (6, 5), (5, 7)}
    assert set(found.edges) == wanted


def test_the_first_of_the_repeated_blocks_is_the_region() -> None:
    assert first_block(llama_like(3)) == "model.layers.0"
    assert first_block(llama_like(40)[9:]) == "model.layers.1"
    assert first_block(llama_like(1)) == ""
    assert first_block(()) == ""
    experts = tuple(
        node(f"e{i}{j}", path=f"h.{i}.experts.{j}.up", op="call_module", kind="Linear")
        for i, j in itertools.product(range(2), range(5))
    )
    assert first_block(experts) == "h.0"


def test_a_region_is_a_module_and_what_is_below_it() -> None:
    record = node("x", path="model.layers.1.mlp")
    assert inside(record, "model.layers.1")
    assert inside(record, "")
    assert not inside(record, "model.layers.1.mlp.up")
    assert not inside(node("x", path="model.layers.10"), "model.layers.1")


@settings(max_examples=200, deadline=None)
@given(graphs(), st.sampled_from(["", "m", "m.0", "m.0.a"]))
def test_boxes_hold_each_node_once_keep_every_edge_and_make_no_cycle(graph: Listing, region: str) -> None:
    found = to_boxes(graph, region)
    own = [r for r in graph if r.op not in ("get_attr", "placeholder", "output") and inside(r, region)]
    boxed = [name for box in found.boxes if box.kind not in ("input", "output") for name in box.nodes]
    assert sorted(boxed) == sorted(r.name for r in own)
    home = {name: i for i, box in enumerate(found.boxes) if box.kind not in ("input", "output") for name in box.nodes}
    for record in own:
        for name in record.inputs:
            if name in home and home[name] != home[record.name]:
                assert (home[name], home[record.name]) in found.edges
    assert len(_topological(len(found.boxes), found.edges)) == len(found.boxes)
    for box in found.boxes:
        if box.kind in ("linear", "quantized"):
            assert len(box.nodes) == 1
    assert ElementTree.fromstring(draw(graph, region)).tag == f"{SVG}svg"


def _topological(count: int, edges: tuple[tuple[int, int], ...]) -> list[int]:
    """The vertices that can be ordered: all of them where there is no cycle."""
    done: list[int] = []
    while True:
        ready = [i for i in range(count) if i not in done and all(a in done for a, b in edges if b == i)]
        if not ready:
            return done
        done += ready
