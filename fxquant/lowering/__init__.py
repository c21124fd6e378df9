"""How Inductor compiles `fxquant::linear` for GPUs. Only where it does: on CPUs the op is what it is without this."""

from fxquant.lowering.linear import register

__all__ = ["register"]
