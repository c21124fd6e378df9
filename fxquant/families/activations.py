"""How producers say that the input of a linear is quantized, as a scheme says it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from fxquant.scheme import Activation

Element = Literal["int8", "fp8"]
ELEMENTS: Mapping[str, Element] = MappingProxyType(
    {"int": "int8", "int8": "int8", "float": "fp8", "fp8": "fp8", "fp8_e4m3": "fp8"}
)
"""What producers call the codes of 8 bits."""


def activation_of(element: Element, strategy: str, static: bool, group_size: int) -> Activation | None:
    """The activation; None where no scheme has it: its weights are then multiplied with inputs as they are.

    Args:
        element: of the codes.
        strategy: `token` (one scale for each), `group` (of features of a token) or `tensor`.
        static: whether scales were calibrated.
        group_size: features that share a scale.
    """
    if static:
        return Activation(element, static=True) if strategy == "tensor" else None
    if strategy == "token":
        return Activation(element)
    if strategy == "group" and group_size > 0:
        found = Activation(element, group=group_size)
        return found if found.problem is None else None
    return None
