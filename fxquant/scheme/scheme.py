"""`Scheme`: how one weight is stored, and what happens to its input. Frozen data and its spelling; no tensors."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from fxquant.errors import SchemeError, nearest
from fxquant.scheme.activations import Activation
from fxquant.scheme.blocks import ROW, TENSOR, Block
from fxquant.scheme.elements import Element, element
from fxquant.scheme.names import NAMES
from fxquant.scheme.planes import PlaneSpec, planes_of
from fxquant.scheme.scale_types import FLOAT_SCALES, SCALE_TYPES, Outer
from fxquant.scheme.spelling import COLUMNS, ZEROS, default_block, default_scale, needs_zero, parts_of

Zero = Literal["none", "int", "float", "bias"]


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored. `Scheme.parse(spelling)` and `str(scheme)` are inverses.

    The value of a weight, in float32: `v = code`, `table[code]`, `float(code)` or an entry of a codebook, and then
    `v * scale`, `(v - zero) * scale` or `v * scale + bias`. A scale with a second level is the product of both.
    Columns that are permuted, scaled or shifted are so behind that: column `j` of what the planes hold is column
    `perm[j]` of the weight, times `column_scales`, plus `column_biases` of the weight's column.

    Raises:
        SchemeError: when the parts contradict each other (a zero point on a table, say).
    """

    element: str
    """A name that `fxquant.scheme.element` knows."""
    block: Block
    """Which weights share a scale."""
    scale: str
    """Type of the scales: a key of `SCALE_TYPES`."""
    zero: Zero = "none"
    """`int`: each block has an integer zero point within the range of the codes. `float`: one in the type of the
    scales. `bias`: a number in the type of the scales is added behind the scale. Exact conversion between the three is
    not possible, which is why there are three."""
    double: bool = False
    """The scales are themselves stored as 8-bit codes with a scale per 256 of them and one offset."""
    outer: Outer | None = None
    """The second level of scales (and biases), where there is one."""
    columns: tuple[Literal["perm", "scale", "bias"], ...] = ()
    """What is done to the columns: keys of `COLUMNS`, in that order."""
    activation: Activation | None = None
    """How the input is quantized; None: not at all."""

    def __post_init__(self) -> None:
        """Reject parts that contradict each other."""
        spec = element(self.element)
        problem = self._scale_problem(spec) or self._zero_problem(spec) or self.block.problem
        if problem is None and self.double and not (self.block.flat and self.scale == "fp32"):
            problem = "-dq needs flat blocks with fp32 scales, as bitsandbytes defines it"
        if problem is None and self.double and self.zero not in ("none", "int"):
            problem = f"-dq is for scales alone: {ZEROS[self.zero]} would need a second level of its own"
        if problem is None and self.columns != tuple(c for c in COLUMNS if c in self.columns):
            problem = f"columns are {', '.join(COLUMNS)} in this order, got {self.columns}"
        if problem is None and spec.vectors is not None:
            cell = Block(spec.vectors.rows, spec.vectors.columns)
            if self.zero != "none" or not cell.divides(self.block):
                problem = f"{self.element} has no zero point, and its blocks consist of whole vectors"
        if problem is None and self.activation is not None:
            problem = self.activation.problem
        if problem:
            raise SchemeError(problem)

    def _scale_problem(self, spec: Element) -> str | None:
        if self.scale not in SCALE_TYPES:
            return f"scales cannot be {self.scale!r}{nearest(self.scale, SCALE_TYPES)}; they can be " + ", ".join(
                name for name, kind in SCALE_TYPES.items() if kind.kind != "code"
            )
        kind = SCALE_TYPES[self.scale]
        if self.outer is None:
            needs = f"{self.scale} scales need a second level: {self.scale}*fp16.g256, say"
            return needs if kind.kind == "code" else None
        if self.double or self.scale in FLOAT_SCALES or kind.kind == "power":
            return f"{'-dq' if self.double else self.scale} scales have no second level of this kind"
        if self.outer.dtype not in FLOAT_SCALES or self.outer.block.problem:
            return f"no such second level: {self.outer}"
        if not self.block.divides(self.outer.block):
            return f"a second-level block, {self.outer.block}, does not consist of whole blocks, {self.block}"
        return None

    def _zero_problem(self, spec: Element) -> str | None:
        if self.zero not in ("none", *ZEROS):
            return f"no such zero: {self.zero!r}; it can be none, {', '.join(ZEROS)}"
        if self.zero != "none" and (spec.kind != "int" or spec.levels):
            return f"{self.element} has no zero point: only integers are asymmetric"
        if self.zero == "none" and needs_zero(spec):
            return f"{self.element} needs a zero point: without one it holds no negative weight"
        if self.zero == "float" and self.scale not in FLOAT_SCALES:
            return f"zeros have the type of the scales, and cannot be {self.scale}"
        if self.zero == "bias" and self.scale not in FLOAT_SCALES and self.outer is None:
            return f"biases have the type of the scales, and cannot be {self.scale}"
        return None

    @property
    def spec(self) -> Element:
        """The element's data."""
        return element(self.element)

    @property
    def encodable(self) -> bool:
        """Whether weights can be quantized to it.

        What consists of vectors can only be read, and so can columns that are scaled or shifted: by what, a weight
        alone does not tell.
        """
        return self.spec.vectors is None and not {"scale", "bias"} & set(self.columns)

    @property
    def multiplied_codes(self) -> Literal["int8", "fp8"] | None:
        """The element whose codes are multiplied with codes, and scaled once behind all of K; None where they are not.

        Both sides are of it, with scales that are constant along K, and the weight has no zero point.
        """
        activation = self.activation
        plain = self.zero == "none" and self.block in (ROW, TENSOR) and not self.columns
        single = self.scale in FLOAT_SCALES and self.outer is None and not self.double
        if activation is None or activation.group or not (plain and single) or self.element != activation.element:
            return None
        return activation.element

    @property
    def weight_only(self) -> Scheme:
        """The same storage with activations left alone."""
        return replace(self, activation=None)

    def __str__(self) -> str:
        """The name that the scheme has, or the shortest spelling that parses back to it."""
        full = _spelled(self)
        if full in _NAMED or self.activation is None:
            return _NAMED.get(full, full)
        base = _spelled(self.weight_only)
        return f"{_NAMED.get(base, base)}+{self.activation}"

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(spelling: str) -> Scheme:
        """The scheme that a text spells, see `fxquant.scheme.spelling`: `int4-g64`, `nf4-dq`, `fp8-row+fp8`, `q4_k`.

        Raises:
            SchemeError: names the part that is not understood and the nearest spelling.
        """
        parts = parts_of(spelling)
        try:
            return Scheme(**parts)
        except SchemeError as error:
            raise SchemeError(f"scheme {spelling!r}: {error}") from None

    def misfit(self, n: int, k: int) -> str | None:
        """Why an `[n, k]` weight cannot be stored under this scheme, or None where it can."""
        outer = self.outer.block.columns if self.outer else 0
        grouped = self.block.columns if not self.block.flat and self.block.rows == 1 else 0
        for size, what in ((grouped, "group"), (outer, "second-level group")):
            if size and k % size:
                return f"K={k} is not a multiple of the {what} {size}"
        if self.activation and self.activation.group and k % self.activation.group:
            return f"K={k} is not a multiple of the activation's group {self.activation.group}"
        if vectors := self.spec.vectors:
            columns = max(vectors.columns, 8 if vectors.signs else 1) * vectors.groups
            if n % vectors.rows or k % columns:
                return f"[N={n}, K={k}] does not consist of vectors of {vectors.rows} x {columns} weights"
        return None

    def planes(self, n: int, k: int) -> dict[str, PlaneSpec]:
        """The planes of an `[n, k]` weight, in the order in which ops take them.

        `codes`: `[n, k]` in the element's own dtype, or uint8 `[n, bytes]`, packed along K (see `fxquant.bits`), each
        row starting on a byte; of vectors, one code for each. `signs`: uint8, the sign bits of vectors.
        `codebook0`, ...: `[groups, entries, rows, columns]`. `scales`: the block grid, packed along its rows where the
        type is a small integer. `scale_scales`: the grid of the second level. Under double quantization `scales` are
        uint8 codes, `scale_scales` float32, one per 256 of them, and `scale_offset` float32 `[1]`.
        `zeros`: the block grid, stored as the codes are, or as the scales (`float`). `biases` and `bias_scales`: as
        scales. `perm`: int32 `[k]`. `column_scales`, `column_biases`: float32 `[k]`. `input_scale`: float32 `[1]`, of
        static activations.
        """
        return planes_of(self, n, k)

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of all planes of an `[n, k]` weight."""
        return sum(spec.nbytes for spec in self.planes(n, k).values())

    def bits_per_weight(self, n: int = 4096, k: int = 4096) -> float:
        """Bits of all planes divided by the number of weights, for an `[n, k]` weight."""
        return 8 * self.nbytes(n, k) / (n * k)

    def with_group(self, size: int) -> Scheme:
        """The same scheme with groups of `size` along K."""
        return replace(self, block=Block(1, size))


def _spelled(scheme: Scheme) -> str:
    parts = [scheme.element]
    if scheme.block != default_block(scheme.element):
        parts.append(str(scheme.block))
    if scheme.zero != "none" and not (scheme.zero == "int" and needs_zero(scheme.spec)):
        parts.append(ZEROS[scheme.zero])
    if scheme.double:
        parts.append("dq")
    if scheme.outer is not None:
        parts.append(f"{scheme.scale}*{scheme.outer}")
    elif scheme.scale != default_scale(scheme.block):
        parts.append(scheme.scale)
    parts += [COLUMNS[name] for name in scheme.columns]
    return "-".join(parts) + (f"+{scheme.activation}" if scheme.activation else "")


_NAMED: Mapping[str, str] = MappingProxyType({_spelled(Scheme(**parts_of(name))): name for name in NAMES})
"""Spelling: name."""
