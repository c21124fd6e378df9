"""The compiled product reads nothing behind its tensors: each ends where a page does, and the next is out of reach."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from random_planes import random_planes
from torch import Tensor

from fxquant import native
from fxquant.native import matmul
from fxquant.scheme import Scheme

# With what K is a multiple of. Some widths end within what is decoded at once, and some where it does.
SPELLINGS = {
    "int4-row": 1, "int4-g128": 128, "int4-g32": 32, "int4-g16": 16, "nf4-g64": 64, "uint4-g32-bias": 32, "mxfp4": 32,
    "int2-g16": 16, "int3-g32": 32, "int5-g32": 32, "int6-row": 1, "int8-row": 1, "fp8-g64-fp16": 64, "q4_k": 256,
    "int4-g128+int8": 128, "int4-g32+int8": 32, "int4-row-asym+int8": 1, "int3-g32+int8": 32, "int8-row+int8": 1,
}  # fmt: skip
WIDTHS = (1, 2, 30, 130, 132, 133, 134, 256, 768)
_NO_ACCESS = 0


def at_the_end(tensor: Tensor, held: list[mmap.mmap]) -> Tensor:
    """A copy whose last byte is the last one of a page, before one that nobody may read."""
    pages = -(-tensor.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    held.append(memory)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), _NO_ACCESS):
        raise OSError("mprotect")
    start = pages * mmap.PAGESIZE - tensor.nbytes
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    return copy.copy_(tensor)


def products(spelling: str, k: int) -> None:
    """Few rows and many, and experts: as from tensors that lie anywhere."""
    scheme, n, held = Scheme.parse(spelling), 5, list[mmap.mmap]()
    planes, bias = random_planes(scheme, n, k), torch.randn(n).bfloat16()
    stacks = {name: torch.stack((plane, plane.flip(0))) for name, plane in planes.items()}
    ids = torch.tensor([[1, 0], [1, -1], [1, 2]])
    for rows in (1, 2, 3, 7, 50):
        x = torch.randn(rows, k).bfloat16()
        found = []
        for put in (lambda t: t, lambda t: at_the_end(t, held)):
            own, every = ({name: put(plane) for name, plane in some.items()} for some in (planes, stacks))
            found.append(native.linear(put(x), own, scheme, n, put(bias)))
            if rows == len(ids):
                found.append(native.experts(put(x), put(ids), every, scheme, n, None))
        some, others = found[: len(found) // 2], found[len(found) // 2 :]
        for a, b in zip(some, others, strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b), (spelling, k, rows)


def main() -> None:
    torch.manual_seed(0)
    with native.from_size(0):
        for spelling, unit in SPELLINGS.items():
            for width in WIDTHS:
                if width % unit == 0:
                    products(spelling, width)
    sys.stdout.write("nothing else was read\n")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages by Linux's numbers")
def test_nothing_behind_a_tensor_is_read() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if matmul.library() is None:
            pytest.skip("no C++ compiler")
    places = (str(Path(__file__).parent), str(Path(native.__file__).parents[2]), os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, "nothing else was read\n"), done.stderr


if __name__ == "__main__":
    main()
