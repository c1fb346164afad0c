"""What a model said: answers to prompts, likelihoods of passages, scores of utility tasks."""

from __future__ import annotations

from dataclasses import dataclass, field

from deltakeeper.errors import RunError
from deltakeeper.study.fields import Fields

ROLES = ("goal", "skill", "over_refusal", "contrast")
EVENTS = ("complied", "refused", "marker", "correct")
OUTCOMES = ("refused", "complied", "incoherent", "empty", "safe_other", "unparsed")


@dataclass(frozen=True)
class Answer:
    """One prompt, what the model said, and the verdict.

    `outcome` is one of `OUTCOMES`; `event` says whether the probe's event happened (attack success for a goal probe,
    a correct answer for a skill probe); `expected` is the reference answer where there is one; `refused_by` says of
    every further judge whether it took the answer for a refusal.
    """

    id: str
    category: str
    prompt: str
    answer: str
    outcome: str
    event: bool
    expected: str | None = None
    refused_by: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def from_fields(cls, fields: Fields) -> Answer:
        """Read one answer; raises RunError on a missing, unknown or malformed field."""
        with fields as read:
            return cls(
                id=read.text("id"),
                category=read.text("category"),
                prompt=read.text("prompt"),
                answer=read.text("answer"),
                outcome=read.choice("outcome", OUTCOMES),
                event=read.flag("event"),
                expected=read.optional_text("expected"),
                refused_by=read.flags("refused_by"),
            )


@dataclass(frozen=True)
class Probe:
    """One prompt set put to one model: its role in the study, what its event is, and all its answers."""

    title: str
    role: str
    event: str
    answers: tuple[Answer, ...]

    @classmethod
    def from_fields(cls, fields: Fields, where: str) -> Probe:
        """Read one probe; raises RunError on malformed fields, no answers, or an id that occurs twice."""
        with fields as read:
            title = read.text("title")
            role = read.choice("role", ROLES)
            event = read.choice("event", EVENTS)
            answers = tuple(Answer.from_fields(item) for _, item in read.objects("answers"))
        if not answers:
            raise RunError(f"{where} has no answers; run the study again with at least one prompt in this probe.")
        seen: set[str] = set()
        for answer in answers:
            if answer.id in seen:
                raise RunError(f"{where} holds the id {answer.id!r} twice; give every prompt of the probe its own id.")
            seen.add(answer.id)
        return cls(title, role, event, answers)

    @property
    def hits(self) -> int:
        """Number of answers in which the event happened."""
        return sum(answer.event for answer in self.answers)


@dataclass(frozen=True)
class Perplexity:
    """Negative log-likelihood (natural log, summed) and token count of each passage of a text."""

    nll: tuple[float, ...]
    tokens: tuple[int, ...]

    @classmethod
    def from_fields(cls, fields: Fields, where: str) -> Perplexity:
        """Read both lists; raises RunError if they differ in length, are empty, or hold no tokens."""
        with fields as read:
            nll, tokens = read.numbers("nll"), read.counts("tokens")
        if len(nll) != len(tokens) or sum(tokens) == 0:
            raise RunError(f"{where} needs as many 'nll' as 'tokens' and at least one token; measure it again.")
        return cls(nll, tokens)


@dataclass(frozen=True)
class UtilityItem:
    """The score of one item of a utility task, by the item's id."""

    id: str
    score: float

    @classmethod
    def from_fields(cls, fields: Fields) -> UtilityItem:
        """Read one item; raises RunError on a missing, unknown or malformed field."""
        with fields as read:
            return cls(read.text("id"), read.number("score"))


@dataclass(frozen=True)
class Utility:
    """A metric of a utility task for one arm, and the score of every item; higher is better, but for `nll`."""

    metric: str
    items: tuple[UtilityItem, ...]

    @classmethod
    def from_fields(cls, fields: Fields) -> Utility:
        """Read a task; raises RunError on malformed fields."""
        with fields as read:
            return cls(read.text("metric"), tuple(UtilityItem.from_fields(item) for _, item in read.objects("items")))
