"""How functions become ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def define(
    library: torch.library.Library,
    function: Callable[..., Tensor],
    fake: Callable[..., Tensor],
) -> None:
    """Make a function an op of its name, without `torch.library.custom_op`, which adds two calls in Python to each.

    Args:
        library: where the op is defined.
        function: annotated as `torch.library.infer_schema` wants it; it changes no argument, and returns none.
        fake: gives an empty result.
    """
    schema, name = torch.library.infer_schema(function, mutates_args=()), function.__name__
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    # What Dynamo finds running in a compiled region, it would compile.
    library.impl(name, torch.compiler.disable(function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)


def with_autocast(op: Callable[..., Any]) -> Callable[..., Any]:
    """Under autocast only x takes the lower dtype: the library's own rule would round scales and codes as well."""

    def call(x: Tensor, *rest: Any) -> Any:
        device = x.device.type
        with torch.autocast(device, enabled=False):
            if x.is_floating_point() and x.dtype != torch.float64:
                x = x.to(torch.get_autocast_dtype(device))
            return op(x, *rest)

    return call
