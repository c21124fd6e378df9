"""The tokenizer that a GGUF file holds."""

from __future__ import annotations

from typing import Any

from fxquant.errors import FileError
from fxquant.gguf.files import GgufFile
from fxquant.pretrained import as_file_error

_TOKENS = "tokenizer.ggml.tokens"


def gguf_tokenizer(file: GgufFile) -> Any:
    """The tokenizer of a file, as transformers makes it: by what the file says, without its loader for models.

    Raises:
        FileError: the file holds none, or one that transformers cannot make.
    """
    import transformers

    tokens = file.metadata.get(_TOKENS)
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise FileError(f"{file.path} holds no tokenizer: {_TOKENS} is missing, or no list of strings")
    # from_pretrained would take a tokenizer.json that lies beside the file, and leave out its special tokens
    kind: Any = transformers.PreTrainedTokenizerFast
    with as_file_error(f"cannot make the tokenizer of {file.path}"):
        return kind(name_or_path=str(file.path.parent), gguf_file=file.path.name, local_files_only=True)
