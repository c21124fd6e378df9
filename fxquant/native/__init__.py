"""Codecs and products in C++ for CPUs, for the common schemes; what they do not cover goes on with plain torch.

Compiled on first use by Inductor, into Inductor's cache. Without a C++ compiler there is one warning, and plain torch.
"""

from fxquant.native.dequantize import dequantize
from fxquant.native.gated import gated_experts
from fxquant.native.library import from_size
from fxquant.native.matmul import experts, linear, linear_on_codes
from fxquant.native.quantize import quantize
from fxquant.native.ready import remember_linear
from fxquant.native.squares import squares

__all__ = [
    "dequantize",
    "experts",
    "from_size",
    "gated_experts",
    "linear",
    "linear_on_codes",
    "quantize",
    "remember_linear",
    "squares",
]
