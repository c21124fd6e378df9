"""The private torch APIs that fxquant uses, each with the versions it was checked on. Nothing else imports them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import fx
from torch._ops import OpOverload as OpOverload  # what aten.add.Tensor is; since torch 1.11, read in 2.11 and 2.13
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor  # the values of traced nodes; since 2.0, the same
from torch.utils import _pytree as pytree  # torch.export's own, which has no public name yet; 2.11 to 2.13

__all__ = ["FakeTensor", "OpOverload", "compile_cpp", "compile_graph", "not_traced", "pytree"]

T = TypeVar("T")


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, options: Mapping[str, Any]
) -> Callable[..., Any]:
    """What `torch.compile` does by default with a graph: AOTAutograd, then Inductor.

    `compile_fx(gm, inputs, config_patches=...)` and `list_mode_options(mode)`: read in torch 2.11, 2.13.
    """
    # Imported here: Inductor takes seconds to import, and whoever compiles nothing needs none of it.
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode not in (None, "default") else {}), **options}
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches or None)
    return cast(Callable[..., Any], compiled)


def compile_cpp(source: str, flags: Sequence[str]) -> ctypes.CDLL:
    """A library built from one C++ file, with Inductor's compiler, flags and cache, where it lies for later processes.

    `CppCodeCache.load(source, extra_flags=...)`: read in torch 2.11, 2.13. It raises whatever a compiler can fail with.
    """
    from torch._inductor.codecache import CppCodeCache

    built: Any = CppCodeCache.load(source, extra_flags=tuple(flags))
    return cast(ctypes.CDLL, built)


def not_traced(function: Callable[..., T]) -> Callable[..., T]:
    """The same function, whose own frame Dynamo does not look into; those of what it calls, it does.

    Unlike with `torch.compiler.disable(recursive=False)` a call of it takes no more time.
    `torch._dynamo.decorators.skip(fn)`: read in torch 2.11, 2.13.
    """
    from torch._dynamo.decorators import skip

    return skip(function)
