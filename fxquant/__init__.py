"""Quantize PyTorch models by rewriting their graph: `quantize(model, recipe)`, then `torch.compile`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxquant.api import capture as capture
    from fxquant.api import dequantize as dequantize
    from fxquant.api import history as history
    from fxquant.api import plan as plan
    from fxquant.api import quantize as quantize
    from fxquant.api import report as report
    from fxquant.conversion import convert as convert
    from fxquant.errors import FxquantError as FxquantError
    from fxquant.experts import ExpertsAdapter as ExpertsAdapter
    from fxquant.experts import Projection as Projection
    from fxquant.experts import register_experts as register_experts
    from fxquant.inspection import inspect as inspect
    from fxquant.integrations.transformers import FxQuantConfig as FxQuantConfig
    from fxquant.loading import load as load
    from fxquant.model_files import save as save
    from fxquant.recipe import Recipe as Recipe
    from fxquant.rule import Rule as Rule
    from fxquant.scheme import Scheme as Scheme

_HOMES = {
    **dict.fromkeys(("capture", "dequantize", "history", "plan", "quantize", "report"), "api"),
    **dict.fromkeys(("ExpertsAdapter", "Projection", "register_experts"), "experts"),
    "convert": "conversion",
    "FxQuantConfig": "integrations.transformers",
    "FxquantError": "errors",
    "inspect": "inspection",
    "load": "loading",
    "save": "model_files",
    "Recipe": "recipe",
    "Rule": "rule",
    "Scheme": "scheme",
}
"""The public names, and the modules that they are made in."""

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `fxquant --help` and tracebacks must not wait for torch."""
    if name == "__version__":
        from importlib.metadata import version

        return version("fxquant")
    if name in _HOMES:
        return getattr(importlib.import_module(f"fxquant.{_HOMES[name]}"), name)
    if name in ("passes", "rewrite", "patterns", "dataflow"):  # what writers of passes need
        return importlib.import_module(f"fxquant.{name}")
    raise AttributeError(f"module 'fxquant' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted({*globals(), *__all__, "passes", "rewrite", "patterns", "dataflow"})
