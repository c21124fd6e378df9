"""Which scheme each format gives a weight, what its config says, and what it has no place for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fxquant.checkpoint_contents import Contents, Matrix
from fxquant.errors import FileError
from fxquant.scheme import PlaneSpec, Scheme
from fxquant.writers import WRITERS


def matrices(schemes: Mapping[str, str], n: int = 64, k: int = 128) -> dict[str, Matrix]:
    return {name: Matrix(name, name, n, k, Scheme.parse(scheme)) for name, scheme in schemes.items()}


def contents(
    schemes: Mapping[str, str], modules: Mapping[str, nn.Module] | None = None, kind: str = "llama", **config: int
) -> Contents:
    model = nn.Module()
    for name, module in (modules or {}).items():
        model.add_module(name, module)
    return Contents(
        Path("source"), SimpleNamespace(model_type=kind, dtype=torch.float16, **config), model, matrices(schemes), {}
    )


@pytest.mark.parametrize(
    ("format", "scheme", "fitted", "reason"),
    [
        ("gptq", "int4-g64-fp16", "int4-g64-fp16", ""),
        ("gptq", "int4-g64", "int4-g64-fp16", "fp16 scales, not bf16"),
        ("gptq", "int8+int8", "int8-fp16", "no quantized inputs"),
        ("gptq", "q6_k", "int8-g16-fp16", "one level of scales"),
        ("gptq", "q4_k", "uint4-g32-fp16", "zero points within the range of the codes, not biases"),
        ("gptq", "nf4-dq", "uint4-g64-fp16", "integer codes of up to 8 bits, not nf4"),
        ("gptq", "fp8", "int8-fp16", "not fp8"),
        ("gptq", "fp8-b128x128", "int8-fp16", "not fp8"),
        ("gptq", "mxfp4", "uint4-g32-fp16", "not e2m1"),
        ("gptq", "bitnet", "ternary-tensor-fp16", "fp16 scales, not fp32"),
        ("gptq", "iq2_xxs", "uint4-g32-fp16", "integer codes"),
        ("gptq", "int4-row-colscale-fp16", "int4-row-fp16", "no columns that are scaled"),
        ("gptq", "uint3-g64-fzero-fp16", "uint3-g64-fp16", "zero points within the range of the codes, not floats"),
        ("awq", "int4-g64-fp16-perm", "int4-g64-fp16", "no columns that are permuted"),
        ("awq", "int8-g64-fp16", "int4-g64-fp16", "up to 4 bits"),
        ("awq", "nf4", "uint4-g64-fp16", "not nf4"),
        ("compressed-tensors", "nf4-dq", "uint4-g64", "not nf4"),
        ("compressed-tensors", "q4_0", "q4_0", ""),
        ("compressed-tensors", "q6_k", "int6-g16", "one level of scales"),
        ("compressed-tensors", "int4-perm", "int4-perm", ""),
        ("compressed-tensors", "int4-g32-perm", "int4-g32", "no columns that are permuted"),
        ("compressed-tensors", "int4-perm+int8", "int4-perm", "no columns that are permuted"),
        ("compressed-tensors", "nvfp4", "nvfp4", "reciprocal"),
        ("compressed-tensors", "nvfp4+fp8", "nvfp4", "no quantized inputs"),
        ("compressed-tensors", "llm-int8", "int8", "no outliers"),
        ("compressed-tensors", "fp8e5m2+fp8", "fp8+fp8", "not fp8e5m2"),
        ("compressed-tensors", "mxfp6e3m2", "mxfp6", "not e3m2"),
        ("compressed-tensors", "fp8-b64x64-e8m0", "fp8-b64x64-e8m0", ""),
        ("bitsandbytes", "nf4-dq", "nf4-dq", ""),
        ("bitsandbytes", "int4-g64", "nf4", "nf4 or fp4 codes"),
        ("bitsandbytes", "int4-g16", "nf4-flat32", "nf4 or fp4 codes"),
        ("bitsandbytes", "mxfp4", "nf4-flat32", "nf4 or fp4 codes"),
        ("bitsandbytes", "int4-row", "nf4", "nf4 or fp4 codes"),
        ("bitsandbytes", "int4-g128", "nf4-flat128", "nf4 or fp4 codes"),
        ("bitsandbytes", "iq2_xxs", "nf4-flat32", "nf4 or fp4 codes"),
        ("bitsandbytes", "fp8+fp8", "llm-int8", "inputs that are int8-outlier6, not fp8"),
        ("bitsandbytes", "int8-row", "llm-int8", "not as they are"),
        ("bitsandbytes", "llm-int8", "llm-int8", "times 127"),
        ("bitsandbytes", "int8-g64", "llm-int8", "one scale for each row"),
        ("gpt-oss", "nf4", None, "all else in full precision"),
    ],
)
def test_scheme_of_a_matrix(format: str, scheme: str, fitted: str | None, reason: str) -> None:
    k = 256 if "k" in scheme or scheme.startswith("iq") else 128
    (found,) = WRITERS[format].fit(matrices({"linear": scheme}, k=k)).values()
    assert found.scheme == (None if fitted is None else Scheme.parse(fitted))
    assert reason in found.reason
    assert bool(reason) == bool(found.reason)


@pytest.mark.parametrize(
    ("format", "n", "k", "reason"),
    [
        ("gptq", 48, 64, "N=48"),
        ("gptq", 64, 48, "K=48"),
        ("awq", 60, 64, "N=60"),
        ("awq", 64, 40, "K=40"),
    ],
)
def test_shapes_that_a_format_has_not_stay_in_full_precision(format: str, n: int, k: int, reason: str) -> None:
    given = matrices({"a": "uint4-g64-fp16"}) | {"b": replace(matrices({"b": "int4-row-fp16"}, n, k)["b"])}
    found = WRITERS[format].fit(given)
    assert found["a"].scheme == given["a"].scheme
    assert found["b"].scheme is None
    assert reason in found["b"].reason


def test_compressed_tensors_and_bitsandbytes_have_every_shape() -> None:
    for n, k in ((1, 1), (7, 33), (3, 100)):
        for format in ("compressed-tensors", "bitsandbytes"):
            for scheme in ("nf4", "int8-row", "fp8-b16x16", "ternary-tensor", "int3-row"):
                (found,) = WRITERS[format].fit(matrices({"a": scheme}, n, k)).values()
                assert found.scheme is not None
                assert found.scheme.misfit(n, k) is None


@pytest.mark.parametrize(
    ("schemes", "expected"),
    [
        (["int4-g32-fp16", "int4-g64-fp16"], ["int4-g32-fp16", "int4-g64-fp16"]),
        (["int4-g64-fp16", "int4-g64-fp16", "int4-g32"], ["int4-g64-fp16", "int4-g64-fp16", "int4-g32-fp16"]),
        (["int4-row-fp16", "int4-row-fp16"], ["int4-row-fp16", "int4-row-fp16"]),
        (["int4-row-fp16", "int4-g64-fp16"], ["int4-row-fp16", "int4-g64-fp16"]),
        (["nf4", "nf4"], ["uint4-g64-fp16", "uint4-g64-fp16"]),
        (["mxfp4", "nf4"], ["uint4-g32-fp16", "uint4-g32-fp16"]),
    ],
)
def test_awq_has_one_group_size(schemes: list[str], expected: list[str]) -> None:
    given = matrices({f"l{i}": scheme for i, scheme in enumerate(schemes)})
    found = WRITERS["awq"].fit(given)
    assert [str(fit.scheme) for fit in found.values()] == [str(Scheme.parse(name)) for name in expected]
    after = contents({name: str(fit.scheme) for name, fit in found.items()})
    config = WRITERS["awq"].config(after)
    units = list(WRITERS["awq"].units(after))
    size = config["group_size"] if config["group_size"] > 0 else 128
    assert {unit.tensors[f"l{i}.scales"].shape for i, unit in enumerate(units)} == {(128 // size, 64)}


def test_awq_leaves_the_head() -> None:
    found = WRITERS["awq"].fit(matrices({"a": "int4-g64-fp16", "lm_head": "int4-g128-fp16"}))
    assert found["a"].scheme == Scheme.parse("int4-g64-fp16")
    assert found["lm_head"].scheme is None


def test_bitsandbytes_has_4_bits_or_8() -> None:
    fit = WRITERS["bitsandbytes"].fit
    four = fit(matrices({"a": "nf4", "b": "int3-g32", "c": "int8-row"}))
    assert [each.scheme and str(each.scheme) for each in four.values()] == ["nf4", "nf4-flat32", None]
    assert "not int8" in four["c"].reason
    eight = fit(matrices({"a": "nf4", "b": "int8+int8-outlier4", "c": "q6_k"}, k=256))
    assert {str(each.scheme) for each in eight.values()} == {"int8+int8-outlier4"}


def test_config_of_gptq() -> None:
    schemes = {"q": "int4-g64-fp16", "k": "int4-g64-fp16", "v.1": "uint8-row-fp16", "lm_head": "int4-row-fp16-perm"}
    modules = {name: nn.Linear(2, 2) for name in ("q", "k", "gate")} | {"embed": nn.Embedding(4, 2)}
    config = WRITERS["gptq"].config(contents(schemes, modules))
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 64, True, True)
    assert config["lm_head"]
    assert config["checkpoint_format"] == "gptq_v2"
    assert config["dynamic"] == {
        r"+:^v\.1$": {"bits": 8, "group_size": -1, "sym": False},
        r"+:^lm_head$": {"group_size": -1},
        r"-:^gate$": {},
    }


def test_one_group_of_all_columns_is_a_row() -> None:
    schemes = {"a": "int4-g64-fp16", "b": "int4-g64-fp16", "c": "int4-row-fp16"}
    given = contents(schemes)
    given = replace(
        given, matrices=dict(given.matrices) | {"c": Matrix("c", "c", 64, 64, Scheme.parse("int4-row-fp16"))}
    )
    config = WRITERS["gptq"].config(given)
    assert config["group_size"] == 64
    assert "dynamic" not in config
    groups = WRITERS["compressed-tensors"].config(given)["config_groups"]
    assert list(groups) == ["group_0"]
    assert groups["group_0"]["targets"] == ["Linear"]
    assert groups["group_0"]["weights"]["group_size"] == 64


def test_config_of_compressed_tensors_names_the_modules_of_each_group() -> None:
    given = contents({"a.w1": "int4-g64", "b": "int8+int8", "c": "int4-g64"}, {"head": nn.Linear(2, 2)})
    renamed = Matrix("a.w1", "a.gate", 64, 128, Scheme.parse("int4-g64"))
    plain = {"router.weight": PlaneSpec((4, 8), torch.float32), "norm.weight": PlaneSpec((8,), torch.float32)}
    config = WRITERS["compressed-tensors"].config(
        replace(given, matrices=dict(given.matrices) | {"a.w1": renamed}, plain=plain)
    )
    assert config["format"] == "mixed-precision"
    assert [group["targets"] for group in config["config_groups"].values()] == [["a.w1", "a.gate", "c"], ["b"]]
    assert config["ignore"] == ["head", "router"]


def test_config_of_bitsandbytes() -> None:
    config = WRITERS["bitsandbytes"].config(
        contents({"a": "nf4-dq", "b": "nf4-dq", "c": "fp4"}, {"d": nn.Linear(2, 2)})
    )
    assert config["load_in_4bit"]
    assert not config["load_in_8bit"]
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == ("nf4", True)
    assert config["bnb_4bit_compute_dtype"] == "float16"
    assert config["llm_int8_skip_modules"] == ["d"]
    config = WRITERS["bitsandbytes"].config(contents({"a": "int8+int8-outlier4"}))
    assert config["load_in_8bit"]
    assert config["llm_int8_threshold"] == 4.0


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors", "bitsandbytes"])
def test_nothing_quantized_is_refused(format: str) -> None:
    with pytest.raises(FileError, match="holds no linear of it"):
        list(WRITERS[format].units(contents({})))
    with pytest.raises(FileError, match="holds no linear of it"):
        WRITERS[format].config(contents({}))


def test_what_transformers_would_leave_out_too_is_refused() -> None:
    for format, scheme in (("awq", "int4-g64-fp16"), ("bitsandbytes", "nf4")):
        given = contents({"block.proj": scheme}, {"proj": nn.Linear(2, 2)})
        with pytest.raises(FileError, match=r"proj is in full precision and block\.proj is quantized"):
            WRITERS[format].config(given)


def test_what_bitsandbytes_cannot_mix_is_refused() -> None:
    writer = WRITERS["bitsandbytes"]
    with pytest.raises(FileError, match="a is nf4, and b is llm-int8"):
        list(writer.units(contents({"a": "nf4", "b": "llm-int8"})))
    with pytest.raises(FileError, match="one threshold"):
        writer.config(contents({"a": "llm-int8", "b": "int8+int8-outlier4"}))


def experts(count: int, *left_out: str) -> dict[str, str]:
    names = [f"m.experts.{e}.{p}" for e in range(count) for p in ("gate_proj", "up_proj", "down_proj")]
    return {name: "mxfp4" for name in names if name not in left_out}


def test_gpt_oss_stacks_all_experts() -> None:
    writer = WRITERS["gpt-oss"]
    given = contents(experts(2), kind="gpt_oss", num_local_experts=2)
    shapes = {name: spec.shape for unit in writer.units(given) for name, spec in unit.tensors.items()}
    assert shapes == {
        "m.experts.gate_up_proj_blocks": (2, 128, 4, 16),
        "m.experts.gate_up_proj_scales": (2, 128, 4),
        "m.experts.down_proj_blocks": (2, 64, 4, 16),
        "m.experts.down_proj_scales": (2, 64, 4),
    }
    assert writer.config(given)["quant_method"] == "mxfp4"
    fits = writer.fit(matrices({"m.experts.0.up_proj": "nf4", "m.experts.1.up_proj": "mxfp4+fp8"}))
    assert {str(fit.scheme) for fit in fits.values()} == {"mxfp4"}


@pytest.mark.parametrize(
    ("schemes", "count", "message"),
    [
        (experts(2, "m.experts.1.up_proj"), 2, r"lacks m\.experts\.1\.up_proj"),
        (experts(3), 2, "has others"),
        (experts(2) | {"m.router": "mxfp4"}, 2, r"has m\.router in full precision"),
    ],
)
def test_stacks_that_are_not_whole_are_refused(schemes: Any, count: int, message: str) -> None:
    with pytest.raises(FileError, match=message):
        list(WRITERS["gpt-oss"].units(contents(schemes, kind="gpt_oss", num_local_experts=count)))
