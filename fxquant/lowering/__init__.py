"""How Inductor compiles quantized products for GPUs. Only where it does: on CPUs the ops are as without this."""

from fxquant.lowering.experts import register_experts
from fxquant.lowering.linear import register

__all__ = ["register", "register_experts"]
