"""The tensors of one quantized linear as a file has them, looked at before they are used."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.errors import CheckpointError, SchemeError
from fxquant.scheme import ROW, Activation, Block, Scheme

Planes = tuple[Scheme, dict[str, Tensor]]
"""How a weight is stored, and what stores it: what every `planes_of_...` gives."""

Shape = tuple[int, ...]

FLOATS: Mapping[torch.dtype, str] = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
"""The dtypes that scales keep, and what a scheme calls them."""

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu


@dataclass(frozen=True)
class Source:
    """Gives tensors that have the shape and dtype that they must have, and refuses all others."""

    format: str
    """What to call the format in errors."""
    tensors: Mapping[str, Tensor]
    """By their names behind the prefix of the module: `qweight`, `weight.absmax`."""
    n: int
    k: int

    def __post_init__(self) -> None:
        """Reject sizes that no linear has."""
        if min(self.n, self.k) < 1:
            raise self.error("sizes are positive", "give the features of the linear")

    def error(
        self, fact: str, remedy: str = "the file is damaged, or its settings belong to another file"
    ) -> CheckpointError:
        """An error about this linear, to be raised."""
        return CheckpointError(f"{self.format} weight of shape [N={self.n}, K={self.k}]: {fact}\n  {remedy}")

    def require(self, holds: bool, fact: str) -> None:
        """Refuse the tensors unless a condition holds."""
        if not holds:
            raise self.error(fact)

    def take(self, name: str, dtypes: torch.dtype | Iterable[torch.dtype], *shapes: Shape) -> Tensor:
        """The tensor of this name, contiguous.

        Args:
            name: behind the prefix of the module.
            dtypes: those that it may have.
            shapes: those that it may have; none given: any.

        Raises:
            CheckpointError: there is none, or it has another dtype or shape.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise self.error(f"there is no tensor {name!r}; there are {sorted(self.tensors)}")
        allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
        shape = tuple(tensor.shape)
        plain = _is_plain(tensor)
        if not plain or tensor.dtype not in allowed or (shapes and shape not in shapes):
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            expected += " of shape " + " or ".join(str(list(shape)) for shape in shapes) if shapes else ""
            found = f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(shape)}"
            dense = "" if plain else ", and not dense"
            raise self.error(f"{name!r} is {found}{dense}; it has to be {expected}")
        return tensor.contiguous()

    def scalar(self, name: str) -> Tensor:
        """A tensor of one float, as float32 `[1]`."""
        return self.take(name, FLOATS, (), (1,), (1, 1)).to(torch.float32).view(1)

    def group(self, size: int) -> int:
        """The size of groups along K; -1 stands for all of K.

        Raises:
            CheckpointError: K does not consist of groups of this size.
        """
        group = self.k if size == -1 else size
        self.require(group >= 1 and self.k % group == 0, f"K={self.k} is no multiple of the group size {size}")
        return group

    def block(self, group: int) -> Block:
        """The block of groups along K."""
        return ROW if group == self.k else Block(1, group)

    def finish(self, scheme: Scheme, planes: Mapping[str, Tensor], activation: Activation | None = None) -> Planes:
        """The scheme and its planes, in its order; with the scale of a static activation.

        Raises:
            CheckpointError: the scheme cannot hold such a weight, or these are not its planes.
        """
        if activation is not None:
            scheme = self.scheme(**{**vars(scheme), "activation": activation})
            if activation.static:
                name = "activation_scale" if "activation_scale" in self.tensors else "input_scale"
                planes = {**planes, "input_scale": self.scalar(name)}
        if misfit := scheme.misfit(self.n, self.k):
            raise self.error(misfit)
        specs = scheme.planes(self.n, self.k)
        expected = {name: (spec.shape, spec.dtype) for name, spec in specs.items()}
        found = {name: (tuple(plane.shape), plane.dtype) for name, plane in planes.items()}
        self.require(found == expected, f"a {scheme} weight has the planes {expected}, and these are {found}")
        return scheme, {name: planes[name].contiguous() for name in specs}

    def scheme(self, **parts: object) -> Scheme:
        """A scheme of these parts.

        Raises:
            CheckpointError: they contradict each other.
        """
        try:
            return Scheme(**parts)  # type: ignore[arg-type]
        except SchemeError as error:
            raise self.error(str(error)) from None


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has numbers, each at a place of its own: one that is expanded may be larger than all memory."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def in_one_dtype(*tensors: Tensor) -> tuple[str, list[Tensor]]:
    """What a scheme calls the dtype of scales and zeros, and them in it: float32 where they do not agree."""
    dtype = tensors[0].dtype if len({tensor.dtype for tensor in tensors}) == 1 else torch.float32
    return FLOATS[dtype], [tensor.to(dtype) for tensor in tensors]


def ceil_div(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return math.ceil(a / b)
