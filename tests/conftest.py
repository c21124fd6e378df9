"""What all tests share: no network, a terminal of a known width, one thread per worker, and what they start from."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator

os.environ["COLUMNS"] = "160"  # tables are as wide as the terminal, and workers have none
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # as many workers as cores: more threads would only get in each other's way


def _built(library: Callable[[], object | None]) -> None:
    """Skips where there is no compiler; where there is one, what it cannot compile is an error."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        built = library()
    if built is None:
        reason = "\n".join(str(warning.message) for warning in said) or "it could not be compiled before"
        if shutil.which(os.environ.get("CXX", "g++")):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def compiled_codecs() -> None:
    """Skips where nothing can be compiled."""
    from fxquant.native import library

    _built(library.library)


@pytest.fixture(scope="module")
def compiled_products() -> None:
    """Skips where nothing can be compiled."""
    from fxquant.native import matmul

    _built(matmul.library)


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
