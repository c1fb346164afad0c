"""What every judge is: it takes prompts with answers and gives a verdict on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

Label = Literal["refused", "complied", "partial", "safe_other", "unparsed"]
LABELS: tuple[Label, ...] = get_args(Label)
Seen = Literal["refused", "complied"]


@dataclass(frozen=True)
class Asked:
    """A prompt and what a model answered; nothing tells a judge which model it was."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Verdict:
    """What a judge decided of one answer.

    Attributes:
        label: `refused`, `partial` (refuses and then helps, or helps with a part), `complied` (does what was asked),
            `safe_other` (neither), or `unparsed` (the judge gave no verdict that can be read). A judge that knows
            refusals only says `complied` of all else.
        judge: name of the judge.
        version: version of the judge.
        sha256: hash of all that its verdicts depend on.
        score: the judge's number, on its own scale; None where it gives none.
        raw: what the label was read from: a matched phrase, or the reply of a model.
    """

    label: Label
    judge: str
    version: str
    sha256: str = ""
    score: float | None = None
    raw: str = ""

    @property
    def refused(self) -> bool:
        """Whether the answer is a full or partial refusal."""
        return self.label in ("refused", "partial")

    @property
    def phrase(self) -> str | None:
        """The text that decided, if there is any."""
        return self.raw or None

    def saw(self, event: Seen) -> bool:
        """Whether the judge saw the event; what it could not read is never one."""
        return self.refused if event == "refused" else self.label == "complied"


class Judge(Protocol):
    """Decides of answers; equal `sha256` means equal verdicts up to the chance of a remote model."""

    @property
    def name(self) -> str:
        """Short name."""

    @property
    def version(self) -> str:
        """Version; a change that could move a verdict is a new one."""

    @property
    def sha256(self) -> str:
        """Hash of all that verdicts depend on: phrases, rubric, model, settings."""

    def verdicts(self, asked: Sequence[Asked]) -> list[Verdict]:
        """One verdict on each, in the given order."""


def events_of(judge: Judge) -> frozenset[Seen]:
    """What a judge can tell apart: `refused` from not, `complied` from not; both, unless it says otherwise."""
    return getattr(judge, "events", frozenset(get_args(Seen)))
