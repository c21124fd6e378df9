"""`torch.compile(model, backend="fxquant")`: plain `torch.compile`, with graph passes before Inductor.

The backend is found through the `torch_dynamo_backends` entry point: nothing needs to be imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from fxquant.inductor import compile_graph
from fxquant.passes import COMPILE
from fxquant.rewrite import Pass, rewrite

_PASSES = "passes"


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrite the graph that Dynamo gives, then compile it with Inductor.

    Args:
        gm: the graph; changed in place.
        example_inputs: fake or real inputs, as Dynamo gives them.
        mode: as for `torch.compile`.
        options: Inductor's options, and `"passes"`: the passes to run instead of `fxquant.passes.COMPILE`.

    Returns:
        The compiled function.

    Raises:
        RewriteError: when a pass fails or leaves the graph illegal.
    """
    given = dict(options or {})
    passes: Sequence[Pass] = given.pop(_PASSES, COMPILE)
    rewrite(gm, passes=passes)
    return compile_graph(gm, example_inputs, mode, given)
