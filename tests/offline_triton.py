"""What Triton makes of generated kernels without a GPU: machine code for several of them, and results on the CPU."""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from emulated_cuda import Generated, reads_weights
from torch import Tensor

BLOCKS = {"XBLOCK": 64, "YBLOCK": 16, "R0_BLOCK": 64}
"""Of kernels that Inductor would otherwise tune."""


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one GPU."""

    name: str
    capability: int
    registers: int
    spilled: int
    shared: int
    ptx: str
    tuned: tuple[int, ...]
    """Warps and stages."""

    def count(self, pattern: str) -> int:
        """How often PTX has this."""
        return len(re.findall(pattern, self.ptx))


def _module(name: str, code: str, folder: Path) -> types.ModuleType:
    """The kernel's module. Triton reads sources back from a file."""
    path = folder / f"{name}.py"
    path.write_text(code)
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    exec(compile(code, str(path), "exec"), module.__dict__)
    return module


def compile_kernels(generated: Generated, capabilities: Sequence[int], folder: Path) -> list[Compiled]:
    """Every kernel that reads a weight, in its first configuration, by the assembler that comes with Triton.

    Triton must have been told to print what the assembler says and to use no cache: `TRITON_DUMP_PTXAS_LOG=1` and
    `TRITON_ALWAYS_COMPILE=1`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = []
    for name, code in generated.kernels.items():
        if not reads_weights(code):
            continue
        tuner = getattr(_module(name, code, folder), name)
        fn, config = tuner.fn, tuner.configs[0]
        constants = {key: value for key, value in config.kwargs.items() if key in fn.arg_names}
        signature = {k: "constexpr" if k in constants else v for k, v in tuner.triton_meta["signature"].items()}
        attributes = {key: value for part in tuner.triton_meta["configs"] for key, value in part.items()}
        by_place = {(fn.arg_names.index(key),): value for key, value in constants.items()}
        for capability in capabilities:
            log = io.StringIO()
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            with contextlib.redirect_stdout(log):
                built = triton.compile(
                    ASTSource(fn, signature, by_place, attributes),
                    target=GPUTarget("cuda", capability, 32),
                    options=options,
                )
            text = log.getvalue()
            spills = [int(n) for n in re.findall(r"(\d+) bytes spill", text)]
            registers = re.search(r"Used (\d+) registers", text)
            assert registers, f"the assembler said nothing about {name}: {text}"
            used = (int(registers[1]), sum(spills), built.metadata.shared)
            found.append(Compiled(name, capability, *used, built.asm["ptx"], (config.num_warps, config.num_stages)))
    return found


class _Interpreted:
    """A kernel that Triton's interpreter runs, in the place of one that would be launched."""

    def __init__(self, name: str, code: str, folder: Path) -> None:
        import torch._inductor.runtime.triton_heuristics as heuristics

        self.meta: dict[str, Any] = {}

        def keep(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
            self.meta.update(kwargs.get("inductor_meta", {}))
            return lambda fn: fn

        # The interpreter has no libdevice. What is rounded is less than 2**22.
        code = re.sub(r"libdevice\.(exp|sqrt|rsqrt)\(", r"tl.\1(", code)
        code = re.sub(r"libdevice\.nearbyint\((\w+)\)", r"((\1 + 12582912.0) - 12582912.0)", code)
        code = code.replace("triton_helpers.max2(", "tl.max(")  # which it would do number by number
        code = re.sub(r"libdevice\.isnan\((\w+)\)", r"(\1 != \1)", code)
        kinds = ("template", "pointwise", "reduction", "persistent_reduction")
        with mock.patch.multiple(heuristics, **dict.fromkeys(kinds, keep)):
            self.fn = getattr(_module(name, code, folder), name)

    def run(self, *args: Any, stream: Any = None) -> None:
        names = list(self.fn.arg_names)
        blocks = {name: size for name, size in BLOCKS.items() if name in names}
        plain = [name for name in names if name not in blocks]
        grid = tuple(args[len(plain) :]) or self._grid(dict(zip(plain, args, strict=True)))
        self.fn[grid](*args[: len(plain)], **blocks)

    def _grid(self, args: dict[str, Any]) -> tuple[int, ...]:
        sizes = [(args.get(f"{axis}numel"), BLOCKS[f"{axis.upper()}BLOCK"]) for axis in "xy"]
        return tuple(math.ceil(count / block) for count, block in sizes if count is not None)


def _teach_small_floats() -> None:
    """Triton's interpreter keeps bfloat16 as its bits, which it multiplies as integers and truncates to, not rounds.

    To float8 it truncates as well.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_cast, plain_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    plain_convert = InterpreterBuilder.create_fp_to_fp
    if plain_dot.__module__ == __name__:
        return

    def wide(handle: Any) -> Any:
        return plain_cast(builder, handle, tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle

    def cast_impl(self: Any, source: Any, wanted: Any) -> Any:
        if wanted.scalar != tl.bfloat16 or source.dtype.scalar == tl.bfloat16:
            return plain_cast(self, wide(source), wanted)
        numbers = torch.from_numpy(plain_cast(self, source, tl.float32).data)
        bits = numbers.to(torch.bfloat16).view(torch.int16).numpy().view("uint16")
        return TensorHandle(bits, tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, wide(a), wide(b), *rest)

    def create_fp_to_fp(self: Any, source: Any, wanted: Any, rounding: Any) -> Any:
        if wanted.scalar != tl.float8e4nv:
            return plain_convert(self, source, wanted, rounding)
        rounded = torch.from_numpy(source.data).to(torch.float8_e4m3fn)
        return TensorHandle(rounded.view(torch.uint8).numpy(), tl.float8e4nv)

    builder = InterpreterBuilder()
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def _poisoned(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    empty = torch.empty_strided(size, stride, dtype=dtype)
    return empty.fill_(math.nan) if dtype.is_floating_point else empty.fill_(101)


def interpret(generated: Generated, inputs: Sequence[Tensor], folder: Path) -> list[Tensor]:
    """Run the module on CPU tensors, its kernels in Triton's interpreter: `TRITON_INTERPRET=1` must have been set.

    All memory that the module allocates is full of nan.
    """
    from torch._inductor.async_compile import AsyncCompile

    def triton(self: Any, name: str, code: str, device_str: str) -> _Interpreted:
        return _Interpreted(name, code, folder)

    _teach_small_floats()
    source = re.sub(r"^empty_strided_cuda = .*$", "empty_strided_cuda = poisoned", generated.source, flags=re.M)
    space: dict[str, Any] = {"__name__": "generated", "poisoned": _poisoned}
    with mock.patch.multiple(AsyncCompile, triton=triton, wait=lambda self, scope: None):
        exec(source, space)
    space.update(generated.constants)
    return list(space["call"](list(inputs)))
