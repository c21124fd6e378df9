"""The Triton source of the tiled kernel, for every kind of code, zero and scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxquant.lowering.formats import Format
from fxquant.scheme import Zero


@dataclass(frozen=True)
class Variant:
    """What the source of the kernel depends on. Sizes and tiles are constants of the compiled kernel instead."""

    bits: int
    zero: Zero
    table: bool
    pattern: torch.dtype | None
    """The float whose bit patterns codes are."""
    packed: bool
    """Zeros are fields, as codes are, in rows of bytes."""
    power: bool
    exact: bool
    """Values of codes are numbers in the dtype of x."""
    bias: bool
    split: bool
    """The columns of the weight are split: a program gives its part of the sum."""
    experts: bool = False
    """There are several weights: x is blocks of `BLOCK_ROWS` rows, each for the weight that `E` says, or for none."""
    scaled: bool = False
    """x is codes, of which `X_GROUP` in a row share a scale."""

    @classmethod
    def of(cls, form: Format, dtype: torch.dtype, bias: bool, split: bool, experts: bool, scaled: bool) -> Variant:
        """For weights of a format and inputs of a dtype."""
        packed = form.zero == "int" and form.bits < 8 and form.direct
        kind = (form.bits, form.zero, bool(form.table), form.pattern, packed, form.power, form.exact(dtype))
        return cls(*kind, bias, split, experts, scaled)

    @property
    def name(self) -> str:
        """A name that no other variant has."""
        kind = str(self.pattern).removeprefix("torch.") if self.pattern else "table" if self.table else "int"
        words = [f"{kind}{self.bits}", f"zero_{self.zero}"]
        words += [
            word for word in ("packed", "power", "exact", "bias", "split", "experts", "scaled") if getattr(self, word)
        ]
        return "fxquant_linear_" + "_".join(words)

    @property
    def inputs(self) -> tuple[str, ...]:
        """x, codes, scales, zeros or biases, the table, the bias of the linear, the experts of blocks, scales of x."""
        optional = (
            *(("Z", self.zero != "none"), ("T", self.table), ("B", self.bias)),
            *(("E", self.experts), ("X", self.scaled)),
        )
        return ("A", "P", "S", *(name for name, there in optional if there))


def source(variant: Variant) -> str:
    """The kernel. A program computes `BLOCK_M` x `BLOCK_N` of the result, in steps of `BLOCK_K` columns.

    Where columns are split, a program takes `STEPS` steps, from its own part on, and the parts are added up elsewhere,
    in an order that is always the same. Where the values of codes are exact in the dtype of x and a step lies within
    one group, the scale multiplies what a step adds, once per step and not once per weight. Elsewhere weights are
    scaled in float32, then rounded.
    """
    lines = [_HEAD.replace("NAMES", ", ".join(f'"{name}"' for name in variant.inputs))]
    if variant.experts:
        lines += [_OWNER, *(_OWN.replace("NAME", name) for name in variant.inputs if name in ("P", "S", "Z", "B"))]
    lines += [_EXPERT_STEPS if variant.experts else _STEPS[variant.split], _LOADS]
    lines.append(_FIELDS[variant.bits])
    lines.append(_SCALES[variant.power])
    if variant.table:
        lines.append(_TABLE)
    if variant.pattern is not None:
        lines.append(_FLOATS[variant.pattern])
    if variant.zero != "none":
        lines.append(_PACKED_ZERO.replace("BITS", str(variant.bits)) if variant.packed else _PLAIN_ZERO)
    lines.append(_subtracted(variant))
    product = _PRODUCT.replace("SHIFT", " + z.to(tl.float32)[:, :, None]" if variant.zero == "bias" else "")
    lines.append(product.replace("SCALED", _SCALED if variant.scaled else ""))
    lines.append(
        _TAIL.replace("BIAS", _BIAS if variant.bias else "").replace("PART", '"part", ' if variant.split else "")
    )
    return "\n".join(lines).replace("ROW)", "1)" if variant.experts else "0)")


_HEAD = """
{{def_kernel(NAMES)}}
    M = {{size("A", 0)}}
    N = {{size("P", ROW)}}
    K = {{size("A", 1)}}
    # Programs next to each other read the same rows of the weight.
    program = tl.program_id(0).to(INDEX_DTYPE)
    bands = (M + BLOCK_M - 1) // BLOCK_M
    first_m = program % bands * BLOCK_M
    first_n = program // bands * BLOCK_N
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    # Rows past the end are read from the start again, and not stored.
    row_m = m % M
    row_n = n % N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)"""
_OWNER = """\
    # Of a block that nobody needs, no column is read.
    owner = tl.load(E + first_m // BLOCK_ROWS)
    steps = tl.where(owner < 0, 0, STEPS)
    owner = tl.maximum(owner, 0)"""
_OWN = """\
    NAME += owner * {{stride("NAME", 0)}}"""
_EXPERT_STEPS = """\
    for step in range(0, steps):"""
_STEPS = {
    False: """\
    for step in range(0, STEPS):""",
    True: """\
    part = tl.program_id(1).to(INDEX_DTYPE)
    for step in range(part * STEPS, part * STEPS + STEPS):""",
}

_LOADS = """\
        a = tl.load(A + row_m[:, None] * {{stride("A", 0)}} + (step * BLOCK_K + tl.arange(0, BLOCK_K))[None, :])
        group = step * BLOCK_K // GROUP + tl.arange(0, GROUPS)
        s = tl.load(S + row_n[:, None] * {{stride("S", ROW)}} + group[None, :])"""

_FIELDS = {
    2: """\
        bytes = step * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4)
        p = tl.load(P + row_n[:, None] * {{stride("P", ROW)}} + bytes[None, :])
        even = tl.interleave(p & 3, (p >> 4) & 3)
        odd = tl.interleave((p >> 2) & 3, p >> 6)
        v = tl.interleave(even, odd)""",
    4: """\
        bytes = step * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
        p = tl.load(P + row_n[:, None] * {{stride("P", ROW)}} + bytes[None, :])
        v = tl.interleave(p & 0xF, p >> 4)""",
    8: """\
        v = tl.load(P + row_n[:, None] * {{stride("P", ROW)}} + (step * BLOCK_K + tl.arange(0, BLOCK_K))[None, :])""",
}
_TABLE = """\
        v = tl.load(T + v.to(tl.int32))"""
_FLOATS = {
    # By way of float16, on every GPU: e5m2 is its upper half, and the exponents of e4m3 are eight less.
    torch.float8_e4m3fn: """\
        magnitude = v.to(tl.int16) & 0x7F
        v = ((magnitude << 7) | ((v.to(tl.int16) & 0x80) << 8)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        v = tl.where(magnitude == 0x7F, float("nan"), v)""",
    torch.float8_e5m2: """\
        v = (v.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)""",
}
_SCALES = {
    False: """\
        s = s.to(tl.float32)""",
    True: """\
        s = tl.where(s == 0, 0x00400000, tl.where(s == 255, 0x7FC00000, s.to(tl.int32) << 23))
        s = s.to(tl.float32, bitcast=True)""",
}
_PACKED_ZERO = """\
        z = tl.load(Z + row_n[:, None] * {{stride("Z", ROW)}} + (group * BITS // 8)[None, :])
        z = (z >> (group * BITS % 8).to(tl.uint8)[None, :]) & ((1 << BITS) - 1)"""
_PLAIN_ZERO = """\
        z = tl.load(Z + row_n[:, None] * {{stride("Z", ROW)}} + group[None, :])"""


def _subtracted(variant: Variant) -> str:
    """Values minus zeros: `v`, by groups. Integers are subtracted as integers, which every code and zero fits into."""
    by_group = "        v = tl.reshape({}, (BLOCK_N, GROUPS, BLOCK_K // GROUPS))"
    if variant.table or variant.pattern is not None:
        return by_group.format("v")
    if variant.zero == "int":
        return by_group.format("v.to(tl.int16)") + " - z.to(tl.int16)[:, :, None]"
    value = "v.to(tl.int16) + LOW"
    if variant.zero == "float":
        return by_group.format(f"({value}).to(tl.float32)") + " - z.to(tl.float32)[:, :, None]"
    return by_group.format(value)


_PRODUCT = """\
        if SCALE_LAST:
            w = tl.reshape(v.to(a.dtype), (BLOCK_N, BLOCK_K))
            acc += tl.dot(a, tl.trans(w), out_dtype=tl.float32) * tl.trans(s)SCALED
        else:
            w = v.to(tl.float32) * s[:, :, None]SHIFT
            w = tl.reshape(w.to(a.dtype), (BLOCK_N, BLOCK_K))
            acc = tl.dot(a, tl.trans(w), acc, out_dtype=tl.float32)"""

_SCALED = """ * tl.load(X + row_m * {{stride("X", 0)}} + step * BLOCK_K // X_GROUP)[:, None]"""
_BIAS = """
    acc += tl.load(B + row_n)[None, :].to(tl.float32)"""

_TAIL = """\
BIAS
    idx_m = m[:, None]
    idx_n = n[None, :]
    mask = (idx_m < M) & (idx_n < N)
    {{store_output((PART"idx_m", "idx_n"), "acc", "mask", val_shape=("BLOCK_M", "BLOCK_N"))}}
"""
