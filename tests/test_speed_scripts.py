"""The parts of the benchmarks that decide what they print: cases, checks, ratios, exit codes. Nothing here is timed."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_rivals
import gpu_speed
import grid_speed
import linear_rivals
import pytest
import torch
from generate_models import CONFIGS, token_bytes
from linear_methods import Method, copies_of, op, planes_of, run_rounds, wrong
from linear_speed import ours
from rich.console import Console
from side_by_side import Reading, Timed, report
from torch import Tensor

from fxquant.scheme import Scheme


def test_the_grid_has_sixty_products_that_exist_and_spreads_them() -> None:
    found = list(grid_speed.cases(every=False))
    assert len(found) == len(set(found)) == 60
    assert set(Counter(m for _, m, _, _ in found).values()) == {12}
    assert set(Counter((n, k) for _, _, n, k in found).values()) == {12}
    assert set(Counter(scheme for scheme, *_ in found).values()) == {6}
    assert set(found) < set(grid_speed.cases(every=True))
    for scheme, _, n, k in found:
        assert Scheme.parse(scheme).misfit(n, k) is None


def test_a_slow_product_is_marked_unless_it_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ("int4-g128", 1, 512, 2048)
    assert grid_speed.note(case, 0.9) == ""
    assert grid_speed.note(case, 0.89) == "SLOW"
    monkeypatch.setitem(grid_speed.LISTED, case, "a reason")
    assert grid_speed.note(case, 0.89) == "a reason"
    assert grid_speed.note(case, 1.5) == "listed, but fast"


@pytest.mark.parametrize("spelling", ["int4", "int4-g128+int8", "q4_k", "fp8"])
def test_what_is_wrong_is_found(spelling: str) -> None:
    weight, x = torch.randn(48, 256).bfloat16(), torch.randn(5, 256).bfloat16()
    method = op(spelling, *planes_of(spelling, weight, 0.001))
    assert len(method.copies) == 2
    assert wrong([method], x) == []
    right = method.copies[0]
    one = torch.zeros(48).index_fill(0, torch.tensor(7), 1.5)  # a column that is off
    for broken in (lambda x: right(x) + one, lambda x: right(x) * 1.05, lambda x: right(x) * float("nan")):
        method.copies[0] = broken
        assert len(wrong([method], x)) == 1
    loose = Method("loose", True, [lambda x: right(x) * 1.05], method.weight, input=method.input, error=0.06)
    assert wrong([loose], x) == []
    loose.error = 0.04
    assert len(wrong([loose], x)) == 1


def test_rivals_that_run_are_right_and_others_say_why_not() -> None:
    def broken(weight: Tensor, megabytes: float) -> Method:
        raise RuntimeError("not on this machine\nat all")

    weight, x = torch.randn(64, 256).mul_(0.02).bfloat16(), torch.randn(20, 256).bfloat16()
    rivals = (*linear_rivals.WEIGHT_ONLY, linear_rivals.torchao_int8_int8, broken)
    with torch.inference_mode():
        methods, absent = linear_rivals.present(rivals, weight, 0.001)
        assert wrong(methods, x) == []
    assert len(methods) + len(absent) == len(rivals)
    assert absent[-1] == "broken: RuntimeError: not on this machine"
    assert {"oneDNN bf16", "F.linear fp32"} <= {m.name for m in methods}
    assert all(m.rival and m.nbytes > 0 for m in methods)


def test_every_way_is_there_on_request_and_none_but_the_op_for_codes() -> None:
    weight = torch.randn(256, 256).bfloat16()
    assert [m.name for m in ours("int4", weight, 0.001, every=False)] == ["int4"]
    assert {m.name for m in ours("int4", weight, 0.001, every=True)} >= {"int4", "int4, decoded first"}
    assert [m.name for m in ours("int4+int8", weight, 0.001, every=True)] == ["int4+int8"]


def test_rounds_time_everything_once_each_and_start_with_each_in_turn() -> None:
    order: list[str] = []
    methods = [
        Method(n, False, [lambda x, c=c: order.append(c) or x for c in n], torch.ones(1)) for n in ("aA", "bB", "cC")
    ]
    reading = Reading.of(1, 2)
    run_rounds(methods, torch.ones(1), 3, reading)
    assert "".join(order[:6]) == "aAbBcC", "every copy has been called"
    assert "".join(order[6:]) == "aAbBcCbBcCaAcCaAbB", "code is warm, weights are not"
    assert [len(timed.seconds) for timed in (*methods, reading)] == [3] * 4
    assert reading.nbytes == 1 << 20
    assert reading.rate > 0


def test_ratios_are_to_the_fastest_rival_of_a_round() -> None:
    methods = [
        Timed("ours", False, seconds=[1.0, 2.0, 1.0], nbytes=100),
        Timed("one", True, seconds=[2.0, 8.0, 9.0], nbytes=400),
        Timed("other", True, seconds=[4.0, 6.0, 3.0]),
    ]
    reading = Reading("read", False, seconds=[1.0, 1.0, 1.0], nbytes=200)
    text = io.StringIO()
    first, second, _ = report(methods, 7, "rows", Console(file=text, width=150), reading)
    assert first["ratio"] == 3.0
    assert first["ratios"] == {"one": 4.0, "other": 3.0}
    assert (first["bytes per second"], first["share of read"]) == (100.0, 0.5)
    assert second["ratio"] == pytest.approx(0.75)
    assert "50 %" in text.getvalue()
    assert "of read" not in _printed(methods)


def _printed(methods: list[Timed]) -> str:
    text = io.StringIO()
    report(methods, 7, "rows", Console(file=text, width=150))
    return text.getvalue()


def test_copies_fill_the_megabytes() -> None:
    assert copies_of(10_000_000, 128) == 13
    assert copies_of(10**9, 128) == 2


def test_the_bytes_of_a_token_are_those_of_what_is_stored() -> None:
    shapes = [(512, 256), (256, 1024)]
    weights = sum(n * k for n, k in shapes)
    assert token_bytes(shapes, "bf16 frozen") == 2 * weights
    assert token_bytes(shapes, "fxquant int4-g128 merged") == weights // 2 + 2 * weights // 128
    assert token_bytes(shapes, "torchao") == weights // 2 + 4 * weights // 128
    assert token_bytes(shapes, "bitsandbytes") == weights // 2 + 4 * weights // 64


@pytest.mark.parametrize(("name", "parameters"), [("llama-3.2-1b", 1235814400), ("qwen3-0.6b", 596049920)])
def test_models_have_the_size_of_the_real_ones(name: str, parameters: int) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(CONFIGS[name]())
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from speed_plot import plot

    lines = [
        {"rows": rows, "kind": kind, "method": name, "rival": name != "int4", "ratios": {"bf16": rows / 2}}
        for kind in ("weights alone", "activations")
        for rows in (1, 4)
        for name in ("int4", "ATen int4", "bf16")
    ]
    lines += [{**lines[0], "rows": 16}]  # the others are not for so many rows
    plot(lines, "title", "bf16", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_script_for_gpus_measures_what_is_right_and_names_what_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that is none, with rivals that need no GPU."""
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: args[0] if args else lambda function: function)

    def clock(work: Callable[[], object]) -> Callable[[], float]:
        work()
        return lambda: 0.5

    given = ["--shape", "64", "256", "--rows", "1", "20", "--rounds", "2", "--megabytes", "0.05"]
    options = gpu_speed.arguments([*given, "--schemes", "int4", "q4_k", "int8+int8"])
    text = io.StringIO()
    with torch.inference_mode():
        lines = gpu_speed.measure(options, Console(file=text, width=200), torch.device("cpu"), clock)
    methods = {(line["kind"], line["rows"], line["method"]) for line in lines}
    assert {("weights alone", m, s) for m in (1, 20) for s in ("int4", "q4_k", "bf16", "Inductor int4")} <= methods
    assert ("activations in 8 bits too", 1, "Inductor int8+int8") not in methods
    assert ("activations in 8 bits too", 20, "Inductor int8+int8") in methods
    assert all(line["ratio"] > 0 and len(line["seconds"]) == 2 for line in lines)
    assert "absent: tinygemm: " in text.getvalue()


def test_a_wrong_method_on_a_gpu_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weight: Tensor, megabytes: float) -> Method:
        return Method("broken", True, [lambda x: 1.1 * (x @ weight.T)] * 2, weight.float(), nbytes=1)

    monkeypatch.setattr(gpu_rivals, "KINDS", {"weights alone": (broken,)})
    options = gpu_speed.arguments(["--shape", "32", "64", "--rows", "2", "--schemes", "int4-g32"])
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: args[0] if args else lambda function: function)
    with pytest.raises(SystemExit, match="broken, 2 rows"):
        gpu_speed.measure(options, Console(file=io.StringIO()), torch.device("cpu"), lambda work: lambda: 1.0)
