"""What a recipe can be, as tables for people."""

from __future__ import annotations

from fxquant.presets import PRESETS
from fxquant.scheme import ELEMENTS, NAMES, Scheme
from fxquant.tables import Table

_SCHEMES = {
    "int8": "integers of 8, 6, 5, 4, 3 or 2 bits, signed or not; a scale per row",
    "int8-g128": "in groups along K",
    "int4-g32": "small groups: more exact, more scales",
    "int4": "groups of 128",
    "int4-g64-asym": "an integer zero point per group; -fzero: a float; -bias: added behind the scale",
    "int4-perm": "columns sorted by size first: outliers share groups",
    "int3-g64": "",
    "table(-1,-0.3,0.3,1)": "any table of 16, 8, 4 or 2 values",
    "nf4": "NormalFloat in blocks of 64, as bitsandbytes",
    "nf4-dq": "its scales quantized too",
    "fp4": "4-bit floats in blocks of 64, as bitsandbytes",
    "fp8": "8-bit floats (e4m3; fp8e5m2), a scale per row",
    "fp8-b128x128": "a scale per 128 x 128, as DeepSeek",
    "mxfp4": "OCP Microscaling",
    "nvfp4": "NVIDIA's, scales of two levels",
    "q4_k": "one of GGUF's blocks",
    "bitnet": "-1, 0, 1 and one scale; ternary-g64, trit-g64 (five to a byte)",
    "int8+int8": "activations too: int8 or fp8 per token, -static with calibration, -g128 in groups",
    "llm-int8": "LLM.int8: outlier features in full precision",
}


def recipe_tables() -> list[Table]:
    """The presets with their rules, schemes with their bits per weight, and the names that some schemes have."""
    return [_presets(), _schemes(), _names()]


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
            "any scheme: <element>[-<block>][-asym|-fzero|-bias][-dq][-<scales>][-perm][+<activation>]",
            f"elements: {', '.join(ELEMENTS)}",
            "blocks: g<N>, row, tensor, b<R>x<C>, flat<N>; scales: fp32, bf16, fp16, e8m0, e4m3, e4m3*fp32",
            "own rules: a YAML file, as Recipe.to_file writes it",
        ),
    )


def _names() -> Table:
    rows = []
    for name, parts in NAMES.items():
        scheme = Scheme.parse(name)
        rows.append((name, f"{scheme.bits_per_weight():.4g}", parts, "" if scheme.encodable else "can be read only"))
    return Table("schemes with a name", ("recipe", "bits", "is short for", ""), tuple(rows), right=frozenset({1}))
