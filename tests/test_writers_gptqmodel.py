"""GPTQ files of ours in GPTQModel itself, which decodes them to our values."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from fxquant.checkpoints.gptq import tensors_of_gptq
from fxquant.codecs import dequantize, quantize
from fxquant.scheme import Scheme

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on machines with few cores it asks for more than there are
pytest.importorskip("gptqmodel")

SCHEMES = [
    *("int4-g64-fp16", "uint4-g64-fp16", "uint4-g32-fp16-perm", "int8-g32-fp16", "uint8-g64-fp16", "int3-g32-fp16"),
    *("uint2-g32-fp16", "int4-fp16", "uint4-row-fp16"),
]


@pytest.mark.parametrize("spelling", SCHEMES)
def test_it_decodes_to_our_values(spelling: str) -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    n, k, scheme = 96, 256, Scheme.parse(spelling)
    planes = quantize(torch.randn(n, k), scheme)
    tensors = tensors_of_gptq(scheme, planes, n, k)
    group = k if scheme.block.columns == 0 else scheme.block.columns
    layer: Any = TorchLinear(
        bits=scheme.spec.bits,
        group_size=group,
        sym=scheme.zero == "none",
        desc_act="perm" in scheme.columns,
        in_features=k,
        out_features=n,
        bias=False,
        pack_dtype=torch.int32,
        register_buffers=True,
    )
    for name, tensor in tensors.items():
        assert getattr(layer, name).shape == tensor.shape, name
        setattr(layer, name, tensor.clone())
    layer.post_init()
    found = layer.dequantize_weight().t().float()
    expected = dequantize(planes, scheme, n, k)
    # it multiplies in fp16, where we round once, behind float32
    assert torch.equal(found, expected.half().float())
