"""What configs say about single modules reaches the module, in each format; stacks of experts come apart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_directories import read, write_checkpoint
from torch import Tensor

from fxquant import checkpoints
from fxquant.checkpoints import Planes
from fxquant.codecs import dequantize
from fxquant.errors import CheckpointError
from fxquant.families import find_weights
from fxquant.scheme import Activation

N, K = 32, 64
Tensors = dict[str, Tensor]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def integers(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max, shape, generator=generator, dtype=torch.int64).to(dtype)


def floats(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.rand(shape, generator=generator) + 0.5).to(dtype)


def under(module: str, tensors: Tensors) -> Tensors:
    return {f"{module}.{name}": tensor for name, tensor in tensors.items()}


def planes_in(
    folder: Path, tensors: Tensors, settings: object, n: int = N, k: int = K, **more: Any
) -> dict[str, Planes]:
    files = write_checkpoint(folder, tensors, settings, **more)
    return {weight.name: read(files, weight, n, k) for weight in find_weights(files)[1]}


def assert_same(found: Planes, expected: Planes) -> None:
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(plane, expected[1][name]) for name, plane in found[1].items())


def refused(folder: Path, tensors: Tensors, settings: object, message: str, **more: Any) -> None:
    files = write_checkpoint(folder, tensors, settings, **more)
    with pytest.raises(CheckpointError, match=message):
        find_weights(files)


def gptq(generator: torch.Generator, bits: int = 4, group: int = 32) -> Tensors:
    return {
        "qweight": integers(generator, torch.int32, K * bits // 32, N),
        "qzeros": integers(generator, torch.int32, K // group, N * bits // 32),
        "scales": floats(generator, torch.float16, K // group, N),
    }


def test_gptq_dynamic(tmp_path: Path, generator: torch.Generator) -> None:
    plain, other = gptq(generator), gptq(generator, 8, 16)
    dynamic = {r"+:.*\.up": {"bits": 8, "group_size": 16}, r".*\.u": {"bits": 2}, r"-:.*\.down": {}}
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": dynamic}
    tensors = under("m.gate", plain) | under("m.up", other)
    found = planes_in(tmp_path, tensors, settings)
    assert_same(found["m.gate"], checkpoints.planes_of_gptq(plain, N, K, bits=4, group_size=32))
    assert_same(found["m.up"], checkpoints.planes_of_gptq(other, N, K, bits=8, group_size=16))
    refused(tmp_path, tensors | under("m.down", plain), settings, "leaves out '-:.*down'")


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_gptqmodel_has_some_widths_in_planes_of_bits(bits: int, tmp_path: Path, generator: torch.Generator) -> None:
    tensors = gptq(generator, bits)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32, "format": "gptq", "meta": {}}
    for quantizer in ("gptqmodel:7.6.0", ["gptqmodel:7.6.0"], ["optimum:1.0"]):
        settings["meta"] = {"quantizer": quantizer}
        planar = bits > 3 and quantizer != ["optimum:1.0"]
        layout = "gptq_p" if planar else "gptq"
        expected = checkpoints.planes_of_gptq(tensors, N, K, bits=bits, group_size=32, checkpoint_format=layout)
        assert_same(planes_in(tmp_path, under("m", tensors), settings)["m"], expected)


def test_old_files_have_their_settings_beside_them(tmp_path: Path, generator: torch.Generator) -> None:
    tensors, settings = gptq(generator), {"bits": 4, "group_size": 32}
    found = planes_in(tmp_path, under("m", tensors), None, files={"quantize_config.json": settings})
    assert_same(found["m"], checkpoints.planes_of_gptq(tensors, N, K, bits=4, group_size=32))
    both = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    beside = {"quantize_config.json": settings}
    refused(tmp_path, under("m", tensors), both, "group_size is 64, and 32 in quantize_config.json", files=beside)


def test_marlin_is_refused(tmp_path: Path, generator: torch.Generator) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    for key, value in {"checkpoint_format": "marlin", "is_marlin_format": True, "pack_dtype": "int16"}.items():
        refused(tmp_path, under("m", gptq(generator)), settings | {key: value}, key)


def test_settings_of_a_part_of_the_model(tmp_path: Path, generator: torch.Generator) -> None:
    tensors, settings = gptq(generator), {"quant_method": "gptq", "bits": 4, "group_size": 32}
    found = planes_in(tmp_path, under("m", tensors), None, text_config={"quantization_config": settings})
    assert_same(found["m"], checkpoints.planes_of_gptq(tensors, N, K, bits=4, group_size=32))


PACKINGS = {"auto_round": "gptq_v2", "auto_round:auto_gptq": "gptq", "auto_round:gptq": "gptq", None: "gptq"}


@pytest.mark.parametrize(("packing", "layout"), PACKINGS.items())
def test_auto_round_packings(packing: str | None, layout: str, tmp_path: Path, generator: torch.Generator) -> None:
    tensors = gptq(generator)
    settings = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": packing}
    expected = checkpoints.planes_of_gptq(tensors, N, K, bits=4, group_size=32, checkpoint_format=layout)
    assert_same(planes_in(tmp_path, under("m", tensors), settings)["m"], expected)


def test_auto_round_layers(tmp_path: Path, generator: torch.Generator) -> None:
    plain, other = gptq(generator), gptq(generator, 8, 16)
    eight = {"bits": 8, "group_size": 16}
    # The name of a module in full precision is no pattern, though it would be found in that of another.
    extra = {"a.up": eight, r".*\.0\.o$": eight, "a.gate": {"bits": 16}}
    settings = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "extra_config": extra}
    tensors = under("a.gate_proj", plain) | under("a.up", other) | under("a.0.o", other)
    found = planes_in(tmp_path, tensors | {"a.gate.weight": torch.zeros(4, 4)}, settings)
    four = checkpoints.planes_of_gptq(plain, N, K, bits=4, group_size=32)
    assert_same(found["a.gate_proj"], four)
    for name in ("a.up", "a.0.o"):
        assert_same(found[name], checkpoints.planes_of_gptq(other, N, K, bits=8, group_size=16))
    refused(tmp_path, under("a.gate", plain), settings, "it leaves a.gate in 16 bits")


@pytest.mark.parametrize("packing", ["auto_round:llm_compressor", "auto_round:mxfp4"])
def test_auto_round_of_small_floats(packing: str, tmp_path: Path, generator: torch.Generator) -> None:
    tensors = {
        "weight_packed": integers(generator, torch.uint8, N, K // 2),
        "weight_scale": integers(generator, torch.uint8, N, K // 32),
    }
    settings = {"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp", "packing_format": packing}
    expected = checkpoints.planes_of_compressed_tensors(tensors, N, K, format="mxfp4-pack-quantized")
    assert_same(planes_in(tmp_path, under("m", tensors), settings)["m"], expected)


def awq(generator: torch.Generator, version: str) -> Tensors:
    words, halves, group = torch.int32, torch.float16, 32
    width = math.ceil(math.ceil(K // group / 8) / 4) * 4
    if version == "gemm":
        shapes: dict[str, tuple[torch.dtype, int, int]] = {
            "qweight": (words, K, N // 8),
            "qzeros": (words, K // group, N // 8),
            "scales": (halves, K // group, N),
        }
    elif version == "gemv":
        shapes = {"qweight": (words, N, K // 8), "qzeros": (words, N, width), "scales": (halves, N, 8 * width)}
    else:
        zeros = "qzeros" if version == "gemv_fast" else "scaled_zeros"
        shapes = {"qweight": (torch.int16, N // 4, K)}
        shapes |= {zeros: (halves, 8 * width, N), "scales": (halves, 8 * width, N)}
    return {
        name: (floats if dtype == halves else integers)(generator, dtype, *shape)
        for name, (dtype, *shape) in shapes.items()
    }


@pytest.mark.parametrize("version", ["gemm", "GEMM", "gemv", "gemv_fast", "llm-awq"])
def test_awq(version: str, tmp_path: Path, generator: torch.Generator) -> None:
    tensors = awq(generator, version.lower())
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": version}
    expected = checkpoints.planes_of_awq(tensors, N, K, group_size=32, version=version.lower())
    assert_same(planes_in(tmp_path, under("a.b", tensors), settings)["a.b"], expected)
    old = {"quant_config.json": {"w_bit": 4, "q_group_size": 32, "version": version}}
    assert_same(planes_in(tmp_path / "old", under("a.b", tensors), None, files=old)["a.b"], expected)
    for left_out in ("a", "b", "a.b", "a.*"):
        refused(tmp_path, under("a.b", tensors), settings | {"modules_to_not_convert": [left_out]}, "leaves out")
    assert planes_in(tmp_path, under("a.b", tensors), settings | {"modules_to_not_convert": ["c", "a.c"]})
    scaled = under("a.b", tensors) | {"a.act.scales": torch.ones(K)}
    refused(tmp_path, scaled, settings, "divides the output of an activation function")


def test_bitsandbytes_contradictions(tmp_path: Path, generator: torch.Generator) -> None:
    eight = under("m", {"weight": integers(generator, torch.int8, N, K), "SCB": floats(generator, torch.float32, N)})
    found = planes_in(tmp_path, eight, {"load_in_8bit": True, "llm_int8_threshold": 4.5})
    assert found["m"][0].activation == Activation("int8", threshold=4.5)
    refused(tmp_path, eight, {"load_in_4bit": True}, "m has 8 bits")
    refused(tmp_path, eight, {"load_in_4bit": True, "load_in_8bit": True}, "both true")
    refused(tmp_path, eight, {"quant_method": "bitsandbytes"}, "both false")
    refused(tmp_path, eight, {"load_in_8bit": True, "llm_int8_skip_modules": ["m"]}, "leaves out 'm'")
    refused(tmp_path, eight, {"load_in_8bit": True, "llm_int8_threshold": float("nan")}, "llm_int8_threshold")


def fp8(generator: torch.Generator, *shape: int) -> Tensor:
    return floats(generator, torch.float32, *shape).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
def test_fp8_names(name: str, tmp_path: Path, generator: torch.Generator) -> None:
    tensors = {"weight": fp8(generator, N, K), name: floats(generator, torch.float32, 1)}
    found = planes_in(tmp_path, under("m", tensors), {"quant_method": "fp8", "weight_block_size": None})
    expected = checkpoints.planes_of_fp8(tensors, N, K, activation=Activation("fp8"))
    assert_same(found["m"], expected)
    static = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    refused(tmp_path, under("m", tensors), static, "lacks activation_scale")
    for key in ("activation_scale", "input_scale", "qscale_act"):
        found = planes_in(tmp_path, under("m", tensors | {key: torch.tensor(0.5)}), static)
        assert found["m"][0].activation == Activation("fp8", static=True)
        assert torch.equal(found["m"][1]["input_scale"], torch.tensor([0.5]))


def test_fp8_blocks_are_what_the_config_says(tmp_path: Path, generator: torch.Generator) -> None:
    """[100, 300] in blocks of 128 has as many scales as in blocks of 100."""
    n, k = 100, 300
    tensors = {"weight": fp8(generator, n, k), "weight_scale_inv": floats(generator, torch.float32, 1, 3)}
    for size in (None, [128, 128]):
        settings = {"quant_method": "fp8"} | ({} if size is None else {"weight_block_size": size})
        scheme, planes = planes_in(tmp_path, under("m", tensors), settings, n, k)["m"]
        scale = tensors["weight_scale_inv"].repeat_interleave(128, 1)[:, :k]
        assert torch.equal(dequantize(planes, scheme, n, k), tensors["weight"].float() * scale)
        assert scheme.activation is None  # 300 features are no whole groups of 128


def test_mxfp8(tmp_path: Path, generator: torch.Generator) -> None:
    tensors = {"weight": fp8(generator, N, K), "weight_scale_inv": integers(generator, torch.uint8, N, K // 32)}
    expected = checkpoints.planes_of_fp8(tensors, N, K, weight_block_size=(1, 32))
    assert_same(planes_in(tmp_path, under("m", tensors), {"quant_method": "mxfp8"})["m"], expected)


def fused(n: int, rows: int, form: str) -> list[Callable[[int], int]]:
    """Of gate and up, which scale each row has."""
    if form == "one grid":
        return [lambda row: row // rows, lambda row: (n + row) // rows]
    each = math.ceil(n / rows)
    return [lambda row: row // rows, lambda row: each + row // rows]


@pytest.mark.parametrize(("n", "form"), [(128, "one grid"), (192, "one grid"), (192, "two grids"), (64, "one grid")])
def test_fp8_experts(n: int, form: str, tmp_path: Path, generator: torch.Generator) -> None:
    experts, k, rows = 2, 160, 128
    which = fused(n, rows, form)
    count = max(which[1](n - 1), which[0](n - 1)) + 1
    weight, scale = fp8(generator, experts, 2 * n, k), floats(generator, torch.float32, experts, count, 2)
    tensors = {"e.experts.gate_up_proj": weight, "e.experts.gate_up_proj_scale_inv": scale}
    files = write_checkpoint(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    weights = {found.name: found for found in find_weights(files)[1]}
    assert len(weights) == 2 * experts
    for expert in range(experts):
        for half, name in enumerate(("gate_proj", "up_proj")):
            scheme, planes = read(files, weights[f"e.experts.{expert}.{name}"], n, k)
            at = torch.tensor([which[half](row) for row in range(n)])
            spread = scale[expert][at].repeat_interleave(128, 1)[:, :k]
            expected = weight[expert, half * n : (half + 1) * n].float() * spread
            assert torch.equal(dequantize(planes, scheme, n, k), expected)


def test_fp8_experts_whose_blocks_cannot_be_told(tmp_path: Path, generator: torch.Generator) -> None:
    tensors = {
        "experts.gate_up_proj": fp8(generator, 1, 200, 128),
        "experts.gate_up_proj_scale_inv": torch.ones(1, 2, 1),
    }
    files = write_checkpoint(tmp_path, under("m", tensors), {"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(CheckpointError, match="of one grid or of two"):
        read(files, find_weights(files)[1][0], 100, 128)


@pytest.mark.parametrize("shape", [(2,), (2, 1, 1), (2, 2, 1)])
def test_fp8_experts_with_one_scale(shape: tuple[int, ...], tmp_path: Path, generator: torch.Generator) -> None:
    weight, scale = fp8(generator, 2, 2 * N, K), floats(generator, torch.float32, *shape)
    tensors = {"m.experts.gate_up_proj": weight, "m.experts.gate_up_proj_scale_inv": scale}
    found = planes_in(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": None})
    for name, half in (("gate_proj", 0), ("up_proj", 1)):
        scheme, planes = found[f"m.experts.1.{name}"]
        number = scale[1].flatten()[half if len(shape) == 3 and shape[1] == 2 else 0]
        expected = weight[1, half * N : (half + 1) * N].float() * number
        assert torch.equal(dequantize(planes, scheme, N, K), expected)


def test_fp4_experts(tmp_path: Path, generator: torch.Generator) -> None:
    weight = integers(generator, torch.int8, 2, 2 * N, K // 2)
    scale = torch.randint(120, 135, (2, 2 * N, K // 32), generator=generator).to(torch.uint8)
    tensors = {"m.experts.gate_up_proj": weight, "m.experts.gate_up_proj_scale_inv": scale}
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"}
    found = planes_in(tmp_path, tensors, settings)
    parts = {"weight": weight[1, N:], "scale": scale[1, N:]}
    assert_same(found["m.experts.1.up_proj"], checkpoints.planes_of_fp8(parts, N, K))


@pytest.mark.parametrize("experts", [0, 1 << 20])
def test_no_or_too_many_experts(experts: int, tmp_path: Path) -> None:
    shape = (experts, 2, 0) if experts else (0, 2, 2)
    tensors = {"m.experts.down_proj": torch.empty(shape).to(torch.float8_e4m3fn)}
    tensors["m.experts.down_proj_scale_inv"] = torch.empty(experts, 1, 0 if experts else 1)
    refused(tmp_path, tensors, {"quant_method": "fp8"}, "is no stack of experts")


def test_fbgemm(tmp_path: Path, generator: torch.Generator) -> None:
    """Linears as they are; the experts of Llama 4 transposed, with gate and up side by side."""
    linear = {"weight": fp8(generator, N, K), "weight_scale": floats(generator, torch.float32, N, 1)}
    fused, scale = fp8(generator, 2, K, 2 * N), floats(generator, torch.float32, 2, 1, 2 * N)
    stacks = {"e.gate_up_proj": fused, "e.gate_up_proj_scale": scale}
    found = planes_in(tmp_path, under("m", linear) | stacks, {"quant_method": "fbgemm_fp8"})
    assert_same(found["m"], checkpoints.planes_of_fp8(linear, N, K))
    for name, half in (("gate_proj", 0), ("up_proj", 1)):
        scheme, planes = found[f"e.1.{name}"]
        rows = slice(half * N, (half + 1) * N)
        expected = fused[1].float().t()[rows] * scale[1].t()[rows]
        assert torch.equal(dequantize(planes, scheme, N, K), expected)


def packed(generator: torch.Generator, bits: int, group: int) -> Tensors:
    return {
        "weight_packed": integers(generator, torch.int32, N, K * bits // 32),
        "weight_scale": floats(generator, torch.bfloat16, N, K // group),
        "weight_shape": torch.tensor([N, K]),
    }


def group(bits: int, size: int, *targets: str, **more: object) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": size, "symmetric": True}
    return {"targets": list(targets), "weights": weights, **more}


def test_compressed_tensors_groups(tmp_path: Path, generator: torch.Generator) -> None:
    """A name comes before a regular expression, and that before a class."""
    groups = {"a": group(4, 32, "Linear"), "b": group(8, 32, r"re:.*\.up"), "c": group(2, 16, "m.up2")}
    tensors = {"m.gate": packed(generator, 4, 32), "m.up1": packed(generator, 8, 32), "m.up2": packed(generator, 2, 16)}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    every = {key: tensor for module, parts in tensors.items() for key, tensor in under(module, parts).items()}
    found = planes_in(tmp_path, every, settings)
    for module, (bits, size) in {"m.gate": (4, 32), "m.up1": (8, 32), "m.up2": (2, 16)}.items():
        call = checkpoints.planes_of_compressed_tensors
        expected = call(tensors[module], N, K, format="pack-quantized", bits=bits, group_size=size)
        assert_same(found[module], expected)
    for entry in ("m.gate", "re:.*gate", "re:m"):
        refused(tmp_path, every, settings | {"ignore": [entry]}, "leaves out")
    assert planes_in(tmp_path, every, settings | {"ignore": ["m", "gate", "re:gate", "lm_head"]})
    groups["d"] = group(8, 16, "Embedding")
    table = packed(generator, 8, 16)
    found = planes_in(tmp_path, every | under("m.embed_tokens", table), settings)
    assert_same(found["m.embed_tokens"], call(table, N, K, format="pack-quantized", bits=8, group_size=16))
    assert found["m.gate"][0].block.columns == 32
    del groups["a"], groups["d"]
    refused(tmp_path, every, settings, "no group of config_groups has the target m.gate")


@pytest.mark.parametrize(
    ("change", "tensor"), [({"symmetric": False}, "weight_zero_point"), ({"actorder": "group"}, "weight_g_idx")]
)
def test_compressed_tensors_needs_what_changes_the_weights(
    change: dict[str, object], tensor: str, tmp_path: Path, generator: torch.Generator
) -> None:
    one = group(4, 32, "Linear", format="pack-quantized")
    one["weights"] |= change
    settings = {"quant_method": "compressed-tensors", "config_groups": {"a": one}}
    tensors = packed(generator, 4, 32)
    refused(tmp_path, under("m", tensors), settings, f"lacks {tensor}")
    values = {"weight_zero_point": integers(generator, torch.int32, N // 8, K // 32)}
    values["weight_g_idx"] = torch.arange(K, dtype=torch.int32) % 2
    tensors[tensor] = values[tensor]
    call = checkpoints.planes_of_compressed_tensors
    expected = call(tensors, N, K, format="pack-quantized", bits=4, group_size=32)
    assert_same(planes_in(tmp_path, under("m", tensors), settings)["m"], expected)


def test_compressed_tensors_under_an_old_name(tmp_path: Path, generator: torch.Generator) -> None:
    tensors = packed(generator, 4, 32)
    inner = {"format": "pack-quantized", "config_groups": {"a": group(4, 32, "Linear")}}
    outer = {"quantization_config": inner, "quant_method": "compressed-tensors"}
    found = planes_in(tmp_path, under("m", tensors), None, compression_config=outer)
    call = checkpoints.planes_of_compressed_tensors
    assert_same(found["m"], call(tensors, N, K, format="pack-quantized", bits=4, group_size=32))


def test_compressed_tensors_mixed_precision(tmp_path: Path, generator: torch.Generator) -> None:
    tensors = {"weight": fp8(generator, N, K), "weight_scale": floats(generator, torch.bfloat16, N, 1)}
    channel = {"num_bits": 8, "type": "float", "strategy": "channel"}
    inputs: dict[str, object] = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    groups = {
        "a": group(4, 32, "Linear", format="pack-quantized"),
        "b": {"targets": ["re:f"], "weights": channel, "format": "float-quantized", "input_activations": inputs},
    }
    settings = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    every = under("f", tensors) | under("m", packed(generator, 4, 32))
    found = planes_in(tmp_path, every, settings)
    assert found["f"][0].activation == Activation("fp8")
    assert found["m"][0].activation is None
    inputs |= {"strategy": "group", "group_size": 16}
    assert planes_in(tmp_path, every, settings)["f"][0].activation == Activation("fp8", group=16)
    inputs |= {"strategy": "tensor", "dynamic": False}
    refused(tmp_path, every, settings, "lacks input_scale")
    static = planes_in(tmp_path, every | {"f.input_scale": torch.ones(1)}, settings)["f"][0].activation
    assert static == Activation("fp8", static=True)
    inputs |= {"symmetric": False}
    assert planes_in(tmp_path, every, settings)["f"][0].activation is None
    del groups["b"]["format"]
    refused(tmp_path, every, settings, "format is 'mixed-precision'")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "stored sparsely"),
        ("transform_config", {"config_groups": {"R1": {"type": "hadamard"}}}, "transform_config"),
        ("quantization_status", "initialized", "quantization_status"),
        ("format", "marlin-24", "format is 'marlin-24'"),
        ("config_groups", {}, "config_groups is empty"),
        ("config_groups", {"a": {"targets": ["Linear"], "weights": None}}, "does not quantize weights"),
    ],
)
def test_compressed_tensors_refusals(
    key: str, value: object, message: str, tmp_path: Path, generator: torch.Generator
) -> None:
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    settings |= {"config_groups": {"a": group(4, 32, "Linear")}, key: value}
    refused(tmp_path, under("m", packed(generator, 4, 32)), settings, message)


def test_modelopt_mixed_precision(tmp_path: Path, generator: torch.Generator) -> None:
    eight = {"weight": fp8(generator, N, K), "weight_scale": torch.tensor(0.5), "input_scale": torch.tensor(0.25)}
    four = {
        "weight": integers(generator, torch.uint8, N // 2, K),
        "weight_scale": floats(generator, torch.float32, N, K // 32),
        "pre_quant_scale": floats(generator, torch.bfloat16, K),
        "input_scale": torch.tensor(0.25),
    }
    layers = {"m.a": {"quant_algo": "FP8"}, "m.b*": {"quant_algo": "W4A8_AWQ", "group_size": 32}}
    side = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "exclude_modules": ["*head"]}}
    tensors = under("m.a", eight) | under("m.b2", four)
    files = {"hf_quant_config.json": side}
    found = planes_in(tmp_path, tensors, None, files=files)
    assert found["m.a"][0].activation == Activation("fp8", static=True)
    assert_same(found["m.b2"], checkpoints.planes_of_modelopt(four, N, K, quant_algo="W4A8_AWQ", group_size=32))
    refused(tmp_path, tensors | under("m.c", eight), None, "has no entry for m.c", files=files)
    refused(tmp_path, under("lm_head", eight), None, "leaves out '\\*head'", files=files)
    other = {"quant_method": "modelopt", "quant_algo": "FP8"}
    refused(tmp_path, tensors, other, "quant_algo is 'FP8', and 'MIXED_PRECISION'", files=files)


@pytest.mark.parametrize("algorithm", ["FP8_PER_CHANNEL_PER_TOKEN", "fp8_pb_wo", "MXFP8", "W8A8_SQ_PER_CHANNEL"])
def test_modelopt_algorithms(algorithm: str, tmp_path: Path, generator: torch.Generator) -> None:
    scales = {
        "FP8_PER_CHANNEL_PER_TOKEN": floats(generator, torch.float32, N),
        "fp8_pb_wo": floats(generator, torch.float32, 1, 1, 1, 1),
        "MXFP8": integers(generator, torch.uint8, N, K // 32),
        "W8A8_SQ_PER_CHANNEL": floats(generator, torch.float32, N),
    }
    weight = integers(generator, torch.int8, N, K) if algorithm.startswith("W8") else fp8(generator, N, K)
    tensors = {"weight": weight, "weight_scale": scales[algorithm]}
    activation = Activation("fp8") if algorithm.endswith("TOKEN") else None
    expected = checkpoints.planes_of_modelopt(tensors, N, K, quant_algo=algorithm, activation=activation)
    found = planes_in(tmp_path, under("m", tensors), {"quant_method": "modelopt", "quant_algo": algorithm})
    assert_same(found["m"], expected)


def test_quark_layers(tmp_path: Path, generator: torch.Generator) -> None:
    eight = {"weight": fp8(generator, N, K), "weight_scale": torch.tensor(0.5), "input_scale": torch.tensor(0.25)}
    four = {
        "weight": integers(generator, torch.uint8, N, K // 2),
        "weight_scale": integers(generator, torch.uint8, N, 2),
    }
    inputs: dict[str, object] = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}
    settings = {
        "quant_method": "quark",
        "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}, "input_tensors": inputs},
        "layer_quant_config": {"*.down": {"weight": {"dtype": "fp4", "group_size": 32}}},
        "exclude": ["lm_head", "*.router"],
    }
    found = planes_in(tmp_path, under("m.up", eight) | under("m.down", four), settings)
    assert found["m.up"][0].activation == Activation("fp8", static=True)
    assert_same(found["m.down"], checkpoints.planes_of_quark(four, N, K, dtype="fp4"))
    inputs |= {"qscheme": "per_channel", "is_dynamic": True}
    found = planes_in(tmp_path, under("m.up", eight), settings)
    assert found["m.up"][0].activation == Activation("fp8")
    refused(tmp_path, under("m.router", eight), settings, "leaves out '\\*.router'")
    settings["layer_quant_config"] = {"*": {"weight": [{"dtype": "fp8_e4m3"}, {"dtype": "int4"}]}}
    refused(tmp_path, under("m.up", eight), settings, "has to be an object")


@pytest.mark.parametrize("kind", ["bitlinear", "autobitlinear"])
def test_bitnet(kind: str, tmp_path: Path, generator: torch.Generator) -> None:
    fields = torch.randint(0, 3, (4, N // 4, K), generator=generator)
    weight = sum(block << 2 * i for i, block in enumerate(fields))
    tensors = {"weight": torch.as_tensor(weight).to(torch.uint8), "weight_scale": torch.tensor([0.5])}
    settings = {"quant_method": "bitnet", "linear_class": kind}
    scheme, planes = planes_in(tmp_path, under("m", tensors), settings)["m"]
    expected = (fields.flatten(0, 1) - 1) * (0.5 if kind == "autobitlinear" else 2.0)
    assert torch.equal(dequantize(planes, scheme, N, K), expected)
    assert scheme.activation == Activation("int8")
    refused(tmp_path, under("m", tensors), settings | {"use_rms_norm": True}, "use_rms_norm")


@pytest.mark.parametrize("name", ["weight", "qweight"])
def test_eetq(name: str, tmp_path: Path, generator: torch.Generator) -> None:
    tensors = {name: integers(generator, torch.int8, K, N), "weight_scales": floats(generator, torch.float16, N)}
    found = planes_in(tmp_path, under("m", tensors), {"quant_method": "eetq"})
    assert_same(found["m"], checkpoints.planes_of_eetq(tensors, N, K))


def mlx(generator: torch.Generator, bits: int, group: int, *experts: int) -> Tensors:
    return {
        "weight": integers(generator, torch.int32, *experts, N, K * bits // 32).view(torch.uint32),
        "scales": floats(generator, torch.float16, *experts, N, K // group),
        "biases": floats(generator, torch.float16, *experts, N, K // group),
    }


def test_mlx(tmp_path: Path, generator: torch.Generator) -> None:
    """A module may have an object of its own; stacks of experts come apart under the names that others use."""
    plain, other, stack = mlx(generator, 4, 32), mlx(generator, 6, 16), mlx(generator, 4, 32, 3)
    own: dict[str, Any] = {"group_size": 32, "bits": 4, "m.o": {"group_size": 16, "bits": 6}, "m.gate": False}
    tensors = under("m.q", plain) | under("m.o", other) | under("m.switch_mlp.up_proj", stack)
    for more in ({"quantization": own}, {"quantization": own, "quantization_config": own}):
        found = planes_in(tmp_path, tensors, None, **more)
        assert_same(found["m.q"], checkpoints.planes_of_mlx(plain, N, K, bits=4, group_size=32))
        assert_same(found["m.o"], checkpoints.planes_of_mlx(other, N, K, bits=6, group_size=16))
        for expert in range(3):
            parts = {
                name: tensor.view(torch.int32)[expert] if name == "weight" else tensor[expert]
                for name, tensor in stack.items()
            }
            expected = checkpoints.planes_of_mlx(parts, N, K, bits=4, group_size=32)
            assert_same(found[f"m.experts.{expert}.up_proj"], expected)
    refused(tmp_path, tensors | under("m.gate", plain), None, "m.gate is false", quantization=own)


def test_metal(tmp_path: Path, generator: torch.Generator) -> None:
    tensors = mlx(generator, 4, 32)
    tensors["qbiases"] = tensors.pop("biases")
    found = planes_in(tmp_path, under("m", tensors), {"quant_method": "metal", "bits": 4, "group_size": 32})
    assert_same(found["m"], checkpoints.planes_of_mlx(tensors, N, K, bits=4, group_size=32))


def test_aqlm(tmp_path: Path, generator: torch.Generator) -> None:
    tensors = {
        "codes": integers(generator, torch.int8, N, K // 8, 2),
        "codebooks": floats(generator, torch.float16, 2, 256, 1, 8),
        "scales": floats(generator, torch.float16, N, 1, 1, 1),
    }
    settings = {"quant_method": "aqlm", "nbits_per_codebook": 8, "linear_weights_not_to_quantize": ["lm_head.weight"]}
    assert_same(
        planes_in(tmp_path, under("m", tensors), settings)["m"], checkpoints.planes_of_aqlm(tensors, N, K, bits=8)
    )
    refused(tmp_path, under("lm_head", tensors), settings, "leaves out lm_head")


@pytest.mark.parametrize("place", ["config_for_layers", "shared_layer_config"])
def test_vptq(place: str, tmp_path: Path, generator: torch.Generator) -> None:
    tensors = {
        "indices": integers(generator, torch.int32, 1, N // 8, K * 12 // 32),
        "centroids.weight": floats(generator, torch.float16, 1, 256 * 8),
        "res_centroids.weight": floats(generator, torch.float16, 1, 16 * 8),
        "weight_scale": floats(generator, torch.float16, K),
        "weight_bias": floats(generator, torch.float16, K),
    }
    layer = {"vector_lens": [-1, 8], "num_centroids": [-1, 256], "num_res_centroids": [-1, 16]}
    key = "m.q_proj" if place == "config_for_layers" else "q_proj"
    settings = {"quant_method": "vptq", place: {key: layer}}
    expected = checkpoints.planes_of_vptq(tensors, N, K, vector_size=8, centroids=256, residual_centroids=16)
    assert_same(planes_in(tmp_path, under("m.q_proj", tensors), settings)["m.q_proj"], expected)
    refused(tmp_path, under("m.k_proj", tensors), settings, "has no entry for m.k_proj")


def test_quanto_without_a_map(tmp_path: Path, generator: torch.Generator) -> None:
    """The sizes tell 2 bits from 4; a config may say what they are, and has to agree."""
    for bits, per_byte in ((4, 2), (2, 4)):
        parts = {
            "_data._data": integers(generator, torch.uint8, 2 * N // per_byte, 32),
            "_scale": floats(generator, torch.bfloat16, 2 * N, 1),
            "_shift": floats(generator, torch.bfloat16, 2 * N, 1),
        }
        tensors = under("weight", parts)
        settings = {"quant_method": "quanto", "weights": f"int{bits}"}
        expected = checkpoints.planes_of_quanto(tensors, N, K, qtype=f"qint{bits}")
        assert_same(planes_in(tmp_path, under("m", tensors), settings)["m"], expected)
        assert_same(planes_in(tmp_path, under("m", tensors), {"quant_method": "quanto"})["m"], expected)
        refused(tmp_path, under("m", tensors), settings | {"weights": "int8"}, f"may be qint{bits}")


def torchao_configs() -> dict[str, Any]:
    quantization = pytest.importorskip("torchao.quantization")
    return {
        "int8": quantization.Int8WeightOnlyConfig(version=2),
        "int8 with int8": quantization.Int8DynamicActivationInt8WeightConfig(version=2),
        "fp8": quantization.Float8WeightOnlyConfig(version=2),
        "int4": quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=quantization.PerGroup(32), version=2
        ),
    }


@pytest.mark.parametrize("name", ["int8", "int8 with int8", "fp8", "int4"])
def test_torchao(name: str, tmp_path: Path, generator: torch.Generator) -> None:
    config = torchao_configs()[name]
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    model = torch.nn.Sequential(torch.nn.Linear(K, N, bias=False))
    model[0].weight.data.copy_(torch.randn(N, K, generator=generator))
    pytest.importorskip("torchao.quantization").quantize_(model, config)
    tensors, metadata = support.flatten_tensor_state_dict(model.state_dict())
    for settings in (None, {"quant_method": "torchao"}):
        scheme, planes = planes_in(tmp_path, tensors, settings, metadata=metadata)["0"]
        # torchao rounds to the dtype of the weight, which is float32 here.
        assert torch.equal(dequantize(planes, scheme, N, K), model[0].weight.dequantize())
        assert scheme.activation == (Activation("int8") if name == "int8 with int8" else None)
    refused(tmp_path, tensors, None, "the metadata of 0.weight", metadata={})
    entry = json.loads(metadata["0.weight"])
    entry["_data"]["is_swizzled_scales"] = True
    refused(tmp_path, tensors, None, "swizzled", metadata={"0.weight": json.dumps(entry)})
