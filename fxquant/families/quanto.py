"""optimum-quanto's checkpoints."""

from __future__ import annotations

import functools

import torch

from fxquant.checkpoint_files import CheckpointFiles
from fxquant.checkpoints import planes_of_quanto
from fxquant.checkpoints.stored import Piece, StoredWeight
from fxquant.families.settings import Settings, configured
from fxquant.families.tensors import check_left_out, modules, require, without

SIDE_FILE = "quanto_qmap.json"
ANCHORS = ("weight._data", "weight._data._data")
SUFFIXES = (*ANCHORS, "weight._scale", "weight._shift", "input_scale", "output_scale")
QTYPES = ("qint8", "qint4", "qint2", "qfloat8", "qfloat8_e4m3fn", "qfloat8_e5m2")
_PLAIN = {torch.int8: "qint8", torch.float8_e4m3fn: "qfloat8_e4m3fn", torch.float8_e5m2: "qfloat8_e5m2"}


def weights(files: CheckpointFiles) -> list[StoredWeight]:
    """Every weight with `_data`, of the type that the map, the config or else the tensors give.

    Raises:
        CheckpointError: settings that contradict the tensors, or a module that lacks one.
    """
    side = files.json(SIDE_FILE)
    listed = Settings(".", {SIDE_FILE: side}).inners(SIDE_FILE) if side is not None else {}
    settings = configured(files)
    found = modules(files, SUFFIXES, ANCHORS)
    if settings is not None:
        check_left_out(settings, settings.names("modules_to_not_convert"), found)
    result = []
    for module, pieces in found.items():
        require(module, pieces, "weight._scale", *(("weight._shift",) if ANCHORS[1] in pieces else ()))
        qtype = _qtype(files, pieces, listed.get(module), settings)
        read = functools.partial(planes_of_quanto, qtype=qtype)
        other = ANCHORS[1] if ANCHORS[0] in pieces else ANCHORS[0]
        result.append(StoredWeight(module, without(pieces, other), read))
    return result


def _qtype(files: CheckpointFiles, pieces: dict[str, Piece], entry: Settings | None, config: Settings | None) -> str:
    """What a module's codes are: by its tensors, or among what those may be, as the settings say.

    Raises:
        CheckpointError: the settings say something else, or nothing where it would take them.
    """
    possible = _possible(files, pieces)
    settings = entry or config or Settings(SIDE_FILE, {})
    said = settings.get("weights")
    if said is None and len(possible) == 1:
        return possible[0]
    wanted = said if isinstance(said, str) and said.startswith("q") else f"q{said}"
    for qtype in possible:
        if wanted in QTYPES and qtype.startswith(wanted):
            return qtype
    raise settings.error(f"weights are {str(said)[:20]!r}, and the tensors may be {' or '.join(possible) or 'nothing'}")


def _possible(files: CheckpointFiles, pieces: dict[str, Piece]) -> tuple[str, ...]:
    if ANCHORS[0] in pieces:
        dtype = files.headers[pieces[ANCHORS[0]].name].dtype
        return (_PLAIN[dtype],) if dtype in _PLAIN else ()
    rows = files.headers[pieces[ANCHORS[1]].name].shape[:1]
    groups = torch.Size(files.headers[pieces["weight._scale"].name].shape).numel()
    # The last byte may be half empty: up to two groups, the sizes do not tell.
    return tuple(qtype for qtype, per_byte in (("qint4", 2), ("qint2", 4)) if rows == (-(-groups // per_byte),))
