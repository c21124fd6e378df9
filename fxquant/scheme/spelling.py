"""The grammar of a scheme's spelling: text to parts. `fxquant.scheme.scheme` puts parts together and prints them.

    <element>[-<block>][-<zero>][-dq][-<scales>[*<scale>[.<block>]]][-<columns>]...[+<activation>]

    element     int8 int6 ... uint2, ternary, trit, nf4, fp4, e2m1, e2m3, e3m2, iq4, fp8, fp8e5m2,
                table(v0,v1,...), vq<bits>[.<bits>...]x<columns>[r<rows>][s7|s8][c<groups>]
    block       row, tensor, g<N>, b<R>x<C>, flat<N>
    zero        asym, fzero, bias
    scales      fp32, bf16, fp16, e4m3, e8m0; with a second level: e4m3, i8, i6, u6, u4, odd4, odd3
    columns     perm, colscale, colbias
    activation  int8, fp8, int8-static, fp8-static, int8-g<N>, fp8-g<N>, int8-outlier<threshold>

or a name out of `fxquant.scheme.names`, with or without an activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fxquant.errors import SchemeError, nearest
from fxquant.scheme.activations import parse_activation
from fxquant.scheme.blocks import ROW, TENSOR, Block, parse_block
from fxquant.scheme.elements import ELEMENTS, TABLE, Element, element, table_name
from fxquant.scheme.names import NAMES
from fxquant.scheme.scale_types import FLOAT_SCALES, SCALE_TYPES, Outer

ZEROS: Mapping[str, str] = MappingProxyType({"int": "asym", "float": "fzero", "bias": "bias"})
"""Kind of zero: the word for it."""
COLUMNS: Mapping[str, str] = MappingProxyType({"perm": "perm", "scale": "colscale", "bias": "colbias"})
"""What can be done to the columns of a decoded weight: the word for it."""
_FORM = "<element>[-g<N>|-row|-tensor|-b<R>x<C>|-flat<N>][-asym|-fzero|-bias][-dq][-<scales>][+<activation>]"
_EXAMPLES = "int4-g64, int4-g128-asym, int8+int8, nf4-dq, fp8-b128x128, mxfp4, q4_k"

_DEFAULT_BLOCKS: Mapping[str, Block] = MappingProxyType(
    {
        **dict.fromkeys(("int8", "uint8", "fp8", "fp8e5m2"), ROW),
        **dict.fromkeys(("ternary", "trit"), TENSOR),
        **dict.fromkeys(("nf4", "fp4"), Block(1, 64, flat=True)),
        **dict.fromkeys(("e2m1", "e2m3", "e3m2", "iq4"), Block(1, 32)),
    }
)


def default_block(name: str) -> Block:
    """The block that a scheme of this element has where its spelling names none."""
    if name in _DEFAULT_BLOCKS:
        return _DEFAULT_BLOCKS[name]
    spec = element(name)
    if spec.vectors is not None:
        return Block(spec.vectors.rows, 0)
    return Block(1, 64 if spec.kind == "table" else 128)


def default_scale(block: Block) -> str:
    """The type that scales have where the spelling names none.

    A scale per group costs bits, and bfloat16 has float32's range, so that no weight underflows; codes are chosen
    against the rounded scale, so its short mantissa costs next to nothing. Elsewhere float32 is as good as free.
    """
    return "fp32" if block.flat or not block.columns else "bf16"


def needs_zero(spec: Element) -> bool:
    """Whether an element holds no negative weight without a zero point."""
    return spec.kind == "int" and spec.low == 0


def parts_of(spelling: str) -> dict[str, Any]:
    """The arguments for `Scheme` that a spelling stands for.

    Raises:
        SchemeError: names the part that is not understood and the nearest spelling.
    """
    text = spelling.strip().lower()
    base, plus, behind = _split_activation(text)
    base = NAMES.get(text if not plus else base, base)
    inner, also, inside = _split_activation(base)
    if also:
        if plus:
            raise SchemeError(f"unknown scheme {spelling!r}: {base} quantizes activations already")
        base, plus, behind = inner, also, inside
    parts = _weight_parts(base, spelling)
    if plus:
        activation = parse_activation(behind)
        if activation is None:
            known = ["int8", "fp8", "int8-static", "fp8-static", "int8-g128", "fp8-g128", "int8-outlier6"]
            raise SchemeError(
                f"unknown scheme {spelling!r}: no activation is called {behind!r}{nearest(behind, known)}\n"
                f"  activations: {', '.join(known)}"
            )
        parts["activation"] = activation
    return parts


def _split_activation(text: str) -> tuple[str, str, str]:
    """At the `+` behind the weight's part; one inside the parentheses of a table is a sign."""
    start = text.rfind(")") + 1
    before, plus, behind = text[start:].partition("+")
    return text[:start] + before, plus, behind


def _weight_parts(text: str, spelling: str) -> dict[str, Any]:
    table = TABLE.match(text)
    end = table.end() if table else len(text.split("-")[0])
    name = table_name(tuple(float(value) for value in table[1].split(","))) if table else text[:end]
    if name in NAMES:
        whole = f"{name} is a whole scheme, {NAMES[name]}, and takes no more parts"
        raise SchemeError(f"unknown scheme {spelling!r}: {whole}")
    try:
        spec = element(name)
    except SchemeError as error:
        hint = nearest(name, [*ELEMENTS, *NAMES])
        unknown = str(error).startswith("no element")
        raise SchemeError(
            f"unknown scheme {spelling!r}: no element is called {name!r}{hint}\n"
            f"  elements: {', '.join(ELEMENTS)}, table(...)\n  with a name: {', '.join(NAMES)}; e.g. {_EXAMPLES}"
            if unknown
            else f"scheme {spelling!r}: {error}"
        ) from None
    found: dict[str, Any] = {}
    for word in text[end:].split("-")[1:]:
        _take(word, found, spelling)
    block = found.setdefault("block", default_block(name))
    found.setdefault("scale", default_scale(block))
    if needs_zero(spec):
        found.setdefault("zero", "int")
    columns = found.pop("columns", ())
    return {"element": name, **found, "columns": tuple(c for c in COLUMNS if c in columns)}


def _take(word: str, found: dict[str, Any], spelling: str) -> None:
    """Put what one word says into `found`."""
    zeros = {spelled: kind for kind, spelled in ZEROS.items()}
    columns = {spelled: kind for kind, spelled in COLUMNS.items()}
    scale, star, outer = word.partition("*")
    block = parse_block(word)
    if block is not None and "block" not in found:
        found["block"] = block
    elif word in zeros and "zero" not in found:
        found["zero"] = zeros[word]
    elif word == "dq" and "double" not in found:
        found["double"] = True
    elif word in columns and columns[word] not in found.get("columns", ()):
        found["columns"] = (*found.get("columns", ()), columns[word])
    elif scale in SCALE_TYPES and "scale" not in found and (not star or _outer(outer)):
        found["scale"] = scale
        if star:
            found["outer"] = _outer(outer)
    else:
        words = ["row", "tensor", "g64", "g128", "b128x128", "flat64", "dq", *zeros, *columns, *SCALE_TYPES]
        raise SchemeError(
            f"unknown scheme {spelling!r}: {word!r} is not understood, or stands there twice{nearest(word, words)}\n"
            f"  a scheme is spelled {_FORM}, e.g. {_EXAMPLES}"
        )


def _outer(text: str) -> Outer | None:
    dtype, dot, spelled = text.partition(".")
    block = parse_block(spelled) if dot else TENSOR
    return Outer(dtype, block) if dtype in FLOAT_SCALES and block is not None else None
