"""GGUF files: config, tokenizer, quantized matrices and plain tensors of a transformers model, and the way back.

The package of this name on the index, which is used here, is `gguf`; this one is `fxquant.gguf`.
"""

from fxquant.gguf.configs import gguf_config
from fxquant.gguf.descriptions import GgufDescription, gguf_metadata
from fxquant.gguf.files import GgufFile, open_gguf
from fxquant.gguf.fits import gguf_fit
from fxquant.gguf.header import GgufTensor
from fxquant.gguf.models import MODELS
from fxquant.gguf.tokenizers import gguf_tokenizer
from fxquant.gguf.types import gguf_rows, gguf_type
from fxquant.gguf.units import GgufTensors, gguf_tensors
from fxquant.gguf.weights import PlainTensor, gguf_plain, gguf_weights
from fxquant.gguf.writing import GgufData, GgufSpec, gguf_blocks, gguf_data, gguf_header, write_gguf

__all__ = [
    "MODELS",
    "GgufData",
    "GgufDescription",
    "GgufFile",
    "GgufSpec",
    "GgufTensor",
    "GgufTensors",
    "PlainTensor",
    "gguf_blocks",
    "gguf_config",
    "gguf_data",
    "gguf_fit",
    "gguf_header",
    "gguf_metadata",
    "gguf_plain",
    "gguf_rows",
    "gguf_tensors",
    "gguf_tokenizer",
    "gguf_type",
    "gguf_weights",
    "open_gguf",
    "write_gguf",
]
