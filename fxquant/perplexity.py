"""Perplexity of a language model on a text: what quantization costs, in one number."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxquant.errors import FxquantError


def load_tokens(tokenizer: Any, text: str) -> Tensor:
    """The token ids of a whole text, int64 `[tokens]`, tokenized once and without special tokens.

    Args:
        tokenizer: a tokenizer of transformers.
        text: of any length; longer than the model's context is fine, `perplexity` cuts it into windows.
    """
    # verbose=False: a text longer than the context is no mistake here.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


@torch.no_grad()
def perplexity(
    model: nn.Module, tokens: Tensor, window: int = 256, windows: int | None = None, batch: int = 8
) -> float:
    """How well a model predicts each next token: exp of the mean cross-entropy, within windows that do not overlap.

    The first token of each window is context only, so each window counts `window - 1` predictions. Log-softmax runs in
    float32 whatever the logits are, and the sum in float64. A rest shorter than a window is left out.

    Args:
        model: maps token ids `[batch, window]` to logits `[batch, window, vocabulary]`, or to an output with `.logits`.
        tokens: int64 `[tokens]`, on any device.
        window: tokens per window.
        windows: how many windows to use, from the start; None for all.
        batch: windows per forward; changes speed and memory, not the result.

    Returns:
        The perplexity; nan where the model gives nan.

    Raises:
        FxquantError: when the text has fewer windows than asked for, or none.
    """
    rows = cut_windows(tokens, window, windows)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    was_training = model.training
    model.eval()
    try:
        losses = [_loss(model, part.to(device)) for part in torch.split(rows, batch)]
    finally:
        model.train(was_training)
    return math.exp(math.fsum(losses) / (len(rows) * (window - 1)))


def cut_windows(tokens: Tensor, window: int, windows: int | None = None) -> Tensor:
    """The first windows of a text, `[windows, window]`; a rest shorter than a window is left out.

    Args:
        tokens: `[tokens]`.
        window: tokens per window.
        windows: how many; None for all.

    Raises:
        FxquantError: when the text has fewer windows than asked for, or none.
    """
    available = tokens.numel() // max(window, 1)
    count = available if windows is None else windows
    if tokens.dim() != 1 or window < 2 or not 0 < count <= available:
        raise FxquantError(
            f"{count} windows of {window} tokens are wanted, the text holds {available}: tokens {list(tokens.shape)}\n"
            "  give a longer text, or fewer or shorter windows; a window has two tokens at least"
        )
    return tokens[: count * window].view(count, window)


def _loss(model: nn.Module, ids: Tensor) -> float:
    """Sum of the cross-entropies of all next tokens of `ids` `[batch, window]`."""
    output: Any = model(ids)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    flat = logits[:, :-1].float().flatten(0, 1)
    per_token = functional.cross_entropy(flat, ids[:, 1:].flatten(), reduction="none")
    return per_token.double().sum().item()
