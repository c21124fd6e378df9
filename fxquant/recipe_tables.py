"""What a recipe can be, as tables for people."""

from __future__ import annotations

from fxquant.presets import PRESETS
from fxquant.scheme import Scheme
from fxquant.tables import Table

_SCHEMES = {
    "int8": "integers, a scale per row",
    "int8-g128": "integers in groups along K",
    "fp8": "8-bit floats (e4m3), a scale per row",
    "fp8-tensor": "8-bit floats, one scale",
    "int4-g32": "small groups: more exact, more scales",
    "int4-g64": "",
    "int4": "groups of 128",
    "int4-g64-asym": "a zero point per group",
    "int4-asym": "",
    "nf4": "NormalFloat in blocks of 64, as bitsandbytes",
    "nf4-dq": "its scales quantized too",
    "fp4": "4-bit floats in blocks of 64, as bitsandbytes",
}


def recipe_tables() -> list[Table]:
    """The presets with their rules, and usual schemes with their bits per weight."""
    return [_presets(), _schemes()]


def _presets() -> Table:
    rows = []
    for name, preset in PRESETS.items():
        rules = ", ".join(f"{rule.match} -> {rule.target}" for rule in preset.rules)
        rows.append((name, rules, preset.description))
    return Table(title="presets", columns=("recipe", "rules", "what it is"), rows=tuple(rows))


def _schemes() -> Table:
    rows = [(name, f"{Scheme.parse(name).bits_per_weight():.4g}", what) for name, what in _SCHEMES.items()]
    return Table(
        title="schemes: everything that can be quantized becomes that",
        columns=("recipe", "bits", "what it is"),
        rows=tuple(rows),
        right=frozenset({1}),
        notes=(
            "bits per weight, scales and zeros counted in, for a 4096 x 4096 weight",
            "any scheme: <element>[-g<N>|-row|-tensor|-b<R>x<C>|-flat<N>][-asym][-dq][-fp32|-bf16|-fp16]",
            "own rules: a YAML file, as Recipe.to_file writes it",
        ),
    )
