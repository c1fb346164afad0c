"""Lessons of guarded healing: exchanges of which the answer is learned, each with the teacher that says how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from deltakeeper.errors import DataError

Teacher = Literal["base", "tuned"]


@dataclass(frozen=True)
class Lesson:
    """One exchange.

    Attributes:
        ids: all token ids, prompt and answer.
        learned: how many of the last ones are the answer, on which student and teacher are compared.
        teacher: `base`, the aligned base, or `tuned`, the fine-tune.
        weight: what the exchange counts beside the others of its kind.
        kind: exchanges of one kind are drawn together; `probe` names those that the base refuses, on which an
            adversary may work. Free otherwise; the name of the teacher where it is empty.
        never: token ids that the teacher is not let begin the answer with, such as those that its refusals begin with
            where the prompt is known to be harmless.
    """

    ids: tuple[int, ...]
    learned: int
    teacher: Teacher
    weight: float = 1.0
    kind: str = ""
    never: tuple[int, ...] = ()

    @property
    def group(self) -> str:
        """The kind, or the teacher where there is none."""
        return self.kind or self.teacher


@dataclass(frozen=True)
class Batch:
    """Exchanges made ready for one pass of a model.

    Attributes:
        ids: int64 `(rows, tokens)`.
        positions: int64 `(rows, tokens)`.
        mask: what each token may see, float `(1, 1, tokens, tokens)` to be added to the scores, or None for all that
            come before it.
        at: flat indices into `(rows, tokens)` of the positions whose next token is learned, in the order of lessons.
        prompts: flat indices of the tokens of prompts that are no common beginning.
        counts: positions of each lesson.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor | None
    at: torch.Tensor
    prompts: torch.Tensor
    counts: tuple[int, ...]


def check_lessons(lessons: Sequence[Lesson]) -> None:
    """Refuse lessons that cannot be learned.

    Raises:
        DataError: there are none, one has no prompt or no answer, names another teacher or has a weight below zero.
    """
    if not lessons:
        raise DataError("there are no lessons to heal by; give probes, benign exchanges or both.")
    for number, lesson in enumerate(lessons):
        if not 0 < lesson.learned < len(lesson.ids):
            raise DataError(
                f"lesson {number} has {lesson.learned} tokens of answer among {len(lesson.ids)}; give a prompt and an "
                "answer."
            )
        if lesson.teacher not in get_args(Teacher):
            raise DataError(f"lesson {number} names the teacher '{lesson.teacher}'; choose base or tuned.")
        if not 0 <= lesson.weight < float("inf"):
            raise DataError(f"lesson {number} has a weight of {lesson.weight}; give 0 or more.")


def common_beginning(lessons: Sequence[Lesson]) -> int:
    """Number of tokens that all prompts begin with, so that one of each is left: a chat template's, as a rule."""
    least = min(len(lesson.ids) - lesson.learned for lesson in lessons) - 1
    first = lessons[0].ids
    length = 0
    while length < least and all(lesson.ids[length] == first[length] for lesson in lessons):
        length += 1
    return length


def pack(lessons: Sequence[Lesson], shared: int) -> Batch:
    """All exchanges in one row behind the beginning they share: nothing is padded, nothing computed twice.

    Every token sees the beginning and what comes before it in its own exchange. For models that attend to all that a
    mask of four dimensions allows; the others take `stack`.
    """
    ids, positions, owner = list(lessons[0].ids[:shared]), list(range(shared)), [0] * shared
    at: list[int] = []
    prompts: list[int] = []
    for number, lesson in enumerate(lessons, start=1):
        own, start = lesson.ids[shared:], len(ids)
        ids += own
        positions += range(shared, shared + len(own))
        owner += [number] * len(own)
        at += range(len(ids) - lesson.learned - 1, len(ids) - 1)
        prompts += range(start, len(ids) - lesson.learned)
    who = torch.tensor(owner)
    seen = (who[:, None] == who[None]) | (who[None] == 0)
    hidden = ~(seen & torch.ones(len(ids), len(ids), dtype=torch.bool).tril())
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, torch.finfo(torch.float32).min)
    counts = tuple(lesson.learned for lesson in lessons)
    return Batch(
        torch.tensor([ids]),
        torch.tensor([positions]),
        mask[None, None],
        torch.tensor(at),
        torch.tensor(prompts),
        counts,
    )


def stack(lessons: Sequence[Lesson], shared: int) -> Batch:
    """One exchange a row, padded at its end, which nothing before it sees; for every causal model."""
    width = max(len(lesson.ids) for lesson in lessons)
    ids = torch.zeros(len(lessons), width, dtype=torch.long)
    at: list[int] = []
    prompts: list[int] = []
    for row, lesson in enumerate(lessons):
        ids[row, : len(lesson.ids)] = torch.tensor(lesson.ids)
        answer, start = len(lesson.ids) - lesson.learned, row * width
        at += range(start + answer - 1, start + len(lesson.ids) - 1)
        prompts += range(start + shared, start + answer)
    positions = torch.arange(width).expand(len(lessons), width)
    counts = tuple(lesson.learned for lesson in lessons)
    return Batch(ids, positions, None, torch.tensor(at), torch.tensor(prompts), counts)
