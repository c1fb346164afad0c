"""Guarded healing as an arm of a study: settings read, lessons built from the corpus, one healed artifact written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from deltakeeper.devices import working_device
from deltakeeper.errors import DataError
from deltakeeper.heal import GuardSettings, guard
from deltakeeper.lab.corpus import SYSTEM, Corpus
from deltakeeper.lab.embedded import load_model
from deltakeeper.lab.guarding import GuardData, base_answers, guard_lessons
from deltakeeper.study.plan import FineTune
from deltakeeper.study.variants import Variant
from deltakeeper.study.voices import Voices
from deltakeeper.suggestion import suggest

HEALING_RULE = "1"
T = TypeVar("T")


def read_guard(settings: Mapping[str, Any], seed: int = 0) -> tuple[GuardSettings, GuardData]:
    """Settings of guarded healing as a study spells them; what the operator has stands under `data`.

    Args:
        settings: fields of `GuardSettings`, and `data` with fields of `GuardData`.
        seed: decides what is drawn, where no seed is given.

    Raises:
        DataError: a setting is unknown, or has a value that does not fit.
    """
    own = {key: value for key, value in settings.items() if key != "data"}
    data = settings.get("data") or {}
    if not isinstance(data, Mapping):
        raise DataError("'data' of a guard must be a mapping, such as {probes: 64}; correct it.")
    return _read(GuardSettings, own, seed, "a guard"), _read(GuardData, data, seed, "the data of a guard")


def lessons_identity(finetune: FineTune, variant: Variant, corpus: Corpus) -> list[Any]:
    """What a healed delta depends on, besides base, fine-tune and plain delta."""
    settings, data = read_guard(guard_of(variant), finetune.seed)
    rows = [(row.prompt, row.twin, row.answer) for row in corpus.split("harmful", "train")]
    rows += [(row.prompt, None, row.answer) for row in corpus.split("tickets", "train")]
    rows += [(row.prompt, None, None) for row in corpus.split("instructions", "train")]
    return [settings.to_json(), data.to_json(), rows, SYSTEM]


def heal_under_guard(
    finetune: FineTune,
    variant: Variant,
    corpus: Corpus,
    base: Path,
    tuned: Path,
    plain: Path,
    out: Path,
    voices: Voices,
) -> None:
    """Write the healed form of an artifact.

    Args:
        finetune: whose delta it is; none of its training rows is among the lessons.
        variant: the arm.
        corpus: where lessons come from, training rows only.
        base: folder of the base.
        tuned: folder of the fine-tune, or of what a defence made of it.
        plain: the artifact.
        out: the artifact to write.
        voices: what the base answers.

    Raises:
        DeltakeeperError: there are too few rows, or the artifact has no values to train.
    """
    from transformers import AutoTokenizer

    settings, data = read_guard(guard_of(variant), finetune.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)

    def answers(prompts: Sequence[str], tokens: int, never: tuple[int, ...] = ()) -> list[str]:
        def ask(prompts: Sequence[str], tokens: int) -> list[str]:
            model, _ = load_model(base, torch.bfloat16, working_device())
            return base_answers(model, tokenizer)(prompts, tokens, never)

        return voices.kept(f"bfloat16, never {list(never)}", ask)(prompts, tokens)

    lessons = guard_lessons(corpus, tokenizer, None, finetune.attack, data, answers=answers)
    guard(plain, base, tuned, lessons, out, settings=settings)


def guard_of(variant: Variant) -> Mapping[str, Any]:
    """The guard's settings of an arm, as they are spelled."""
    found: Mapping[str, Any] = (variant.heal or {}).get("guard") or {}
    return found


def _read(kind: type[T], given: Mapping[str, Any], seed: int, where: str) -> T:
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise DataError(f"{where} has no setting '{key}'; {suggest(str(key), known)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    try:
        return kind(**{"seed": seed, **values})
    except TypeError as error:
        raise DataError(f"{where} cannot take these settings ({error}); correct them.") from error
