"""Graphs and histories as people see them: folding, layout, pictures, diffs, pages."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import fxquant
from fxquant.errors import FileError
from fxquant.graph_boxes import inside, to_boxes
from fxquant.graph_picture import Picture, draw
from fxquant.graph_view import diff, listing_text
from fxquant.histories import Fired, History, Miss, Step
from fxquant.listing import Listing

sys.path.insert(0, str(Path(__file__).parent))
from listings import graphs, llama_like, node
from tiny_models import tiny_model

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def history() -> History:
    model = tiny_model("llama")
    fxquant.quantize(model, "int8", exclude=["*.1.mlp.down_proj"], progress=False)
    return fxquant.history(model)


def test_merged_siblings_show_as_one_box_and_a_split(history: History) -> None:
    before, after = to_boxes(history.before, "model.layers.0"), to_boxes(history.after, "model.layers.0")
    linears = [box.title for box in before.boxes if box.kind == "linear"]
    assert linears == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    quantized = {box.title: i for i, box in enumerate(after.boxes) if box.kind == "quantized"}
    assert list(quantized) == ["q_proj + k_proj + v_proj", "o_proj", "gate_proj + up_proj", "down_proj"]
    assert not [box for box in after.boxes if box.kind == "linear"]
    merged = after.boxes[quantized["q_proj + k_proj + v_proj"]]
    assert merged.detail[0] == "int8"
    split = next(b for a, b in after.edges if a == quantized["q_proj + k_proj + v_proj"])
    assert after.boxes[split].title == "split"
    assert len(after.boxes[split].nodes) == 4  # the split and its three pieces
    kept = [box.title for box in to_boxes(history.after, "model.layers.1").boxes if box.kind == "linear"]
    assert kept == ["down_proj"]


def test_a_picture_is_svg_that_shows_each_box(history: History) -> None:
    picture = draw(history.after, "model.layers.1")
    root = ElementTree.fromstring(picture)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    for box in to_boxes(history.after, "model.layers.1").boxes:
        assert box.title in texts
    assert isinstance(picture, Picture)
    assert str(picture) in picture._repr_html_()
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for group in root.iter(f"{SVG}g"):
        for rect in group.findall(f"{SVG}rect"):
            assert float(rect.attrib["x"]) >= 0
            assert float(rect.attrib["x"]) + float(rect.attrib["width"]) < width
            assert float(rect.attrib["y"]) + float(rect.attrib["height"]) < height


def test_the_pair_frames_what_is_gone_and_what_is_new(history: History) -> None:
    root = ElementTree.fromstring(history.picture())
    frames: dict[str, list[str]] = {}
    for group in root.iter(f"{SVG}g"):
        rect, text = group.find(f"{SVG}rect"), group.find(f"{SVG}text")
        if rect is not None and text is not None and "stroke-width" in rect.attrib:
            frames.setdefault(rect.attrib["stroke"], []).append(str(text.text))
    gone, new = frames.values()
    assert gone == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [t for t in new if t != "split"] == [
        "q_proj + k_proj + v_proj",
        "o_proj",
        "gate_proj + up_proj",
        "down_proj",
    ]


def test_a_large_graph_has_a_small_default_and_an_honest_limit() -> None:
    graph = llama_like(32)
    small = [text.text for text in ElementTree.fromstring(draw(graph)).iter(f"{SVG}text")]
    assert len(small) < 40
    assert "layers.1" in small
    whole = [str(text.text) for text in ElementTree.fromstring(draw(graph, "")).iter(f"{SVG}text")]
    count = len(to_boxes(graph, "").boxes)
    assert any(text == f"... and {count - 150} boxes more: choose a region" for text in whole)


@pytest.mark.parametrize("region", ["model.layers.77", "nowhere"])
def test_an_empty_region_says_so(region: str) -> None:
    assert f"no node of the graph runs in {region}" in draw(llama_like(2), region)
    assert "the graph is empty" in draw((), "")


def test_names_are_escaped() -> None:
    evil = "<script>alert('x')</script>&"
    graph = (node(evil, path="m", target=evil), node("y", (evil,), evil, "call_module", target=evil, kind=evil))
    for text in (draw(graph, ""), History((), (Step(evil, (), (Miss(evil, evil),), graph, 0.1),)).to_html("")):
        assert "<script" not in text
    assert ElementTree.fromstring(draw(graph, "")) is not None


def test_a_listing_names_weights_where_they_are_read(history: History) -> None:
    text = listing_text(history.after)
    assert "self_attn.q_proj + self_attn.k_proj + self_attn.v_proj, int8)" in text
    assert "mul(input_layernorm.weight, " in text
    assert "codes" not in text
    nodes = [r for r in history.after if inside(r, "model.layers.0") and r.op != "get_attr"]
    assert len(text.splitlines()) == len(nodes)
    assert listing_text(history.before, "").splitlines()[-1].startswith("return ")
    assert "Linear model.layers.0.self_attn.q_proj(" in listing_text(history.before, "")


def test_a_diff_marks_what_is_gone_new_and_changed() -> None:
    a, b, c = node("a", path="m"), node("b", ("a",), "m"), node("c", ("b",), "m")
    long = [node(f"x{i}", ("c",), "m") for i in range(9)]
    before = (a, b, c, *long)
    after = (a, node("d", ("a",), "m", target="mul"), node("c", ("d",), "m"), *long)
    assert [(line.mark, line.text) for line in diff(before, after, "")] == [
        (" ", "a: f32[2, 3] = add()"),
        ("-", "b: f32[2, 3] = add(a)"),
        ("+", "d: f32[2, 3] = mul(a)"),
        ("~", "c: f32[2, 3] = add(d)"),
        (" ", "x0: f32[2, 3] = add(c)"),
        (" ", "x1: f32[2, 3] = add(c)"),
        (" ", "... 7 unchanged"),
    ]
    assert [line.mark for line in diff(before, before, "")] == [" "]


@settings(max_examples=60, deadline=None)
@given(graphs(), graphs())
def test_a_diff_accounts_for_every_node(before: Listing, after: Listing) -> None:
    lines = diff(before, after, "")
    unchanged = sum(int(found[1]) for line in lines if (found := re.fullmatch(r"\.\.\. (\d+) unchanged", line.text)))
    marks = [line.mark for line in lines if not re.fullmatch(r"\.\.\. \d+ unchanged", line.text)]
    shown = {mark: marks.count(mark) for mark in (" ", "-", "+", "~")}
    assert shown[" "] + shown["~"] + shown["-"] + unchanged == sum(r.op != "get_attr" for r in before)
    assert shown[" "] + shown["~"] + shown["+"] + unchanged == sum(r.op != "get_attr" for r in after)


def test_a_history_tells_of_each_pass(history: History) -> None:
    text = str(history)
    assert text.splitlines()[0] == f"captured: {len(history.before)} nodes"
    for step in history.steps:
        assert f"{step.name}: fired {len(step.fired)} times, {len(step.after)} nodes" in text
    assert "stayed out of" in text
    assert "model.layers.1.mlp.down_proj" in text  # the miss names the module, not the node
    assert re.search(r"  - \w+: f32\[1, 8, 64\] = Linear self_attn\.q_proj\(", text)
    assert re.search(r"  \+ \w+: f32\[1, 8, 64\] = fxquant\.linear\(\w+, self_attn\.o_proj, int8\)", text)
    assert "self_attn.q_proj" not in history.text("model.layers.1.mlp")


def test_a_history_without_a_graph_says_why() -> None:
    history = History(reason="it <cannot> be traced")
    assert str(history) == "no graph, so no history: it <cannot> be traced"
    assert history.to_html() == "<p>no graph, so no history: it &lt;cannot&gt; be traced</p>"


def test_the_page_holds_picture_passes_and_misses(history: History, tmp_path: Path) -> None:
    page = tmp_path / "history.html"
    history.save_html(page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert history.picture() in text
    assert text.count("<details>") == len(history.steps)
    assert text.count("text-decoration:line-through") == history.text().count("\n  - ")
    assert "stayed out of" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # it needs nothing else
    assert history._repr_html_() in text


def test_a_page_that_cannot_be_written_is_an_error(history: History, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"cannot write the history to .*: No such file or directory"):
        history.save_html(tmp_path / "missing" / "history.html")


def test_a_pass_that_changed_nothing_in_the_region_shows_no_diff() -> None:
    graph = llama_like(2)
    step = Step("Nothing()", (Fired(("a",), ()),), (), graph, 0.0)
    assert History(graph, (step,)).text().splitlines() == [
        f"captured: {len(graph)} nodes",
        "",
        f"Nothing(): fired 1 times, {len(graph)} nodes, 0.00 s",
    ]
    assert "changed nothing in model.layers.0" in History(graph, (step,)).to_html()


class Two(nn.Module):
    """No repeated blocks: the region is everything."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def test_a_model_without_blocks_is_shown_whole() -> None:
    model = Two()
    fxquant.quantize(model, "int8", example_inputs=(torch.zeros(2, 8),), progress=False)
    history = fxquant.history(model)
    found = to_boxes(history.after, "")
    assert [(box.kind, box.title) for box in found.boxes] == [
        ("quantized", "a"),
        ("op", "relu"),
        ("quantized", "b"),
        ("input", "x"),
        ("output", "output"),
    ]
    assert set(found.edges) == {(3, 0), (0, 1), (1, 2), (2, 4)}
    assert "captured" in history.picture()
