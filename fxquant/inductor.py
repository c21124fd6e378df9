"""The private torch APIs that fxquant uses, each with the versions it was checked on. Nothing else imports them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import fx


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
