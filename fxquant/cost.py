"""What a product costs: bytes, operations and the least time, as expressions in M, N and K.

`x [M, K]` times the weight `[N, K]` of a linear. Three ways to compute it:

* `packed`: one kernel reads the planes and decodes weights on the way to the products;
* `decoded`: the planes are decoded to a full weight, which a library then multiplies with;
* `full`: the library multiplies with a weight that is bfloat16 in memory.

Times are those of the roofline model (Williams, Waterman, Patterson, 2009, doi 10.1145/1498765.1498785): a phase takes
as long as the slowest of its parts, all at the full rates of a `Device`. They are bounds, which kernels come near or do
not; their ratios say where one way stops being worth it.

    >>> cost("int4", "packed", device).read
    >>> overtakes("full", "packed", "int4", device, 4096, 4096)     # from so many rows on, bfloat16 is as fast
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeAlias, cast, get_args

import sympy  # comes with torch

from fxquant.devices import Device
from fxquant.scheme import Element, Scheme

Way: TypeAlias = Literal["packed", "decoded", "full"]
Bound: TypeAlias = Literal["bytes", "products", "decoding"]
Unit: TypeAlias = Literal["packed", "fp32", "bf16", "int8", "fp8"]

M, N, K = sympy.symbols("M N K", integer=True, positive=True)
"""Rows of x, output features and input features."""

_FLOAT = 2
"""Bytes of a number of x and y: bfloat16 or float16."""


class _Size:
    """A size that `Scheme.planes` can be asked with: arithmetic on an expression, and `math.ceil` of it."""

    def __init__(self, value: Any) -> None:
        self.value = sympy.sympify(value)

    def __mul__(self, other: Any) -> _Size:
        return _Size(self.value * _value(other))

    __rmul__ = __mul__

    def __add__(self, other: Any) -> _Size:
        return _Size(self.value + _value(other))

    __radd__ = __add__

    def __truediv__(self, other: Any) -> _Size:
        return _Size(self.value / _value(other))

    def __lt__(self, other: int) -> bool:
        assert other <= 1, "sizes are positive, and nothing else is known of them"
        return False

    def __ceil__(self) -> _Size:
        return _Size(sympy.ceiling(self.value))


def _value(x: Any) -> Any:
    return x.value if isinstance(x, _Size) else x


@functools.lru_cache(maxsize=1024)
def weight_bytes(scheme: Scheme) -> sympy.Expr:
    """Bytes of all planes of an `[N, K]` weight: what `Scheme.planes` says, as an expression."""
    planes = scheme.planes(cast(int, _Size(N)), cast(int, _Size(K)))
    return sympy.sympify(_value(sum(plane.nbytes for plane in planes.values())))


def decoding_operations(element: Element) -> Fraction:
    """The least operations on 32-bit lanes, per weight, that make numbers of codes; their scale is not counted.

    Isolating codes takes a shift or a mask for all that lie in one lane, so a quarter of one for each that gets a byte;
    two where their bits cross bytes, three for digits in base 3, none where they lie in bytes already. A conversion or
    a look-up for each number comes on top. Of a vector: a look-up and a sum per book, divided by its weights, and one
    for the sign of each.
    """
    if vectors := element.vectors:
        return Fraction(2 * len(vectors.books), vectors.columns * vectors.rows) + (vectors.signs > 0)
    return _isolating(element) + 1


def _isolating(element: Element) -> Fraction:
    if element.trits:
        return Fraction(3, 4)
    return Fraction(0 if element.dtype is not None else 1 if 8 % element.bits == 0 else 2, 4)


@dataclass(frozen=True)
class Phase:
    """Work that overlaps: expressions in M, N and K."""

    read: sympy.Expr
    """Bytes."""
    written: sympy.Expr
    """Bytes."""
    products: sympy.Expr
    """Multiply-adds."""
    unit: Unit
    """Whose rate products have: a field of `Device`."""
    decoding: sympy.Expr
    """Other operations on 32-bit lanes."""

    def parts(self, device: Device) -> dict[Bound, sympy.Expr]:
        """Seconds that each part would take alone."""
        rate = getattr(device, self.unit) or device.fp32
        return {
            "bytes": (self.read + self.written) / _rational(device.read),
            "products": self.products / _rational(rate),
            "decoding": self.decoding / _rational(device.fp32),
        }

    def terms(self, device: Device) -> tuple[sympy.Expr, ...]:
        """Seconds of everything that goes on side by side."""
        parts = self.parts(device)
        if device.separate:
            return tuple(parts.values())
        return parts["bytes"], parts["products"] + parts["decoding"]

    def seconds(self, device: Device) -> sympy.Expr:
        """The least time: of what goes on side by side the longest."""
        return sympy.Max(*self.terms(device))


@dataclass(frozen=True)
class Cost:
    """One way to compute `x @ W.T` on one device: phases that follow on each other."""

    phases: tuple[Phase, ...]
    device: Device

    @property
    def read(self) -> sympy.Expr:
        """Bytes that are read."""
        return sympy.Add(*(phase.read for phase in self.phases))

    @property
    def written(self) -> sympy.Expr:
        """Bytes that are written."""
        return sympy.Add(*(phase.written for phase in self.phases))

    @property
    def products(self) -> sympy.Expr:
        """Multiply-adds."""
        return sympy.Add(*(phase.products for phase in self.phases))

    @property
    def decoding(self) -> sympy.Expr:
        """Operations besides: decoding and scaling."""
        return sympy.Add(*(phase.decoding for phase in self.phases))

    @property
    def seconds(self) -> sympy.Expr:
        """The least time."""
        return sympy.Add(*(phase.seconds(self.device) for phase in self.phases))

    def time(self, m: int, n: int, k: int) -> float:
        """The least time in seconds for these sizes."""
        return float(self.seconds.subs(_sizes(m, n, k)))

    def bound(self, m: int, n: int, k: int) -> Bound:
        """What takes the longest, in the longest of the phases."""
        sizes = _sizes(m, n, k)
        longest = max(self.phases, key=lambda phase: phase.seconds(self.device).subs(sizes))
        parts = {name: part.subs(sizes) for name, part in longest.parts(self.device).items()}
        if not self.device.separate and parts["bytes"] < parts["products"] + parts["decoding"]:
            del parts["bytes"]
        return max(parts, key=lambda name: parts[name])


@functools.lru_cache(maxsize=1024)
def cost(scheme: Scheme | str, way: Way, device: Device) -> Cost:
    """What a linear whose weight is stored under a scheme costs on a device, computed this way.

    Args:
        scheme: a scheme or its spelling; of no account for `full`.
        way: `packed`, `decoded` or `full`, see above.
        device: from `fxquant.devices.DEVICES`, or measured by `fxquant.devices.probe`.

    Raises:
        SchemeError: there is no such scheme.
        ValueError: there is no such way.
    """
    if way not in get_args(Way):
        raise ValueError(f"no way to compute a linear is called {way!r}; there are {', '.join(get_args(Way))}")
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    x, y = _FLOAT * M * K, _FLOAT * M * N
    nothing = sympy.Integer(0)
    if way == "full":
        return Cost((Phase(_FLOAT * N * K + x, y, M * N * K, "bf16", nothing),), device)
    if way == "decoded":
        wide = scheme.activation is not None or device.fp32 > device.bf16
        unit: Unit = "fp32" if wide else "bf16"
        weight = (4 if wide else _FLOAT) * N * K
        decode = Phase(
            weight_bytes(scheme), weight, nothing, "fp32", N * K * _exact(decoding_operations(scheme.spec) + 1)
        )
        return Cost((decode, Phase(weight + x, y, M * N * K, unit, nothing)), device)
    codes = M * K if scheme.activation else nothing  # written and read again, a byte each
    kernel, decoding = _packed(scheme, device.tile)
    return Cost((Phase(weight_bytes(scheme) + x + codes, y + codes, M * N * K, kernel, decoding),), device)


def _packed(scheme: Scheme, tile: int) -> tuple[Unit, sympy.Expr]:
    """Whose rate the products of a packed kernel have, and the operations besides them."""
    element, activation = scheme.spec, scheme.activation
    on_codes = activation is not None and element.kind == {"int8": "int", "fp8": "float"}[activation.element]
    each = _isolating(element) if on_codes else decoding_operations(element)
    # Sums over blocks are scaled, corrected by a zero point where there is one, and converted where they are integers.
    per_sum = 1 + (scheme.zero != "none") + on_codes
    times = sympy.Max(1, M / sympy.Integer(tile))
    decoding = N * K * _exact(each) * times + per_sum * M * N * K / (scheme.block.columns or K)
    return cast(Unit, activation.element) if activation and on_codes else "packed", decoding


def overtakes(later: Way, earlier: Way, scheme: Scheme | str, device: Device, n: int, k: int) -> Fraction | None:
    """The least M, from 1 on, for which one way takes no longer than another; None if it always takes longer.

    Exact, and therefore rarely whole: where it is more than 1, both ways take the same time there.

    Args:
        later: the way that is slower for few rows, or not.
        earlier: the way that it is compared with.
        scheme: how the weight is stored.
        device: whose rates count.
        n: rows of the weight.
        k: its columns.

    Raises:
        SchemeError: there is no such scheme.
        ValueError: there is no such way.
    """
    return _overtakes(later, earlier, Scheme.parse(str(scheme)), device, n, k)


@functools.lru_cache(maxsize=4096)
def _overtakes(later: Way, earlier: Way, scheme: Scheme, device: Device, n: int, k: int) -> Fraction | None:
    slow, fast = (_lines(cost(scheme, way, device), n, k) for way in (later, earlier))
    # Both are the highest of some straight lines, so they meet where two of these do.
    meetings = {(c - a) / (b - d) for (a, b), (c, d) in itertools.product(slow, fast) if b != d}
    candidates = (Fraction(1), *sorted(m for m in meetings if m > 1))
    return next((m for m in candidates if _highest(slow, m) <= _highest(fast, m)), None)


Line: TypeAlias = tuple[Fraction, Fraction]
"""Seconds at M = 0, and seconds per row."""


def _lines(found: Cost, n: int, k: int) -> list[Line]:
    """Straight lines, the highest of which is the time as a function of M."""
    phases = [
        [line for term in phase.terms(found.device) for line in _lines_of(term.subs({N: n, K: k}))]
        for phase in found.phases
    ]
    return [cast(Line, tuple(map(sum, zip(*choice, strict=True)))) for choice in itertools.product(*phases)]


def _lines_of(seconds: sympy.Expr) -> list[Line]:
    """Of an expression in M that is linear but for the larger of two numbers."""
    for maximum in seconds.atoms(sympy.Max):
        return [line for part in maximum.args for line in _lines_of(seconds.subs(maximum, part))]
    start, slope = seconds.subs(M, 0), seconds.diff(M)
    return [(Fraction(int(start.p), int(start.q)), Fraction(int(slope.p), int(slope.q)))]


def _highest(lines: list[Line], m: Fraction) -> Fraction:
    return max(start + slope * m for start, slope in lines)


def _sizes(m: int, n: int, k: int) -> Mapping[sympy.Symbol, int]:
    return {M: m, N: n, K: k}


def _exact(number: Fraction) -> sympy.Rational:
    return sympy.Rational(number.numerator, number.denominator)


def _rational(rate: float) -> sympy.Rational:
    return sympy.Integer(math.floor(rate))
