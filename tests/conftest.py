"""What all tests share: no network, a terminal of a known width, and one thread per worker."""

from __future__ import annotations

import os

os.environ["COLUMNS"] = "160"  # tables are as wide as the terminal, and workers have none
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # as many workers as cores: more threads would only get in each other's way
