"""How other libraries choose scales, zeros and codes, one file for each: a rule writes its results into our planes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from fxquant.codecs.rules import bitsandbytes, compressed_tensors, gguf, torchao
from fxquant.codecs.rules.rule import Make, fill
from fxquant.scheme import Scheme

__all__ = ["RULES", "Make", "fill"]

RULES: Mapping[str, Callable[[Scheme], Make | None]] = MappingProxyType(
    {
        "bitsandbytes": bitsandbytes.rule,
        "compressed-tensors": compressed_tensors.rule,
        "torchao": torchao.rule,
        "torchao-no-clipping": torchao.no_clipping,
        "gguf": gguf.rule,
    }
)
"""Library: what gives, for a scheme, the maker of the rule, or None where the library does what `absmax` does.

It raises SchemeError where the library has no rule for a scheme.
"""
