"""Guarded healing as an arm of a study: settings read, lessons built from the corpus, one healed artifact written."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from deltakeeper.errors import DataError
from deltakeeper.lab.corpus import Corpus
from deltakeeper.study.plan import FineTune
from deltakeeper.study.variants import Variant

HEALING_RULE = "1"


def read_guard(settings: Mapping[str, Any]) -> Any:
    """Settings of guarded healing; raises DataError where one is unknown."""
    return _room("deltakeeper.lab.guarding").read_guard(settings)


def lessons_identity(finetune: FineTune, corpus: Corpus) -> Any:
    """What the lessons of a fine-tune's healing depend on, besides base, fine-tune and settings."""
    return [row.prompt for name in ("harmful", "tickets", "instructions") for row in corpus.split(name, "train")]


def heal_under_guard(
    finetune: FineTune, variant: Variant, corpus: Corpus, base: Path, tuned: Path, plain: Path, out: Path
) -> None:
    """Write the healed form of the artifact `plain` to `out`."""
    raise DataError("guarded healing is not part of this release; take the arm out of the study.")


def _room(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise DataError("guarded healing is not part of this release; take the arm out of the study.") from error
