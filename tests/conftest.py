"""Settings for all tests: no network, one thread a process, and no deadlines on a shared machine."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")


@pytest.fixture(scope="session")
def measured():
    """The package that writes docs/results.md, which is not installed."""
    docs = str(Path(__file__).resolve().parent.parent / "docs")
    sys.path.insert(0, docs)
    try:
        return importlib.import_module("measured")
    finally:
        sys.path.remove(docs)
