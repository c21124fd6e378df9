"""What transformers has to know of quantized modules: which tensors are theirs, and which it must leave alone."""

from __future__ import annotations

from torch import Tensor, nn

from fxquant.expert_modules import QExperts
from fxquant.modules import QLinear


def quantized_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that must be in a file of a model for its quantized modules to be complete, by name, under every name.

    The planes of linears, and all tensors of experts. Biases of linears are not among them.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QLinear):
            found |= {f"{name}.{plane}": tensor for plane, tensor in module.planes.items()}
        elif isinstance(module, QExperts):
            found |= {f"{name}.{inner}": t for inner, t in module.state_dict(keep_vars=True).items()}
    return found


def mark_initialised(module: QLinear | QExperts) -> None:
    """Keep transformers from initialising a quantized module as what it takes it for.

    A linear with a bias is left: where a checkpoint lacks the bias, that does need it; of the weight, a copy is lost.
    """
    if isinstance(module, QExperts):
        # A child that has lost a parameter is still of its class, and would be initialised as such.
        paths = {stack.parameter.rpartition(".")[0] for stack in module.stacks}
        for part in (module, *(module.get_submodule(path) for path in paths)):
            vars(part)["_is_hf_initialized"] = True
    elif module._parameters["bias"] is None:
        vars(module)["_is_hf_initialized"] = True
