"""Checkpoints in the formats of other producers, written: schemes, tensors and config of each.

A `Writer` says which scheme every matrix gets, its own where the format holds the weights to the bit; what tensors the
files then consist of, each made from planes when it is its turn; and what `config.json` says. What is read back are the
same weights, perhaps under another scheme: symmetric codes that stood in wider fields, blocks as groups of single rows.
"""

from collections.abc import Mapping
from types import MappingProxyType

from fxquant.checkpoint_contents import Writer
from fxquant.writers.awq import WRITER_OF_AWQ
from fxquant.writers.bitsandbytes import WRITER_OF_BITSANDBYTES
from fxquant.writers.compressed_tensors import WRITER_OF_COMPRESSED_TENSORS
from fxquant.writers.gpt_oss import WRITER_OF_GPT_OSS
from fxquant.writers.gptq import WRITER_OF_GPTQ

__all__ = ["WRITERS"]

WRITERS: Mapping[str, Writer] = MappingProxyType(
    {
        "gptq": WRITER_OF_GPTQ,
        "awq": WRITER_OF_AWQ,
        "compressed-tensors": WRITER_OF_COMPRESSED_TENSORS,
        "bitsandbytes": WRITER_OF_BITSANDBYTES,
        "gpt-oss": WRITER_OF_GPT_OSS,
    }
)
"""By the names that `convert` takes."""
