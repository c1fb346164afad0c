"""lm-evaluation-harness, imported when it is wanted, without network where only files are read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from deltakeeper.errors import DataError

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_EVALUATE_OFFLINE")


def load_harness(*, offline: bool) -> Any:
    """The package `lm_eval`.

    Args:
        offline: keep the libraries that it imports from asking the network. They read this when they are first
            imported, so it binds the whole process; those that are there already stay as they are.

    Raises:
        DataError: it is not installed.
    """
    before = {name: os.environ.get(name) for name in _OFFLINE}
    if offline:
        os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    try:
        package = import_module("lm_eval")
        for part in ("tasks", "evaluator", "api.task"):
            import_module(f"lm_eval.{part}")
    except ImportError as error:
        raise DataError(
            f"benchmarks need lm-evaluation-harness ({error}); run pip install 'deltakeeper[eval]'."
        ) from error
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    return package


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of lm-evaluation-harness and of datasets, which know nothing of ours."""
    import datasets  # type: ignore[import-untyped]
    from lm_eval.api import task

    bars, shown = task.tqdm, datasets.is_progress_bar_enabled()
    task.tqdm = lambda rows, **_: rows
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        task.tqdm = bars
        if shown:
            datasets.enable_progress_bars()
