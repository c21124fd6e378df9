"""How weights are stored: frozen data and its spelling. No tensors are made here.

A scheme is an element (what one code means), a block (which weights share a scale), the type of the scales (of one or
two levels), the kind of zero point, what is done to columns, and what happens to the input. All else follows from it:
which planes there are, their shapes, dtypes and bytes. The weight of a linear is `[N, K]`: N output features (rows), K
input features.

    int4        int4-g64-asym   int8-g128       nf4-dq      fp8-b128x128    mxfp4       q4_k        int8+int8
"""

from fxquant.scheme.activations import Activation
from fxquant.scheme.blocks import ROW, TENSOR, Block
from fxquant.scheme.elements import ELEMENTS, Element, Vectors, element, table_name
from fxquant.scheme.names import NAMES
from fxquant.scheme.planes import DOUBLE_QUANT_BLOCK, PlaneSpec
from fxquant.scheme.scale_types import FLOAT_SCALES, SCALE_TYPES, Outer, ScaleType
from fxquant.scheme.scheme import Scheme, Zero
from fxquant.scheme.spelling import COLUMNS, ZEROS, default_block
from fxquant.scheme.tables import FP4, NF4, dynamic_values

__all__ = [
    "COLUMNS",
    "DOUBLE_QUANT_BLOCK",
    "ELEMENTS",
    "FLOAT_SCALES",
    "FP4",
    "NAMES",
    "NF4",
    "ROW",
    "SCALE_TYPES",
    "TENSOR",
    "ZEROS",
    "Activation",
    "Block",
    "Element",
    "Outer",
    "PlaneSpec",
    "ScaleType",
    "Scheme",
    "Vectors",
    "Zero",
    "default_block",
    "dynamic_values",
    "element",
    "table_name",
]
