"""torchao's own configs, applied by torchao itself: its tensors have the shapes and dtypes of our planes."""

from __future__ import annotations

import subprocess
import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from fxquant.errors import FxquantError, SchemeError
from fxquant.recipe import Recipe
from fxquant.rule import Rule
from fxquant.torchao_configs import is_torchao_config, scheme_of_torchao

ao = pytest.importorskip("torchao.quantization")
primitives = pytest.importorskip("torchao.quantization.quant_primitives")
ASYMMETRIC = primitives.MappingType.ASYMMETRIC
SYMMETRIC = primitives.MappingType.SYMMETRIC


def configs() -> list[tuple[Any, str]]:
    return [
        (ao.Int8WeightOnlyConfig(), "int8"),
        (ao.Int8WeightOnlyConfig(granularity=ao.PerRow()), "int8"),
        (ao.Int8WeightOnlyConfig(granularity=ao.PerTensor()), "int8-tensor"),
        (ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(32)), "int8-g32-fp32"),
        (ao.Float8WeightOnlyConfig(), "fp8"),
        (ao.Float8WeightOnlyConfig(granularity=ao.PerTensor()), "fp8-tensor"),
        (ao.Float8WeightOnlyConfig(granularity=ao.PerGroup(64)), "fp8-g64-fp32"),
        (ao.IntxWeightOnlyConfig(), "int8"),
        (ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32)), "int4-g32"),
        (ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32), ASYMMETRIC), "int4-g32-asym"),
        (ao.IntxWeightOnlyConfig(torch.int4, ao.PerAxis(0), scale_dtype=torch.float16), "int4-row-fp16"),
        (ao.IntxWeightOnlyConfig(torch.int8, ao.PerGroup(64), scale_dtype=torch.float32), "int8-g64-fp32"),
        (ao.IntxWeightOnlyConfig(torch.int3, ao.PerGroup(32)), "int3-g32"),
        (ao.IntxWeightOnlyConfig(torch.int2, ao.PerGroup(64), ASYMMETRIC), "int2-g64-asym"),
        (ao.Int8DynamicActivationInt8WeightConfig(), "int8+int8"),
        (ao.Int8DynamicActivationInt8WeightConfig(granularity=[ao.PerRow(), ao.PerTensor()]), "int8-tensor+int8"),
    ]


@pytest.mark.parametrize(("config", "spelling"), configs())
def test_torchao_stores_what_the_scheme_says(config: Any, spelling: str) -> None:
    scheme = scheme_of_torchao(config)
    assert str(scheme) == spelling
    n, k = 24, 128
    linear = nn.Linear(k, n, bias=False, dtype=torch.bfloat16)
    config.set_inductor_config = False
    ao.quantize_(linear, config)
    planes, stored = scheme.planes(n, k), linear.weight
    assert stored.qdata.numel() == n * k
    assert stored.scale.numel() == torch.Size(planes["scales"].shape).numel()
    if getattr(config, "scale_dtype", True) is not None:
        assert stored.scale.dtype == planes["scales"].dtype
    if scheme.spec.dtype is not None:
        assert stored.qdata.dtype == (scheme.spec.float_dtype or planes["codes"].dtype)
    low, high = stored.qdata.float().min(), stored.qdata.float().max()
    if scheme.spec.kind == "int":
        assert scheme.spec.low <= low
        assert high <= scheme.spec.high
    zero_point = getattr(stored, "zero_point", None)
    assert (zero_point is not None and bool(zero_point.any())) == (scheme.zero == "int")


@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("packing", ["plain", "preshuffled", "plain_int32", "tile_packed_to_4d"])
def test_int4_is_asymmetric_in_groups(size: int, packing: str) -> None:
    scheme = scheme_of_torchao(ao.Int4WeightOnlyConfig(group_size=size, int4_packing_format=packing))
    assert (scheme.element, scheme.block.columns, scheme.zero) == ("int4", size, "int")


@pytest.mark.parametrize(
    ("config", "fact"),
    [
        (ao.Int8DynamicActivationInt8WeightConfig(act_mapping_type=ASYMMETRIC), "act_mapping_type=ASYMMETRIC"),
        (ao.Int8DynamicActivationIntxWeightConfig(), "act_mapping_type=ASYMMETRIC"),
        (ao.IntxWeightOnlyConfig(torch.int1), "IntxWeightOnlyConfig with weight_dtype=torch.int1"),
        (ao.IntxWeightOnlyConfig(scale_dtype=torch.float64), "scale_dtype=torch.float64"),
        (ao.Float8WeightOnlyConfig(weight_dtype=torch.float16), "weight_dtype=torch.float16"),
        (ao.Int8WeightOnlyConfig(granularity=ao.PerRow(0)), r"granularity=PerRow\(dim=0\)"),
        (ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(0)), "group size 0"),
        (ao.FqnToConfig({}), "FqnToConfig"),
    ],
)
def test_configs_that_no_scheme_equals(config: Any, fact: str) -> None:
    with pytest.raises(SchemeError, match=fact):
        scheme_of_torchao(config)


def test_the_error_names_the_known_configs() -> None:
    with pytest.raises(
        SchemeError, match=r"did you mean.*\n  known configs: Int8WeightOnlyConfig, Int4WeightOnlyConfig, Int"
    ):
        scheme_of_torchao(ao.Int8StaticActivationInt8WeightConfig(act_quant_scale=torch.ones(1)))


def test_configs_that_torchao_itself_wants_a_gpu_for() -> None:
    block = [types.SimpleNamespace(block_size=shape) for shape in ((1, 128), (128, 128))]
    for config, spelling in (
        ({"granularity": [ao.PerRow(), ao.PerRow()]}, "fp8+fp8"),
        ({"granularity": [type("PerBlock", (), vars(b))() for b in block]}, "fp8-b128x128-fp32+fp8-g128"),
    ):
        fields = {"weight_dtype": torch.float8_e4m3fn, "activation_dtype": torch.float8_e4m3fn, **config}
        made = object.__new__(ao.Float8DynamicActivationFloat8WeightConfig)
        made.__dict__.update(fields)
        assert str(scheme_of_torchao(made)) == spelling


def test_activations_beside_small_integers() -> None:
    config = ao.Int8DynamicActivationIntxWeightConfig(torch.int4, ao.PerGroup(32), act_mapping_type=SYMMETRIC)
    assert str(scheme_of_torchao(config)) == "int4-g32+int8"


def test_nvfp4() -> None:
    formats = pytest.importorskip("torchao.prototype.mx_formats")
    assert str(scheme_of_torchao(formats.NVFP4WeightOnlyConfig(use_dynamic_per_tensor_scale=True))) == "nvfp4"
    assert str(scheme_of_torchao(formats.NVFP4WeightOnlyConfig(use_dynamic_per_tensor_scale=False))) == "e2m1-g16-e4m3"


def test_configs_stand_wherever_a_scheme_does() -> None:
    config = ao.Int8WeightOnlyConfig()
    assert Rule("*", config) == Rule("*", "int8")
    assert Recipe.resolve(config) == Recipe([("*", "int8")])
    assert Recipe([("*", ao.Int4WeightOnlyConfig())], misfit=config) == Recipe([("*", "int4-asym")], misfit="int8")
    with pytest.raises(SchemeError, match=r"a scheme cannot be the class Int8WeightOnlyConfig\n  pass an object"):
        Rule("*", ao.Int8WeightOnlyConfig)


def test_a_group_in_the_field_of_old_configs_counts() -> None:
    config = ao.Int8WeightOnlyConfig()
    config.group_size = 64
    assert str(scheme_of_torchao(config)) == "int8-g64-fp32"


def test_a_class_of_the_same_name_from_elsewhere_is_no_torchao_config() -> None:
    @dataclass
    class Int8WeightOnlyConfig:
        group_size: int | None = None

    assert not is_torchao_config(Int8WeightOnlyConfig())
    with pytest.raises(FxquantError, match="a scheme cannot be"):
        Rule("*", Int8WeightOnlyConfig())


def test_a_class_derived_from_a_config_is_refused_by_its_name() -> None:
    class Mine(ao.Int8WeightOnlyConfig):  # type: ignore[misc, name-defined]
        pass

    assert is_torchao_config(Mine())
    with pytest.raises(SchemeError, match="no scheme equals torchao's Mine"):
        Rule("*", Mine())


def test_recipes_import_neither_torchao_nor_transformers() -> None:
    code = "import sys, fxquant.recipe; print([m for m in ('torchao', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
