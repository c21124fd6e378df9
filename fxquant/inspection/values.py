"""The numbers in a checkpoint: what is not finite, what is zero that should not be. Read piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fxquant.checkpoint_files import octets
from fxquant.checkpoints import planes_of_gguf
from fxquant.errors import FileError
from fxquant.gguf import GgufTensor
from fxquant.gguf.files import FLOAT_TYPES
from fxquant.inspection.opening import Header
from fxquant.scheme import SCALE_TYPES, Scheme

_CHUNK = 1 << 25
"""Bytes that are read at once."""
_NUMBERS = 1 << 22
"""Numbers that are looked at at once."""
_NOT_FINITE = "holds nan or inf: "


def faults_of_planes(scheme: Scheme, planes: Mapping[str, Tensor]) -> tuple[str, str]:
    """What is wrong with the numbers of a quantized matrix, as a sentence; and what is strange, and may be meant so.

    Each is empty where there is nothing.
    """
    for name, plane in planes.items():
        bad = _not_finite(_as_floats(scheme, name, plane))
        if bad:
            return f"{_NOT_FINITE}{bad} of {plane.numel()} {name}", ""
    zeros, total = _zero_scales(scheme, planes)
    if total and zeros == total:
        return f"all scales are 0: {total} are, and so are its weights", ""
    return "", f"{zeros} of {total} scales are 0, and so are their weights" if zeros else ""


def _as_floats(scheme: Scheme, name: str, plane: Tensor) -> Tensor:
    """The numbers that a plane stands for, as far as they can be other than finite; else nothing."""
    if plane.is_floating_point():
        return plane
    kind, spec = SCALE_TYPES[scheme.scale], scheme.spec
    if name == "codes" and spec.float_dtype is not None and spec.dtype is not None:
        return plane.view(spec.float_dtype)
    if name in ("scales", "biases") and kind.pattern is not None:
        return plane.view(kind.pattern)
    if name == "scales" and kind.kind == "power":
        return plane.view(torch.float8_e8m0fnu)
    return torch.empty(0)


def _zero_scales(scheme: Scheme, planes: Mapping[str, Tensor]) -> tuple[int, int]:
    """Scales that are 0, of how many; of two levels, of the second. Of none where they cannot be, or may well be."""
    plane = planes["scale_scales"] if scheme.outer is not None else planes["scales"]
    if scheme.zero == "bias" or scheme.double or SCALE_TYPES[scheme.scale].kind == "power":
        return 0, 0
    values = plane if scheme.outer is not None else _as_floats(scheme, "scales", plane)
    patterns = values.view(torch.uint8) & 0x7F if values.dtype.itemsize == 1 else values
    return values.numel() - int(torch.count_nonzero(patterns)), values.numel()


def fault_of_tensor(header: Header) -> str:
    """What is wrong with the numbers of a tensor of floats, as a sentence; empty where nothing is.

    Raises:
        FileError: it cannot be read.
        CheckpointError: a quantized tensor of GGUF is not what its type says.
    """
    if isinstance(header, GgufTensor) and header.type_name not in FLOAT_TYPES:
        return next((fault for rows in _blocks(header) if (fault := _fault_of_rows(header, rows))), "")
    dtype = FLOAT_TYPES[header.type_name] if isinstance(header, GgufTensor) else header.dtype
    if not dtype.is_floating_point:
        return ""
    bad = sum(_not_finite(part.view(dtype)) for part in _parts(header, _CHUNK))
    return f"{_NOT_FINITE}{bad} of {header.nbytes // dtype.itemsize} numbers" if bad else ""


def _not_finite(values: Tensor) -> int:
    """How many numbers are nan or inf."""
    # in parts: what is made to look at them is larger than they are
    return sum(map(_bad, values.reshape(-1).split(_NUMBERS))) if values.numel() else 0


def _bad(part: Tensor) -> int:
    # counting takes far longer than to see that there is nothing to count
    if part.dtype.itemsize > 1:
        sound = all(bool(extreme.isfinite()) for extreme in torch.aminmax(part))
        return 0 if sound else int((~torch.isfinite(part)).sum())
    largest = torch.tensor(torch.finfo(part.dtype).max).to(part.dtype).view(torch.uint8)
    patterns = part.view(torch.uint8)
    # the patterns of a sign are in the order of magnitudes; e8m0 has no sign
    magnitudes = patterns if part.dtype is torch.float8_e8m0fnu else patterns & 0x7F
    return 0 if bool(magnitudes.amax() <= largest) else int((magnitudes > largest).sum())


def _blocks(header: GgufTensor) -> Iterator[Tensor]:
    row = header.nbytes // max(1, torch.Size(header.shape[:-1]).numel())
    for part in _parts(header, max(1, _CHUNK // row) * row):
        yield part.view(-1, row)


def _fault_of_rows(header: GgufTensor, rows: Tensor) -> str:
    scheme, planes = planes_of_gguf(rows, header.type_name, len(rows), header.shape[-1])
    fault = faults_of_planes(scheme, planes)[0]
    return fault if fault.startswith(_NOT_FINITE) else ""  # tables may well have rows of zeros


def _parts(header: Header, size: int) -> Iterator[Tensor]:
    """The bytes of a tensor, so many at a time.

    Raises:
        FileError: the file cannot be read, or has become shorter.
    """
    left = header.nbytes
    try:
        with header.file.open("rb", buffering=0) as file:
            file.seek(header.offset)
            while left:
                part = torch.empty(min(size, left), dtype=torch.uint8)
                data = octets(part)
                while data:
                    count = file.readinto(data)
                    if not count:
                        raise FileError(f"{header.file} has become shorter: {left} bytes are missing")
                    data = data[count:]
                yield part
                left -= len(part)
    except OSError as error:
        raise FileError(f"cannot read {header.file}: {error.strerror or error}") from None
