"""Inputs that a transformers model accepts, derived from the signature of its forward and from its config.

Two things decide: what the forward asks for (`main_input_name`, arguments without a default, a decoder's tokens), and
what shape the config gives it. Where the config leaves a choice (frames before mel bins or after), every choice is a
candidate, the likeliest first. Values are random but for tokens, which are no special ones.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import CaptureError

_TOKENS = 8
_MOST_CANDIDATES = 8


@dataclass(frozen=True)
class _Model:
    """What inputs follow from."""

    parameters: dict[str, inspect.Parameter]
    configs: list[Any]
    """The model's config and those nested in it, outer ones first."""
    device: torch.device
    dtype: torch.dtype
    vocabulary: int

    def find(self, *names: str) -> Any:
        """The first of these attributes that a config has, outer configs first; None where none has any."""
        values = (vars(config).get(name) for config in self.configs for name in names)
        return next((value for value in values if value is not None), None)


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments that `model` can most likely be called with: batch 1, 8 tokens, the config's image size.

    Tensors are on the model's device (meta included), floats in its dtype. `use_cache=False` is among them where the
    forward takes it.

    Raises:
        CaptureError: when the inputs do not follow from a transformers config; names what the forward takes.
    """
    return next(candidates(model))


def candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Inputs worth a try for `example_inputs`, the likeliest first; at least one.

    Raises:
        CaptureError: as `example_inputs`.
    """
    facts = _facts(model)
    takes = [name for name, p in facts.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [name for name in takes if facts.parameters[name].default is inspect.Parameter.empty]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in facts.parameters.values())
    main = getattr(model, "main_input_name", None)
    if isinstance(main, str) and (main in takes or takes_any):
        needed.append(main)
    if facts.find("is_encoder_decoder") and "decoder_input_ids" in takes:
        needed.append("decoder_input_ids")
    if not needed or any(name not in _SHAPES for name in needed) or not facts.configs:
        raise CaptureError(
            f"example inputs for {type(model).__name__} do not follow from a config: its forward takes "
            f"{', '.join(takes) or 'no named argument'}\n  pass example_inputs={{...}}, or a tensor"
        )
    # Some models need what their forward calls optional: their other modalities, or masks.
    wider = [[name for name in takes if name in needed or name in more] for more in (_MODALITIES, _MASKS)]
    extra = {"use_cache": False} if "use_cache" in takes else {}
    sets = dict.fromkeys(tuple(dict.fromkeys(names)) for names in (needed, *wider))
    found = itertools.chain.from_iterable(_choices(facts, names) for names in sets)
    for inputs in itertools.islice(found, _MOST_CANDIDATES):
        yield inputs | extra


def _facts(model: nn.Module) -> _Model:
    config = getattr(model, "config", None)
    configs = [config] if hasattr(config, "model_type") else []
    for outer in configs:
        configs += [value for value in vars(outer).values() if hasattr(value, "model_type")]
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    facts = _Model(dict(inspect.signature(model.forward).parameters), configs, device, dtype, 0)
    return _Model(facts.parameters, configs, device, dtype, _number(facts.find("vocab_size"), 32))


def _choices(facts: _Model, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for shapes in itertools.product(*(_SHAPES[name](facts) for name in names)):
        yield {name: _tensor(facts, name, shape) for name, shape in zip(names, shapes, strict=True)}


def _tensor(facts: _Model, name: str, shape: tuple[int, ...]) -> Tensor:
    if name in _INTEGERS:
        value = _INTEGERS[name](facts, shape)
        return value.to(facts.device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(facts.device, facts.dtype)


def _plain_tokens(facts: _Model, shape: tuple[int, ...]) -> Tensor:
    special = {
        value
        for config in facts.configs
        for name, value in vars(config).items()
        if isinstance(value, int) and name.endswith(("token_id", "token_index"))
    }
    plain = (token for token in itertools.count(1) if token not in special)
    tokens = torch.tensor(list(itertools.islice(plain, math.prod(shape))))
    return tokens.remainder(facts.vocabulary).reshape(shape)


def _ones(_: _Model, shape: tuple[int, ...]) -> Tensor:
    return torch.ones(shape, dtype=torch.int64)


def _zeros(_: _Model, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


_Shapes = list[tuple[int, ...]]


def _sequence(_: _Model) -> _Shapes:
    return [(1, _TOKENS)]


def _token_sequence(facts: _Model) -> _Shapes:
    # Audio models read one token per codebook at a time, in the batch or in the last dimension.
    books = facts.find("num_codebooks")
    return [(1, _TOKENS), *([(books, _TOKENS), (1, _TOKENS, books)] if books else [])]


def _boxes(_: _Model) -> _Shapes:
    return [(1, _TOKENS, 4)]


def _embeddings(facts: _Model) -> _Shapes:
    return [(1, _TOKENS, _number(facts.find("hidden_size", "d_model", "n_embd"), 64))]


def _images(facts: _Model) -> _Shapes:
    channels = _number(facts.find("num_channels", "in_channels", "in_chans"), 3)
    height, width = _pair(facts.find("image_size", "img_size", "crop_size", "pretrain_image_size"), 224)
    frames = facts.find("num_frames", "frames_per_clip")
    image: tuple[int, ...] = (1, channels, height, width)
    video: _Shapes = [(1, _number(frames, 2), channels, height, width)]
    # A tube of patches spans frames: such a model takes a video, never an image.
    tubes = facts.find("tubelet_size") is not None
    return video if tubes else [image, *(video if frames else [])]


def _spectrograms(facts: _Model) -> _Shapes:
    bins = facts.find("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim", "mel_bins")
    bins, positions = _number(bins, 80), facts.find("max_source_positions")
    frames = facts.find("max_length") if facts.find("frequency_stride") else None
    timed = (1, 2 * _number(positions, 64), bins) if frames is None else (1, _number(frames, 128), bins)
    channelled = (1, bins, timed[1])
    # Whisper and its kin count positions after a convolution of stride 2, over [bins, frames].
    whisper = positions and facts.find("num_mel_bins")
    return [*([channelled, timed] if whisper else [timed, channelled]), (1, *timed)]


def _waves(facts: _Model) -> _Shapes:
    if facts.find("frequency_stride") is not None:
        return _spectrograms(facts)
    hop = math.prod(facts.find("conv_stride", "upsampling_ratios", "downsampling_ratios") or [320])
    samples = 16 * hop + 400
    return [(1, samples), (1, _number(facts.find("audio_channels"), 1), samples)]


def _series(facts: _Model) -> _Shapes:
    steps = _number(facts.find("context_length"), 32)
    return [(1, steps, _number(facts.find("num_input_channels", "input_size"), 1)), (1, steps)]


_SHAPES: dict[str, Callable[[_Model], _Shapes]] = {
    "input_ids": _token_sequence,
    "decoder_input_ids": _sequence,
    "attention_mask": _sequence,
    "decoder_attention_mask": _sequence,
    "token_type_ids": _sequence,
    "position_ids": _sequence,
    "bbox": _boxes,
    "inputs_embeds": _embeddings,
    "hidden_states": _embeddings,
    "encoder_hidden_states": _embeddings,
    "pixel_values": _images,
    "pixel_values_videos": _images,
    "input_features": _spectrograms,
    "input_values": _waves,
    "past_values": _series,
}
_INTEGERS: dict[str, Callable[[_Model, tuple[int, ...]], Tensor]] = {
    "input_ids": _plain_tokens,
    "decoder_input_ids": _plain_tokens,
    "attention_mask": _ones,
    "decoder_attention_mask": _ones,
    "token_type_ids": _zeros,
    "position_ids": lambda _, shape: torch.arange(shape[-1]).expand(shape),
    "bbox": _zeros,
}
_MASKS = frozenset({"attention_mask", "decoder_attention_mask"})
_MODALITIES = frozenset({"input_ids", "pixel_values", "input_features", "input_values"})


def _number(value: Any, default: int) -> int:
    if isinstance(value, (list, tuple)):
        value = value[0] if value else default
    return value if isinstance(value, int) else default


def _pair(value: Any, default: int) -> tuple[int, int]:
    if isinstance(value, dict):
        value = (value.get("height", default), value.get("width", default))
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return int(value[0]), int(value[1])
    size = _number(value, default)
    return size, size
