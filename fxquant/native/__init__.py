"""Codecs in C++ for CPUs, for the common schemes; everything that they do not cover goes on with plain torch.

Compiled on first use by Inductor, into Inductor's cache. Without a C++ compiler there is one warning, and plain torch.
"""

from fxquant.native.dequantize import dequantize
from fxquant.native.library import from_size
from fxquant.native.quantize import quantize

__all__ = ["dequantize", "from_size", "quantize"]
