"""GGUF files: config, tokenizer, quantized matrices and plain tensors of a transformers model, and the way back.

The package of this name on the index, which is used here, is `gguf`; this one is `fxquant.gguf`.
"""

from fxquant.gguf.configs import gguf_config
from fxquant.gguf.files import GgufFile, open_gguf
from fxquant.gguf.header import GgufTensor
from fxquant.gguf.models import MODELS
from fxquant.gguf.tokenizers import gguf_tokenizer
from fxquant.gguf.weights import PlainTensor, gguf_plain, gguf_weights
from fxquant.gguf.writing import GgufData, gguf_blocks, gguf_data, write_gguf

__all__ = [
    "MODELS",
    "GgufData",
    "GgufFile",
    "GgufTensor",
    "PlainTensor",
    "gguf_blocks",
    "gguf_config",
    "gguf_data",
    "gguf_plain",
    "gguf_tokenizer",
    "gguf_weights",
    "open_gguf",
    "write_gguf",
]
