"""Runs of many fine-tunes are built by `tests/study/study_runs.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "study"))
