"""Cut single linears and the settings out of a folder of quantized checkpoints, for tests: see README.md.

python tests/data/zoo/extract.py <folder of checkpoints> <folder to write to> [--all]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FP8_BLOCKS = {"weight_block_size": [128, 128]}
PACKED = {"format": "pack-quantized", "bits": 4}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "autoround_w4_asym_g64": ("awq", {"group_size": 64}),
    "autoround_w4_g128": ("gptq", {"bits": 4, "group_size": 128}),
    "awq_gemm_g128": ("awq", {"group_size": 128}),
    "bnb_int8": ("bnb8", {}),
    "bnb_nf4": ("bnb4", {}),
    "bnb_nf4_dq": ("bnb4", {}),
    "ct_fp8_dynamic": ("compressed_tensors", {"format": "float-quantized"}),
    "ct_mxfp4": ("compressed_tensors", {"format": "mxfp4-pack-quantized"}),
    "ct_nvfp4": ("compressed_tensors", {"format": "nvfp4-pack-quantized"}),
    "ct_w4a16_g128": ("compressed_tensors", {**PACKED, "group_size": 128}),
    "ct_w8a8_int": ("compressed_tensors", {"format": "int-quantized", "bits": 8}),
    "fp8_block128_tail": ("fp8", FP8_BLOCKS),
    "gguf_q4_0": ("gguf", {"type_name": "Q4_0"}),
    "gguf_q4_k": ("gguf", {"type_name": "Q4_K"}),
    "gguf_q6_k": ("gguf", {"type_name": "Q6_K"}),
    "gguf_q8_0": ("gguf", {"type_name": "Q8_0"}),
    "gptoss_mxfp4": ("gpt_oss", {}),
    "gptq_v2_w4_g64": ("gptq", {"bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2"}),
    "gptq_w4_from_autoround": ("gptq", {"bits": 4, "group_size": 128}),
    "gptq_w4_g128": ("gptq", {"bits": 4, "group_size": 128, "by_gptqmodel": True}),
    "gptq_w4_g64_actorder": ("gptq", {"bits": 4, "group_size": 64, "by_gptqmodel": True}),
    "gptq_w4_g64_asym_zero0": ("gptq", {"bits": 4, "group_size": 64, "by_gptqmodel": True}),
    "hqq_4bit_g64": ("hqq", {}),
    "modelopt_fp8": ("modelopt", {"quant_algo": "FP8"}),
    "modelopt_nvfp4": ("modelopt", {"quant_algo": "NVFP4"}),
    "moe_qwen3_ct_w4a16_g64": ("compressed_tensors", {**PACKED, "group_size": 64}),
    "moe_qwen3_fp8_block128": ("fp8", FP8_BLOCKS),
    "quanto_int4": ("quanto", {"qtype": "qint4"}),
    "quanto_int8": ("quanto", {"qtype": "qint8"}),
    "quark_int4_g64": ("quark", {"dtype": "int4", "group_size": 64}),
    "torchao_int8wo": ("torchao", {"kind": "Int8Tensor"}),
}
# The smallest linear has no block with a tail: along K, along N.
CHOSEN = {"fp8_block128_tail": "down_proj", "moe_qwen3_fp8_block128": "experts.1.gate_proj"}
MODULES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "ffn_down": "mlp.down_proj"}


def main(zoo: Path, out: Path, everything: bool) -> None:
    """Write one safetensors file for every checkpoint: of one linear, or of all that have expected weights."""
    out.mkdir(parents=True, exist_ok=True)
    for name in sorted(CALLS):
        linears = linears_of(zoo / name)
        if not everything:
            chosen = [module for module in linears if module.endswith(CHOSEN.get(name, ""))]
            smallest = min(chosen, key=lambda module: linears[module]["expected"].numel())
            linears = {smallest: linears[smallest]}
        write(zoo / name, linears, out / f"{name}.safetensors")
    settings = {name: settings_of(zoo / name) for name in sorted(CALLS) if not name.startswith("gguf")}
    lines = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in settings.items()]
    (out / "settings.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def settings_of(folder: Path) -> dict[str, Any]:
    """What a checkpoint says about its quantization: in its config, in files beside it, in its metadata."""
    config = json.loads((folder / "config.json").read_text())
    sides = {file.name: json.loads(file.read_text()) for file in folder.glob("*.json")}
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata() or {}
    return {
        "config": {key: config[key] for key in ("model_type", "quantization_config") if key in config},
        "files": {name: side for name, side in sides.items() if name not in ("config.json", "meta.json")},
        "metadata": metadata,
    }


def write(folder: Path, linears: dict[str, dict[str, torch.Tensor]], path: Path) -> None:
    """Tensors as `<linear>/<name>`, and all else as JSON in the metadata."""
    meta = json.loads((folder / "meta.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    call, settings = CALLS[folder.name]
    about = {
        "call": call,
        "settings": settings,
        "tolerance": meta["tolerance"]["weights"],
        "unit": meta["tolerance"]["unit"],
        "heads": [config.get("num_attention_heads"), config.get("num_key_value_heads")],
    }
    tensors = {
        f"{module}/{name}": tensor.contiguous() for module, parts in linears.items() for name, tensor in parts.items()
    }
    save_file(tensors, path, {"about": json.dumps(about)})


def linears_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """By module: the tensors of the file behind its prefix, and `expected`, `[N, K]`."""
    expected = load_file(folder / "expected.safetensors")
    weights = {
        name.removesuffix(".weight"): w for name, w in expected.items() if "logits" not in name and name != "input_ids"
    }
    if folder.name.startswith("gptoss"):
        return _experts(folder, weights)
    if gguf_file := next(folder.glob("*.gguf"), None):
        blocks = _blocks(gguf_file)
        return {module: {"expected": w, "blocks": blocks[module]} for module, w in weights.items()}
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {
            module: {"expected": w}
            | {
                key.removeprefix(f"{module}."): file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118
                if key.startswith(f"{module}.")
            }
            for module, w in weights.items()
        }


def _experts(folder: Path, weights: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for module, expected in weights.items():
            for expert, weight in enumerate(expected):
                parts = {part: file.get_tensor(f"{module}_{part}")[expert] for part in ("blocks", "scales")}
                found[f"{module}.{expert}"] = {"expected": weight.t(), **parts}
    return found


def _blocks(path: Path) -> dict[str, torch.Tensor]:
    from gguf import GGUFReader

    found = {}
    for tensor in GGUFReader(path).tensors:
        parts = tensor.name.split(".")
        if parts[0] == "blk" and parts[2] in MODULES:
            found[f"model.layers.{parts[1]}.{MODULES[parts[2]]}"] = torch.from_numpy(tensor.data.copy())
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), "--all" in sys.argv)
