"""What experts compute, written with nothing but `experts.project`: the same for every container of experts.

A container has `project(name, x, ids)`, the attributes and child modules of the class that it stands for, that class
as `origin`, and its `layout`. `x` is `[T, K]` or, with a row per slot, `[T, k, K]`; `ids` `[T, k]`; the result
`[T, k, N]`, zeros where an id names no expert. A parameter that holds several projections can be named instead of them:
the result has the columns of all of them, in the order of the parameter's rows.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn


def by_convention(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of every class under transformers' `use_experts_implementation`.

    Up (and gate), activation, down, the norm behind it where there is one, times the router's weights, summed over the
    k experts of a token in float32 at least.

    Args:
        experts: the container.
        hidden_states: `[T, H]`.
        top_k_index: int64 `[T, k]`; ids that name no expert, as expert parallelism has them, add nothing.
        top_k_weights: `[T, k]`.

    Returns:
        `[T, H]` in the dtype of `hidden_states`.
    """
    at_once: Tensor | None = experts.gated(hidden_states, top_k_index, top_k_weights)
    if at_once is not None:
        return at_once
    outputs = projected(experts, hidden_states, top_k_index)
    absent = (top_k_index < 0) | (top_k_index >= experts.layout.experts)
    if getattr(experts, "has_post_expert_norm", False):
        # The norm of nothing need not be nothing.
        outputs = experts.post_expert_norm(outputs).masked_fill(absent.unsqueeze(-1), 0)
    return weighted_sum(outputs, top_k_weights.masked_fill(absent, 0)).to(hidden_states.dtype)


def projected(experts: Any, x: Tensor, ids: Tensor) -> Tensor:
    """What the experts of each token make of it, `[T, k, H]`: up (and gate), activation, down."""
    if "gate_proj" in experts.layout:
        return down(experts, activated(experts, experts.project("gate_up_proj", x, ids)), ids)
    return down(experts, experts.act_fn(experts.project("up_proj", x, ids)), ids)


def down(experts: Any, x: Tensor, ids: Tensor) -> Tensor:
    """The last projection, `[T, k, H]`."""
    result: Tensor = experts.project("down_proj", x, ids)
    return result


def gates_with_silu(module: nn.Module, layout: Any) -> bool:
    """Whether what experts compute is `down(silu(gate) * up)`, weighted and summed, and nothing else.

    By the class's own `_apply_gate` where that is transformers' default, which is known by its name: transformers need
    not be there.
    """
    own = getattr(type(module), "_apply_gate", None)
    plain = own is None or (own.__module__, own.__name__) == ("transformers.integrations.moe", "_default_apply_gate")
    gated = all(name in layout for name in ("gate_proj", "up_proj", "down_proj")) and layout.forward is by_convention
    return plain and gated and not getattr(module, "has_post_expert_norm", False) and is_silu(module)


def is_silu(experts: Any) -> bool:
    """Whether the activation is silu: torch's own, or transformers' class, which is known by its name."""
    kind = type(getattr(experts, "act_fn", None))
    return (kind.__module__, kind.__name__) in _SILU


_SILU = {("torch.nn.modules.activation", "SiLU"), ("transformers.activations", "SiLUActivation")}


def activated(experts: Any, gate_up: Tensor) -> Tensor:
    """Gate times up by the class's own `_apply_gate`; by `act_fn(gate) * up` where it has none."""
    own = getattr(experts.origin, "_apply_gate", None)
    if own is not None:
        result: Tensor = own(experts, gate_up)
        return result
    gate, up = gate_up.chunk(2, dim=-1)
    product: Tensor = experts.act_fn(gate) * up
    return product


def weighted_sum(outputs: Tensor, weights: Tensor) -> Tensor:
    """`[T, H]`: outputs `[T, k, H]` times weights `[T, k]`, in the wider of their dtypes."""
    return (outputs * weights.unsqueeze(-1)).sum(1)


def in_float32(experts: Any, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
    """OpenAIPrivacyFilterExperts: the convention, with all of it in float32."""
    result = by_convention(experts, hidden_states.float(), router_indices, routing_weights.float())
    return result.to(hidden_states.dtype)


def on_own_tokens(experts: Any, hidden_states: Tensor) -> Tensor:
    """Llama4TextExperts: `[E * T, H]`, T tokens for each expert in turn, weighted before and not behind.

    Tokens that are not for an expert have the weight 0, so their rows are 0, and so is what becomes of them: their
    experts need not be read.
    """
    count = experts.layout.experts
    mine = torch.arange(count, device=hidden_states.device).repeat_interleave(hidden_states.shape[0] // count)
    ids = torch.where(hidden_states.ne(0).any(-1), mine, -1).unsqueeze(-1)
    return projected(experts, hidden_states, ids).squeeze(1)


def with_identities(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """LongcatFlashExperts: ids beyond the experts stand for experts that give back what they get."""
    outputs = projected(experts, hidden_states, top_k_index)
    same = (top_k_index >= experts.layout.experts).unsqueeze(-1)
    outputs = torch.where(same, hidden_states.unsqueeze(1), outputs)
    return weighted_sum(outputs, top_k_weights).to(hidden_states.dtype)


def in_order(experts: Any, inputs: Tensor, expert_size: Any) -> Tensor:
    """JetMoeParallelExperts: `[rows, K]`, of which the first `expert_size[0]` are for expert 0, and so on."""
    # By comparison, since under torch.export sizes may be symbols, of which no tensor can be made.
    rows = torch.arange(inputs.shape[0], device=inputs.device)
    ids = torch.zeros_like(rows)
    for first in itertools.accumulate(expert_size[:-1]):
        ids = ids + (rows >= first)
    result: Tensor = experts.project("proj", inputs, ids.unsqueeze(-1)).squeeze(1)
    return result


def separately_gated(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """DbrxExperts: `[B, S, H]`; gate, up and down are in the child `mlp`, and so is the activation."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    gate, up = (experts.project(name, x, top_k_index) for name in ("gate_proj", "up_proj"))
    outputs = down(experts, experts.mlp.activation_fn(gate) * up, top_k_index)
    absent = (top_k_index < 0) | (top_k_index >= experts.layout.experts)
    y = weighted_sum(outputs, top_k_weights.masked_fill(absent, 0)).to(hidden_states.dtype)
    return y.view(hidden_states.shape[0], -1, hidden_states.shape[-1])


def all_of_them(experts: Any, hidden_states: Tensor, gammas: Tensor) -> Tensor:
    """InklingSharedExperts: every token goes to every expert; `gammas` `[..., E]` weigh what is in the middle."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    count = experts.layout.experts
    ids = torch.arange(count, device=x.device).expand(x.shape[0], count)
    gate, up = (experts.project(name, x, ids) for name in ("gate_proj", "up_proj"))
    middle = experts.act_fn(gate) * up * gammas.reshape(-1, count, 1)
    return down(experts, middle, ids).float().sum(1).to(hidden_states.dtype).view(hidden_states.shape)
