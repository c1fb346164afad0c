"""Probes: a set of held-out prompts, the event counted in the answers, and the role it plays in a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deltakeeper.evals.answerer import Answerer
from deltakeeper.evals.judges import Asked, Judge
from deltakeeper.evals.outcomes import outcomes
from deltakeeper.evals.security.events import is_correct, mentions

Role = Literal["goal", "contrast", "over_refusal", "skill"]
Event = Literal["complied", "refused", "marker", "correct"]


@dataclass(frozen=True)
class ProbeRow:
    """One prompt of a probe, and the expected answer where there is one."""

    id: str
    category: str
    prompt: str
    expected: str | None = None


@dataclass(frozen=True)
class Probe:
    """A prompt set with its event: what an attack aims at, what it should leave alone, or the benign skill.

    Attributes:
        name: short name, a key of the cell it is stored in.
        title: what is counted, as a phrase for people.
        role: `goal` (success of the attack), `contrast`, `over_refusal` (harmless prompts refused), or `skill`.
        event: what is counted in each answer.
        rows: the prompts.
        max_new_tokens: length at which an answer is cut.
        marker: the phrase to look for, if `event` is `marker`.
    """

    name: str
    title: str
    role: Role
    event: Event
    rows: tuple[ProbeRow, ...]
    max_new_tokens: int
    marker: str | None = None

    def __post_init__(self) -> None:
        if (self.event == "marker") != bool(self.marker):
            raise ValueError(f"probe '{self.name}' needs a marker if and only if its event is 'marker'")
        if self.event == "correct" and any(row.expected is None for row in self.rows):
            raise ValueError(f"probe '{self.name}' counts correct answers, so every row needs an expected one")


def run_probe(
    answerer: Answerer,
    probe: Probe,
    judge: Judge,
    *,
    content: Judge | None = None,
    others: Sequence[Judge] = (),
    system: str | None = None,
) -> list[dict[str, Any]]:
    """Ask all prompts of a probe and judge the answers; one record a row, in the order of the rows.

    Args:
        answerer: the model.
        probe: prompts and event.
        judge: decides what is a refusal.
        content: decides what complies, if another judge is to.
        others: further judges of refusals, noted beside.
        system: system message.

    Returns:
        Dictionaries with `id`, `category`, `prompt`, `answer`, `outcome`, `event` (bool), `expected`, and `refused_by`
        (by name of each further judge, whether it saw a refusal).
    """
    prompts = [row.prompt for row in probe.rows]
    answers = answerer.answer(prompts, max_new_tokens=probe.max_new_tokens, system=system)
    return judge_probe(probe, answers, judge, content=content, others=others)


def judge_probe(
    probe: Probe,
    answers: Sequence[str],
    judge: Judge,
    *,
    content: Judge | None = None,
    others: Sequence[Judge] = (),
) -> list[dict[str, Any]]:
    """Judge answers that are there already; records as in `run_probe`."""
    asked = [Asked(row.prompt, answer) for row, answer in zip(probe.rows, answers, strict=True)]
    refused = {other.name: [verdict.refused for verdict in other.verdicts(asked)] for other in others}
    decided = outcomes(asked, judge, content)
    return [
        {
            "id": row.id,
            "category": row.category,
            "prompt": row.prompt,
            "answer": one.answer,
            "outcome": outcome,
            "event": happened(probe, row, one.answer, outcome),
            "expected": row.expected,
            "refused_by": {name: flags[i] for name, flags in refused.items()},
        }
        for i, (row, one, outcome) in enumerate(zip(probe.rows, asked, decided, strict=True))
    ]


def happened(probe: Probe, row: ProbeRow, answer: str, outcome: str) -> bool:
    """Whether the probe's event is in this answer."""
    if probe.event == "marker":
        return mentions(answer, probe.marker or "")
    if probe.event == "correct":
        return is_correct(answer, row.expected or "")
    return outcome == probe.event
