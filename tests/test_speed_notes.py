"""What reports and plans say about speed, against bytes that are counted and times that are compared."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import sympy
from torch import Tensor, nn

import fxquant
from fxquant import Rule, Scheme
from fxquant.cost import K, M, N, Way, cost
from fxquant.devices import DEVICES, Device
from fxquant.modules import QLinear
from fxquant.pretrained import load_model
from fxquant.speed_notes import Multiplied, speed_notes
from fxquant.tables import bytes_text

DATA = Path(__file__).parent / "data"
WAYS: tuple[Way, Way] = ("full", "packed")
RULES = [Rule("*.down_proj", None), Rule("lm_head", "int8"), Rule("*", "int4-g64")]


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def numbers(text: str) -> list[str]:
    return re.findall(r"[\d.]+(?: [kM]?B)?", text)


def test_a_token_reads_the_tensors_of_all_linears() -> None:
    model = load_model(DATA / "code-dense", progress=False)
    before = nbytes(*(m.weight for m in model.modules() if isinstance(m, nn.Linear)))
    planned = fxquant.plan(model, RULES).table().notes
    fxquant.quantize(model, RULES, progress=False)
    after = sum(nbytes(*m.buffers()) if isinstance(m, QLinear) else nbytes(m.weight) for m in linears(model))
    wanted = [bytes_text(before), bytes_text(after), f"{before / after:.2f}"]
    reported = fxquant.report(model).table().notes
    for notes in (planned, reported):
        (note,) = (note for note in notes if "a token reads" in note)
        assert numbers(note) == wanted
        assert sum("bfloat16 would be as fast" in note for note in notes) == 1
        assert not any("expert" in note for note in notes[2:])


def linears(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.Linear, QLinear))]


def test_experts_are_not_counted_in_what_every_token_reads() -> None:
    model = load_model(DATA / "code-moe", progress=False)
    outside = copy.deepcopy(model)
    rules = [Rule("*.experts.1.down_proj", None), Rule("*.experts.*", "int4-g64"), Rule("*", None)]
    fxquant.quantize(model, rules, progress=False)
    found = fxquant.report(model)
    notes = [note for note in found.table().notes if "at most" in note]
    (note,) = notes  # what every token reads is as it was
    experts = [x for x in found.layers if x.kind == "expert"]
    kept = [x for x in found.kept if x.kind == "expert"]
    assert {x.kind for x in found.kept} == {"linear", "expert", "bare"}
    count, full = len(experts) + len(kept), sum(x.nbytes for x in kept)
    before = (sum(x.bytes_before for x in experts) + full) / count
    after = (sum(x.bytes_after for x in experts) + full) / count
    assert numbers(note) == [bytes_text(before), bytes_text(after), f"{before / after:.2f}"]
    planned = fxquant.plan(outside, rules).table().notes
    assert note in planned


@pytest.mark.parametrize("spelling", ["int4", "int8+int8", "nf4", "q4_k"])
def test_rows_are_those_from_which_bfloat16_takes_no_longer(spelling: str) -> None:
    scheme, shapes = Scheme.parse(spelling), [(4096, 4096), (1024, 4096), (4096, 11008)]
    *_, note = speed_notes([Multiplied(n, k, 2 * n * k, scheme) for n, k in shapes])
    ends: list[str] = []
    for device in DEVICES.values():
        firsts = {first_row(scheme, device, n, k) for n, k in shapes}
        rows = sorted(row for row in firsts if row)
        words = [str(rows[0]) if len(rows) == 1 else f"{rows[0]} to {rows[-1]}"] if rows else []
        ends.append(" or ".join(words + ["never"] * (0 in firsts)) + f" on an {device.name}")
    assert note == f"rows from which bfloat16 would be as fast, by rates alone: {', '.join(ends)}"


def first_row(scheme: Scheme, device: Device, n: int, k: int) -> int:
    """By bisection; 0 where there is none."""
    full, packed = (sympy.lambdify(M, cost(scheme, way, device).seconds.subs({N: n, K: k})) for way in WAYS)
    low, high = 0, 1 << 20
    if full(high) > packed(high) * (1 + 1e-12):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if full(middle) <= packed(middle) * (1 + 1e-12) else (middle, high)
    return high


def test_nothing_is_said_of_nothing() -> None:
    assert list(speed_notes([])) == []
    assert list(speed_notes([Multiplied(4, 4, 32, None), Multiplied(4, 4, 32, None, expert=True)])) == []
    assert list(speed_notes([Multiplied(0, 4, 0, Scheme.parse("int8-row"))])) == []
