"""The rewrites that fxquant ships, and the order in which they run. One file per graph shape, never per format."""

if __name__ != "fxquant.passes":
    raise ImportError(f"import fxquant.passes, not {__name__}: this folder is installed inside the fxquant package")

from fxquant.passes.drop_noops import DropNoops
from fxquant.passes.experts_to_quantized import ExpertsToQuantized
from fxquant.passes.linear_to_quantized import LinearToQuantized
from fxquant.passes.merge_siblings import MergeSiblings
from fxquant.passes.sequentialize_experts import SequentializeExperts
from fxquant.passes.share_activation_quant import ShareActivationQuant
from fxquant.rewrite import Pass

DEFAULT: tuple[Pass, ...] = (
    DropNoops(),  # first: siblings are recognised by reading one node, and a cast to the same dtype would hide that
    LinearToQuantized(),  # the step that the plan is for
    ExpertsToQuantized(),  # and the same for stacks of experts
    MergeSiblings(),  # it works on the ops that the step before makes
    ShareActivationQuant(),  # last: linears that are one call share everything already
)
"""What `quantize` runs over the captured graph."""

COMPILE: tuple[Pass, ...] = (
    DropNoops(),
    MergeSiblings(),  # here the quantized ops are there from the start: Dynamo looks into QLinear.forward
    ShareActivationQuant(),
)
"""What `torch.compile(model, backend="fxquant")` runs over the graph that Dynamo gives it."""

__all__ = [
    "COMPILE",
    "DEFAULT",
    "DropNoops",
    "ExpertsToQuantized",
    "LinearToQuantized",
    "MergeSiblings",
    "SequentializeExperts",
    "ShareActivationQuant",
]
