"""What happens to the input of a linear before it is multiplied: quantized activations are part of a scheme."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_SPELLED = re.compile(r"(int8|fp8)(?:-(?:(static)|g([1-9]\d{0,5})|outlier(\d{1,4}(?:\.\d{1,4})?)))?")


@dataclass(frozen=True)
class Activation:
    """How activations are quantized. Symmetric; scales are float32.

    Spelled behind a `+`: `int8`, `fp8` (dynamic, a scale per token), `fp8-g128` (a scale per 128 features of a token),
    `int8-static` (one calibrated scale, a plane of the weight), `int8-outlier6` (features that reach 6 anywhere in the
    batch are multiplied in full precision: LLM.int8, arXiv 2208.07339).
    """

    element: Literal["int8", "fp8"]
    static: bool = False
    group: int = 0
    """Features of a token that share a scale; 0: all."""
    threshold: float = 0.0
    """Magnitude from which on a feature counts as an outlier; 0: there are none."""

    def __str__(self) -> str:
        """The spelling."""
        if self.static:
            return f"{self.element}-static"
        if self.group:
            return f"{self.element}-g{self.group}"
        return f"{self.element}-outlier{self.threshold:g}" if self.threshold else self.element

    @property
    def problem(self) -> str | None:
        """Why there is no such activation, or None."""
        return None if parse_activation(str(self)) == self else f"no such activation: {self!r}"


def parse_activation(text: str) -> Activation | None:
    """The activation that is spelled, or None."""
    found = _SPELLED.fullmatch(text)
    if not found:
        return None
    threshold = float(found[4] or 0)
    if found[4] and (not threshold or found[1] != "int8"):
        return None
    element: Literal["int8", "fp8"] = "int8" if found[1] == "int8" else "fp8"
    return Activation(element, found[2] is not None, int(found[3] or 0), threshold)
