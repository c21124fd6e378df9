"""Quantized checkpoints of other producers: the tensors of one linear to a scheme and its planes, bit for bit.

Every `planes_of_...(tensors, n, k, ...)` takes the tensors by their names behind the prefix of the module (`qweight`,
`weight.absmax`), the output and input features of the linear, and the settings that a config has; it gives the scheme
and the planes that `fxquant.codecs.dequantize` reads. `planes_of_gguf` takes blocks, and has an inverse. Files are not
trusted: what does not have the shape, dtype and range that it must have is refused with a `CheckpointError`.

The `tensors_of_...(scheme, planes, n, k)` are the inverses for some formats. What they hold exactly, `..._obstacles`
tell.
"""

from fxquant.checkpoints.awq import planes_of_awq, tensors_of_awq
from fxquant.checkpoints.bitnet import planes_of_bitnet
from fxquant.checkpoints.bitsandbytes import planes_of_bnb4, planes_of_bnb8
from fxquant.checkpoints.bitsandbytes_tensors import tensors_of_bnb4, tensors_of_bnb8
from fxquant.checkpoints.compressed_tensors import planes_of_compressed_tensors
from fxquant.checkpoints.compressed_tensors_tensors import tensors_of_compressed_tensors
from fxquant.checkpoints.eetq import planes_of_eetq
from fxquant.checkpoints.fp8 import planes_of_fp8
from fxquant.checkpoints.gguf_blocks import gguf_of_planes, planes_of_gguf
from fxquant.checkpoints.gguf_grids import GRIDS as GGUF_GRIDS
from fxquant.checkpoints.gguf_layouts import LAYOUTS as GGUF_LAYOUTS
from fxquant.checkpoints.gpt_oss import planes_of_gpt_oss, tensors_of_gpt_oss
from fxquant.checkpoints.gptq import planes_of_gptq, tensors_of_gptq
from fxquant.checkpoints.hqq import planes_of_hqq
from fxquant.checkpoints.mlx import planes_of_mlx
from fxquant.checkpoints.modelopt import planes_of_modelopt
from fxquant.checkpoints.quanto import planes_of_quanto
from fxquant.checkpoints.quark import planes_of_quark
from fxquant.checkpoints.source import Planes
from fxquant.checkpoints.torchao import planes_of_torchao
from fxquant.checkpoints.vectors import planes_of_aqlm, planes_of_vptq

__all__ = [
    "GGUF_GRIDS",
    "GGUF_LAYOUTS",
    "Planes",
    "gguf_of_planes",
    "planes_of_aqlm",
    "planes_of_awq",
    "planes_of_bitnet",
    "planes_of_bnb4",
    "planes_of_bnb8",
    "planes_of_compressed_tensors",
    "planes_of_eetq",
    "planes_of_fp8",
    "planes_of_gguf",
    "planes_of_gpt_oss",
    "planes_of_gptq",
    "planes_of_hqq",
    "planes_of_mlx",
    "planes_of_modelopt",
    "planes_of_quanto",
    "planes_of_quark",
    "planes_of_torchao",
    "planes_of_vptq",
    "tensors_of_awq",
    "tensors_of_bnb4",
    "tensors_of_bnb8",
    "tensors_of_compressed_tensors",
    "tensors_of_gpt_oss",
    "tensors_of_gptq",
]
