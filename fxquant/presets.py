"""Recipes with a name, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fxquant.rule import Rule


@dataclass(frozen=True)
class Preset:
    """A recipe with a name; `Recipe.preset(name)` makes the recipe."""

    description: str
    """One line for people who choose."""
    rules: tuple[Rule, ...]
    misfit: str = "error"
    """What becomes of a layer that cannot hold its scheme, see `Recipe`."""


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "int8": Preset("8-bit integers, a scale per row: half of bf16", (Rule("*", "int8"),)),
        "int4": Preset(
            "4-bit integers in groups of 128, smaller groups where K asks for it: a quarter of bf16, the usual choice",
            (Rule("*", "int4-g128"),),
            misfit="shrink",
        ),
        "nf4": Preset("4-bit NormalFloat in blocks of 64, as QLoRA and bitsandbytes store it", (Rule("*", "nf4"),)),
        "nf4-dq": Preset("nf4 with its scales quantized too: 4.13 bits per weight", (Rule("*", "nf4-dq"),)),
        "fp4": Preset("4-bit floats in blocks of 64, as bitsandbytes stores them", (Rule("*", "fp4"),)),
        "fp8": Preset("8-bit floats (e4m3), a scale per row", (Rule("*", "fp8"),)),
        "small": Preset(
            "int4, and output embeddings in int8 in place of full precision",
            (
                # The names that transformers' causal language models give their output embeddings.
                Rule("*{lm_head,embed_out}", "int8", optional=True),
                Rule("*", "int4-g128"),
            ),
            misfit="shrink",
        ),
    }
)
