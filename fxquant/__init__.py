"""Quantize PyTorch models by rewriting their graph: `quantize(model, recipe)`, then `torch.compile`."""

from fxquant.api import capture as capture
from fxquant.api import dequantize as dequantize
from fxquant.api import history as history
from fxquant.api import plan as plan
from fxquant.api import quantize as quantize
from fxquant.api import report as report
from fxquant.errors import FxquantError as FxquantError
from fxquant.recipe import Recipe as Recipe
from fxquant.rule import Rule as Rule
from fxquant.scheme import Scheme as Scheme
