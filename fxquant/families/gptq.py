"""GPTQ checkpoints: of AutoGPTQ, GPTQModel, and AutoRound's export of that name."""

from __future__ import annotations

import functools
import re

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import planes_of_gptq
from fxquant.checkpoints.stored import Piece, StoredWeight
from fxquant.families.names import compiled
from fxquant.families.settings import Settings, settings_of
from fxquant.families.tensors import modules, require

SIDE_FILE = "quantize_config.json"
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
FORMATS = ("gptq", "gptq_v2", "gptq_p")
_POSITIVE, _NEGATIVE = "+:", "-:"
_PLANAR_BITS = (5, 6, 7)


def weights(files: CheckpointFiles) -> list[StoredWeight]:
    """Every `qweight`, with the settings that `dynamic` gives its module.

    Raises:
        CheckpointError: settings that contradict each other or the tensors, or that cannot be read.
    """
    settings = settings_of(files, SIDE_FILE, same=("bits", "group_size", "checkpoint_format"))
    packed = settings.text("pack_dtype", default="int32")
    if packed not in ("int32", "torch.int32"):
        raise settings.error(f"pack_dtype is {packed[:20]!r}", "codes can be read from int32")
    if settings.flag("is_marlin_format"):
        raise settings.error("is_marlin_format is true", "files that were repacked for Marlin's kernels cannot be read")
    by_gptqmodel = _by_gptqmodel(settings)
    found, dynamic = modules(files, SUFFIXES, ("qweight",)), _dynamic(settings)
    return [weight(module, found[module], _of_module(settings, dynamic, module), by_gptqmodel) for module in found]


def weight(module: str, pieces: dict[str, Piece], settings: Settings, by_gptqmodel: bool = False) -> StoredWeight:
    """The matrix of one module.

    Raises:
        CheckpointError: it lacks a tensor, or its settings cannot be read.
    """
    act_order = settings.flag("desc_act") and not settings.flag("static_groups")
    require(module, pieces, "qweight", "qzeros", "scales", *(("g_idx",) if act_order else ()))
    bits = settings.integer("bits", low=2, high=8)
    layout = settings.word("checkpoint_format", "format", known=FORMATS, default="gptq")
    # GPTQModel has these widths in planes of bits alone, whatever the config calls the format.
    if by_gptqmodel and bits in _PLANAR_BITS:
        layout = "gptq_p"
    read = functools.partial(
        planes_of_gptq,
        bits=bits,
        group_size=settings.group_size(),
        checkpoint_format=layout,
        by_gptqmodel=by_gptqmodel,
    )
    return StoredWeight(module, pieces, read)


def _by_gptqmodel(settings: Settings) -> bool:
    meta = settings.inner("meta")
    wrote = meta.get("quantizer")
    names = (wrote,) if isinstance(wrote, str) else meta.names("quantizer")
    return any(name.lower().startswith("gptqmodel") for name in names)


def _dynamic(settings: Settings) -> list[tuple[str, re.Pattern[str], Settings]]:
    """The overrides for single modules, and the regular expressions that they are for."""
    entries = settings.inner("dynamic")
    found = []
    for entry in entries.values:
        leaves_out = entry.startswith(_NEGATIVE)
        pattern = compiled(entry.removeprefix(_NEGATIVE if leaves_out else _POSITIVE))
        found.append((entry, pattern, entries if leaves_out else entries.inner(entry)))
    return found


def _of_module(settings: Settings, dynamic: list[tuple[str, re.Pattern[str], Settings]], module: str) -> Settings:
    """What holds for one module: the first entry of `dynamic` that matches from the start of its name on decides.

    Raises:
        CheckpointError: that entry leaves it out.
    """
    for entry, pattern, overrides in dynamic:
        if pattern.match(module):
            if entry.startswith(_NEGATIVE):
                raise overrides.error(f"it leaves out {entry[:80]!r}, and the files hold {module} quantized")
            return overrides.over(settings)
    return settings
