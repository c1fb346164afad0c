"""Runs of many fine-tunes are built by `tests/study/study_runs.py`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "study"))


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    from deltakeeper.advice import evidence, gaps

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(evidence._SETTINGS, "resamples", 300)
        patch.setattr(gaps, "RESAMPLES", 300)
        yield
