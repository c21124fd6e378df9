"""The report against sizes and errors computed apart from it."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import Rule, Scheme
from fxquant.errors import ModelError
from fxquant.install import forget
from fxquant.model_report import report
from fxquant.modules import QLinear
from fxquant.pretrained import load_model
from fxquant.reports import Report, sqnr_db

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import tiny_model

ROW = r" model\.layers\S*( \(\d+x\))? +\d+x\d+ "  # a line of the table; notes may begin with a name too
DATA = Path(__file__).parent / "data"
RULES = [Rule("model.layers.{0,1}.*", "int4-g64"), Rule("*.down_proj", None), Rule("*", "nf4-dq")]


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return load_model(DATA / "code-dense", progress=False)


@pytest.fixture(scope="module")
def quantized(original: nn.Module) -> nn.Module:
    return fxquant.quantize(copy.deepcopy(original), RULES, progress=False)


@pytest.fixture(scope="module")
def found(quantized: nn.Module) -> Report:
    return report(quantized)


def relative_error(weight: Tensor, stored: Tensor) -> float:
    weight = weight.detach().double()
    return float((weight - stored.double()).square().sum() / weight.square().sum())


def test_every_quantized_linear_is_there_with_its_sizes(found: Report, original: nn.Module) -> None:
    linears = {name: m for name, m in original.named_modules() if isinstance(m, nn.Linear)}
    wanted = [name for name in linears if name != "lm_head" and not re.search(r"layers\.[23]\.mlp\.down_proj", name)]
    assert [layer.name for layer in found.layers] == wanted
    for layer in found.layers:
        scheme = Scheme.parse("int4-g64" if re.search(r"layers\.[01]\.", layer.name) else "nf4-dq")
        assert (layer.n, layer.k) == tuple(linears[layer.name].weight.shape)
        assert layer.scheme == str(scheme)
        assert layer.bytes_before == 2 * layer.n * layer.k
        assert layer.bytes_after == scheme.nbytes(layer.n, layer.k)
        assert layer.bits == pytest.approx(scheme.bits_per_weight(layer.n, layer.k))


def test_errors_are_those_of_the_stored_weights(found: Report, original: nn.Module, quantized: nn.Module) -> None:
    for layer in found.layers:
        stored = quantized.get_submodule(layer.name)
        assert isinstance(stored, QLinear)
        exact = copy.copy(stored)
        exact.dtype = torch.float32  # .weight without the rounding to bfloat16
        wanted = relative_error(original.get_submodule(layer.name).weight, exact.weight)
        assert layer.error == pytest.approx(wanted, rel=1e-4)
        assert layer.sqnr_db == pytest.approx(-10 * math.log10(wanted), abs=1e-3)
    errors = sorted((layer.error or 0.0 for layer in found.layers), reverse=True)
    assert [layer.error for layer in found.worst(5)] == errors[:5]


def test_totals_are_sums(found: Report, original: nn.Module, quantized: nn.Module) -> None:
    weights = sum(layer.n * layer.k for layer in found.layers)
    linears = sum(m.weight.numel() for m in original.modules() if isinstance(m, nn.Linear))
    everything = sum(p.numel() for p in original.parameters())
    assert found.weights == weights
    assert found.parameters == everything
    assert found.coverage == pytest.approx(weights / linears)
    assert found.bits_per_weight == pytest.approx(8 * sum(layer.bytes_after for layer in found.layers) / weights)
    assert found.ratio == pytest.approx(2 * weights / sum(layer.bytes_after for layer in found.layers))

    def nbytes(model: nn.Module) -> int:
        return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))

    assert found.model_bytes_before == nbytes(original)
    assert found.model_bytes_after == nbytes(quantized)


def test_what_stays_is_there_with_the_reason_of_the_plan(found: Report, quantized: nn.Module) -> None:
    kept = {k.name: k for k in found.kept}
    assert set(kept) == {"model.layers.2.mlp.down_proj", "model.layers.3.mlp.down_proj", "lm_head"}
    assert kept["lm_head"].weights == 2048 * 256
    assert kept["lm_head"].nbytes == 2 * 2048 * 256
    assert "output embeddings" in kept["lm_head"].reason
    reasons = {e.name: e.reason for e in fxquant.plan(tiny_copy(quantized), RULES).kept}
    assert {name: k.reason for name, k in kept.items()} == reasons


def tiny_copy(quantized: nn.Module) -> nn.Module:
    return fxquant.dequantize(copy.deepcopy(quantized))


def test_the_table_can_be_read_back(found: Report) -> None:
    text = str(found.table(full=True))
    rows = [line.split() for line in text.splitlines() if re.match(ROW, line)]
    assert len(rows) == len(found.layers)
    for row, layer in zip(rows, found.layers, strict=True):
        assert row[:3] == [layer.name, f"{layer.n}x{layer.k}", layer.scheme]
        assert float(row[3]) == pytest.approx(layer.bits, abs=1e-3)
        assert read_bytes(row[4], row[5]) == pytest.approx(layer.bytes_before, rel=6e-3)
        assert read_bytes(row[6], row[7]) == pytest.approx(layer.bytes_after, rel=6e-3)
        assert float(row[8]) == pytest.approx(layer.error, rel=6e-3)
        assert float(row[9]) == pytest.approx(layer.sqnr_db, abs=0.051)


def read_bytes(number: str, unit: str) -> float:
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6}[unit]


def test_layers_of_a_kind_share_a_row(found: Report) -> None:
    rows = [line.strip() for line in str(found).splitlines() if re.match(ROW, line)]
    assert len(rows) == 13
    assert rows[0].startswith("model.layers.{0..1}.self_attn.q_proj (2x)")
    pair = [x for x in found.layers if re.fullmatch(r"model\.layers\.[01]\.self_attn\.q_proj", x.name)]
    mean = sum(x.error or 0.0 for x in pair) / 2
    assert f"{mean:.2e}" in rows[0]
    assert f"{sqnr_db(mean):.1f} dB" in rows[0]


def test_the_notes_say_it_in_words(found: Report) -> None:
    notes = found.table().notes
    assert f"{len(found.layers)} linears quantized: {100 * found.coverage:.1f} %" in notes[0]
    assert f"{found.ratio:.2f} times smaller" in notes[1]
    assert found.worst(1)[0].name in notes[5]
    assert sum("in full precision" in note for note in notes) == len({k.reason for k in found.kept})
    assert "lm_head" in notes[-1] + notes[-2]
    html = found._repr_html_()
    assert all(f"<td style='text-align:left'>{scheme}</td>" in html for scheme in ("int4-g64", "nf4-dq"))


def test_it_is_json(found: Report) -> None:
    data = json.loads(json.dumps(found.to_dict()))
    assert data["ratio"] == pytest.approx(found.ratio)
    assert [layer["name"] for layer in data["layers"]] == [layer.name for layer in found.layers]
    assert [layer["sqnr_db"] for layer in data["layers"]] == pytest.approx([layer.sqnr_db for layer in found.layers])
    assert {k["name"]: k["reason"] for k in data["kept"]} == {k.name: k.reason for k in found.kept}
    assert data["model_bytes_before"] - data["model_bytes_after"] == data["bytes_before"] - data["bytes_after"]


def test_a_copy_reports_the_same(found: Report, quantized: nn.Module) -> None:
    assert report(copy.deepcopy(quantized)) == found


def test_a_part_reports_its_own_linears_without_errors(quantized: nn.Module) -> None:
    part = report(quantized.get_submodule("model.layers.2"))
    assert [x.name for x in part.layers][:2] == ["self_attn.q_proj", "self_attn.k_proj"]
    assert {x.error for x in part.layers} == {None}
    assert {x.sqnr_db for x in part.layers} == {None}
    assert part.worst() == []
    assert [(k.name, k.reason) for k in part.kept] == [("mlp.down_proj", "not quantized")]
    assert "errors are not known" in str(part)


def test_a_model_without_its_record_still_reports_sizes(found: Report, quantized: nn.Module) -> None:
    bare = copy.deepcopy(quantized)
    forget(bare)
    again = report(bare)
    assert again.bytes_after == found.bytes_after
    assert again.coverage == found.coverage
    assert [(x.name, x.bytes_after) for x in again.layers] == [(x.name, x.bytes_after) for x in found.layers]


def test_a_linear_is_a_model_too() -> None:
    linear = QLinear(64, 32, Scheme.parse("int8"))
    found = report(linear)
    assert [(x.name, x.n, x.k) for x in found.layers] == [("", 32, 64)]
    assert found.coverage == 1.0


def test_zero_error_is_infinite_in_decibels() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    nn.init.zeros_(model[0].weight)
    with torch.no_grad():
        model[0].weight[:, 0] = 127 / 128
    fxquant.quantize(model, "int8", example_inputs=(torch.zeros(1, 4),), progress=False)
    layer = report(model).layers[0]
    assert layer.error == 0
    assert layer.sqnr_db == math.inf
    assert report(model).to_dict()["layers"][0]["sqnr_db"] is None
    assert "inf dB" in str(report(model))


def test_conv1d_and_tied_embeddings() -> None:
    model = tiny_model("gpt2")
    before = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    shapes = {name: m.weight.shape for name, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    fxquant.quantize(model, [("*", "int8")], progress=False)
    found = report(model)
    assert {x.name: (x.k, x.n) for x in found.layers} == {name: tuple(shape) for name, shape in shapes.items()}
    assert found.model_bytes_before == before
    assert [k.name for k in found.kept] == ["lm_head"]
    assert found.parameters == sum(p.numel() for p in tiny_model("gpt2").parameters())  # the tied weight counts once


def test_experts_are_reported_matrix_by_matrix_and_routers_stay() -> None:
    model = tiny_model("mixtral")
    recipe = [("*.layers.0.*.experts.{0,1}.*", "int4-g32"), ("*.layers.0.*.experts", None), ("*", "int8")]
    fxquant.quantize(model, recipe, progress=False)
    found = report(model)
    experts = {x.name: x for x in found.layers if x.kind == "expert"}
    assert len(experts) == 2 * 3 + 4 * 3
    for name, one in experts.items():
        container, e, projection = name.rsplit(".", 2)
        planes = model.get_submodule(container).planes_of(projection, int(e))
        assert one.bytes_after == sum(p.numel() * p.element_size() for p in planes.values())
        assert one.scheme == ("int4-g32" if ".layers.0." in name else "int8")
        assert one.error is not None
        assert 0 < one.error < 0.02
    kept = {k.name: k for k in found.kept if ".experts." in k.name}
    assert set(kept) == {f"model.layers.0.mlp.experts.{e}.{p}_proj" for e in (2, 3) for p in ("gate", "up", "down")}
    assert {k.reason for k in kept.values()} == {"the rule keeps it"}
    assert len([k for k in found.kept if k.name.endswith("gate.weight")]) == 2
    total = found.weights + sum(k.weights for k in found.kept)
    assert found.coverage == pytest.approx(found.weights / total)
    original = sum(t.numel() * t.element_size() for t in tiny_model("mixtral").state_dict().values())
    assert found.model_bytes_before == pytest.approx(original, rel=1e-3)
    assert "8 linears and 18 matrices of experts quantized" in str(found)


def test_stacks_of_which_nothing_is_quantized_are_kept_as_a_whole() -> None:
    model = tiny_model("mixtral")
    fxquant.quantize(model, [("*.experts.*", None), ("*", "int8")], progress=False)
    found = report(model)
    stacked = {k.name: k for k in found.kept if k.name.endswith(("gate_up_proj", "down_proj"))}
    assert len(stacked) == 4
    for name, kept in stacked.items():
        assert kept.weights == model.get_parameter(name).numel()
        assert kept.reason == "the rule keeps it"


def test_weights_without_values_have_no_error() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    fxquant.quantize(model, "int8", example_inputs=(torch.zeros(1, 64, device="meta"),), progress=False)
    found = report(model)
    assert [x.error for x in found.layers] == [None, None]
    assert found.bytes_before == 4 * (64 * 32 + 32 * 16)
    assert "errors are not known" in str(found)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(4, 4), "nothing in this Linear is quantized by fxquant"),
        (nn.Sequential(), "nothing in this Sequential is quantized"),
        ("gpt2", "a model is needed, a torch.nn.Module; got str"),
        (None, "got NoneType"),
    ],
)
def test_nothing_to_report_is_an_error(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        report(model)
