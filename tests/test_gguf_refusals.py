"""Contents that no GGUF file can hold: refused before anything is written."""

from __future__ import annotations

import dataclasses
from typing import Any

import gguf_contents as checkpoints
import gguf_examples as examples
import pytest
import torch

from fxquant.checkpoint_contents import Contents, Matrix
from fxquant.errors import CheckpointError, FileError
from fxquant.gguf import gguf_tensors
from fxquant.scheme import PlaneSpec, Scheme

Q4_0 = Scheme.parse("q4_0")


def changed(contents: Contents, drop: str = "", matrices: Any = None, **plain: PlaneSpec) -> Contents:
    kept = {name: spec for name, spec in contents.plain.items() if not drop or drop not in name}
    own = {name: one for name, one in contents.matrices.items() if not drop or drop not in name}
    given = {name.replace("__", "."): spec for name, spec in plain.items()}
    return dataclasses.replace(contents, plain={**kept, **given}, matrices=own | (matrices or {}))


def test_contents_that_cannot_be_written() -> None:
    with torch.no_grad():
        contents = checkpoints.quantized(examples.build("mixtral"), lambda *_: Q4_0).contents
    up = "model.layers.0.mlp.experts.1.up_proj"
    vector, matrix = PlaneSpec((64,), torch.float32), contents.matrices[up]
    other = dataclasses.replace(matrix, scheme=Scheme.parse("q8_0"))
    q = "model.layers.0.self_attn.q_proj"
    unknown = dataclasses.replace(contents.matrices[q], scheme=Scheme.parse("nf4"))
    wide = Matrix(q, q, 64, 128, Q4_0)
    cases = {
        "lacks tensors of the model: 2.*input_layernorm": changed(contents, "input_layernorm"),
        "lacks tensors of the model: 2.*gate_up_proj": changed(contents, "up_proj"),
        "up_proj.weight of 2 experts, and the model has 3": changed(contents, up),
        "extra, which MixtralForCausalLM does not have": changed(contents, extra=vector),
        r"7.gate_proj, which .* does not have": changed(
            contents, matrices={"x.experts.7.gate_proj": dataclasses.replace(matrix, own="x.experts.7.gate_proj")}
        ),
        r"norm.weight is \[65\], and .* \[64\]": changed(contents, model__norm__weight=PlaneSpec((65,), torch.float32)),
        r"q_proj is \[64, 128\], and .* \[64, 64\]": changed(contents, matrices={q: wide}),
        r"1.up_proj is \[32, 64\], and .* \[96, 64\]": changed(
            contents, matrices={up: dataclasses.replace(matrix, n=32)}
        ),
        "is torch.float64": changed(contents, model__norm__weight=PlaneSpec((64,), torch.float64)),
        "2 of 3 are quantized": changed(
            contents, up, **{up.replace(".", "__") + "__weight": PlaneSpec((96, 64), torch.float32)}
        ),
        "no one type.*q4_0 .*, q8_0": changed(contents, matrices={up: other}),
        "no one type.*nf4": changed(contents, matrices={q: unknown}),
        "are both": changed(contents, matrices={"again": matrix}),
        "twice: 1.*ffn_down_exps": changed(
            contents, model__layers__0__mlp__experts__down_proj=PlaneSpec((3, 64, 96), torch.float32)
        ),
    }
    for fault, one in cases.items():
        with pytest.raises(FileError, match=f"(?s){fault}"):
            gguf_tensors(one, {})


def test_heads_that_the_config_does_not_have() -> None:
    with torch.no_grad():
        contents = checkpoints.quantized(examples.build("llama"), lambda *_: Q4_0).contents
    contents.config.head_dim = 64
    with pytest.raises(FileError, match=r"attn_q\.weight has 128 rows, not 4 heads of 64"):
        gguf_tensors(contents, {})


def test_planes_that_gguf_cannot_hold() -> None:
    with torch.no_grad():
        checkpoint = checkpoints.quantized(examples.build("llama"), lambda *_: Scheme.parse("nvfp4"))
    found = gguf_tensors(checkpoint.contents, {})
    unit = next(unit for unit in found.units if any(name.endswith("attn_v.weight") for name in unit.tensors))
    checkpoint.weights[unit.inputs[0]]["scales"][3] |= 0x80
    with pytest.raises(CheckpointError, match="negative"):
        unit.make(checkpoint)
