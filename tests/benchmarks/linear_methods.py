"""Ways to multiply by a quantized weight, with copies of it that no cache holds; ours, and the check of all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from side_by_side import Reading, Timed, seconds_of
from torch import Tensor

from fxquant import codecs, native
from fxquant.activation_codecs import dequantize_activation, quantize_activation
from fxquant.ops import ABI
from fxquant.scheme import Scheme

STEP = 2.0**-8
"""Half the distance from 1 to the next larger bfloat16."""
LARGEST_ERROR = 0.005
"""Of a result, in the 2-norm."""


@dataclass
class Method(Timed):
    """One way to compute, with copies of its weight."""

    copies: list[Callable[[Tensor], Tensor]]
    weight: Tensor
    """What the first copy stands for, float32."""
    input: Callable[[Tensor], Tensor] = field(default=lambda x: x, kw_only=True)
    """What is multiplied in place of x."""
    error: float = field(default=0.0, kw_only=True)
    """Where what a copy stands for is not at hand: the largest relative error against `weight`, in the 2-norm."""
    calls: int = 0

    def run(self, x: Tensor) -> None:
        copy = self.copies[self.calls % len(self.copies)]
        self.calls += 1
        self.seconds.append(seconds_of(lambda: copy(x)))


def copies_of(nbytes: int, megabytes: float) -> int:
    return max(2, math.ceil(megabytes * 1e6 / nbytes))


def planes_of(spelling: str, weight: Tensor, megabytes: float) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Copies of the planes, and the weight that they stand for, float32."""
    scheme, (n, k) = Scheme.parse(spelling), weight.shape
    first = codecs.quantize(weight, scheme.weight_only, "absmax")
    decoded = codecs.dequantize(first, scheme, n, k)
    count = copies_of(scheme.nbytes(n, k), megabytes)
    return [first, *({name: p.clone() for name, p in first.items()} for _ in range(count - 1))], decoded


def op(spelling: str, planes: Sequence[dict[str, Tensor]], decoded: Tensor) -> Method:
    """`fxquant::linear` on these planes, as a quantized module calls it."""
    scheme, n = Scheme.parse(spelling), len(decoded)
    activation = scheme.activation

    def copy(held: list[Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.ops.fxquant.linear(x, held, [], spelling, [n], ABI)

    def rounded(x: Tensor) -> Tensor:
        assert activation is not None
        return dequantize_activation(*quantize_activation(x, activation), activation)

    copies = [copy(list(p.values())) for p in planes]
    method = Method(spelling, False, copies, decoded, nbytes=scheme.nbytes(*decoded.shape))
    if activation is not None:
        method.input = rounded
    return method


def function(spelling: str, planes: Sequence[dict[str, Tensor]], decoded: Tensor) -> Method:
    """The kernel itself, without the dispatcher."""
    scheme, n = Scheme.parse(spelling), len(decoded)

    def copy(held: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            y = native.linear(x, held, scheme, n, None)
            assert y is not None
            return y

        return run

    nbytes = scheme.nbytes(*decoded.shape)
    return Method(f"{spelling}, native.linear", False, [copy(p) for p in planes], decoded, nbytes=nbytes)


def decoded_first(spelling: str, planes: Sequence[dict[str, Tensor]], decoded: Tensor) -> Method:
    """Decoded to a full weight, which torch multiplies with."""
    scheme, (n, k) = Scheme.parse(spelling), decoded.shape

    def copy(held: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: F.linear(x, codecs.dequantize(held, scheme, n, k, x.dtype))

    copies = [copy(p) for p in planes[:2]]
    return Method(f"{spelling}, decoded first", False, copies, decoded, nbytes=scheme.nbytes(n, k))


def wrong(methods: Sequence[Method], x: Tensor) -> list[str]:
    """Methods whose result is further from float64 than the roundings of a bfloat16 weight and result explain.

    As a whole, in the 2-norm, and in the number that is furthest off: roundings of products that add up at random.
    """
    found = []
    for method in methods:
        y, given, weight = method.copies[0](x).double(), method.input(x).double(), method.weight.double()
        reference = given @ weight.T
        off, largest = ((y - reference).norm() / reference.norm()).item(), method.error or LARGEST_ERROR
        spread = 4 * STEP * (given.square() @ weight.square().T).sqrt() + STEP * reference.abs()
        furthest = 0.0 if method.error else ((y - reference).abs() / spread).max().item()
        if not (off <= largest and furthest <= 1):
            found.append(
                f"{method.name}, {len(x)} rows: off by {off:.2e}, more than {largest:.2e}, "
                f"or in one number by {furthest:.2f} of what is allowed"
            )
    return found


def run_rounds(methods: Sequence[Method], x: Tensor, rounds: int, reading: Reading) -> None:
    """Time every method once in every round, in turn the first, and the reading with them.

    As in a model, where layer follows on layer, code is in a cache and weights are not: before it is timed, each runs
    on another copy of its weight. Nor is a copy timed in its first call, which prepares what others find.
    """
    for method in methods:
        while method.calls < len(method.copies):
            method.run(x)
    for timed in (*methods, reading):
        timed.seconds.clear()
    order = list(methods)
    for _ in range(rounds):
        reading.run()
        for method in order:
            method.run(x)
            method.seconds.pop()
            method.run(x)
        order = list(itertools.islice(itertools.cycle(order), 1, len(order) + 1))
