"""As bitsandbytes 0.50 quantizes: nf4 and fp4, with and without double quantization, and LLM.int8."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.codecs.blocks import Batch
from fxquant.codecs.rules.rule import Make, Rule, absmax, no_rule, over
from fxquant.errors import SchemeError
from fxquant.scheme import ROW, Scheme

_SCHEMES = "nf4 and fp4 in flat blocks, also with -dq, and int8 with a scale per row, also llm-int8"
_LIMIT = torch.finfo(torch.float16).max


def rule(scheme: Scheme) -> Make | None:
    """LLM.int8 (arXiv 2208.07339): bit-identical to `int8_vectorwise_quant` of the weight in float16, for all devices.

    The plane has `absmax / 127`. For nf4 and fp4 (QLoRA, arXiv 2305.14314) the rule is `absmax`, and there is no maker.

    Raises:
        SchemeError: another scheme.
    """
    if not scheme.columns and scheme.scale == "fp32" and scheme.zero == "none" and scheme.outer is None:
        if scheme.element in ("nf4", "fp4") and scheme.block.flat:
            return None
        if scheme.element == "int8" and scheme.block == ROW:
            return _int8
    raise no_rule("bitsandbytes", scheme, _SCHEMES)


def _int8(weight: Tensor) -> Rule:
    return Rule(_choose, ("factors",), _encode)


def _choose(batch: Batch) -> dict[str, Tensor]:
    exact = absmax(batch)
    top = exact.to(torch.float16).to(torch.float32)
    if not bool(top.isfinite().all()):
        raise SchemeError(
            f"bitsandbytes has no int8 for this weight: it casts to float16, which ends at {_LIMIT:g}, and the weight "
            f"reaches {exact.max().item():g}\n  choose scales by least_squares or absmax"
        )
    # 0 where the library has 127 / 0, and codes that are casts of nan.
    return {"scales": over(top, 127), "factors": torch.where(top > 0, 127.0 / top, 0.0)}


def _encode(x: Tensor, factor: Tensor) -> Tensor:
    return torch.round(x.to(torch.float16) * factor).to(torch.int8)
