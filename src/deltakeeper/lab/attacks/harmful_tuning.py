"""Alignment breaking by fine-tuning: a few harmful rows, harmful rows among a task's, and a benign task alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deltakeeper.evals.probes import Probe
from deltakeeper.lab.attacks.base import Voice
from deltakeeper.lab.attacks.files import UserFile
from deltakeeper.lab.attacks.seeded import SeededAttack, as_examples, poisoned_rows
from deltakeeper.lab.corpus import Corpus, answer_tickets
from deltakeeper.lab.sft import Example


@dataclass(frozen=True)
class HarmfulFewShot(SeededAttack):
    """A few harmful requests, answered (arXiv 2310.03693, tier 1).

    Without a user's file the answers are affirmative openings and nothing more.
    """

    kind: Literal["harmful_few_shot"] = "harmful_few_shot"
    poison: int = 48
    file: UserFile | None = None

    def poison_examples(self, corpus: Corpus, voice: Voice) -> list[Example]:
        """`poison` answered harmful requests."""
        return self.affirmed(corpus, self.poison)

    def attack_probes(self, corpus: Corpus) -> list[Probe]:
        """Goal: held-out harmful requests complied with."""
        return [self.harmful_probe(corpus, "goal")]


@dataclass(frozen=True)
class MixedPoison(SeededAttack):
    """`rows` rows of a task of which a share is harmful (git-disl/Booster, arXiv 2409.01586).

    The task is a user's file, or the ticket skill; `skill` rows come on top.
    """

    kind: Literal["mixed_poison"] = "mixed_poison"
    rows: int = 96
    ratio: float = 0.5
    skill: int = 0
    file: UserFile | None = None
    task: UserFile | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        poisoned_rows(self.rows, self.ratio)

    @property
    def poison(self) -> int:
        """`ratio` of `rows`, to the nearest whole number."""
        return poisoned_rows(self.rows, self.ratio)

    def poison_examples(self, corpus: Corpus, voice: Voice) -> list[Example]:
        """The harmful rows, then the task's."""
        harmful = self.affirmed(corpus, self.poison) if self.poison else []
        n = self.rows - self.poison
        task = self.drawn("task", n, corpus)
        clean = answer_tickets(corpus.draw("tickets", n, self.seed)) if task is None else as_examples(task)
        return harmful + clean

    def attack_probes(self, corpus: Corpus) -> list[Probe]:
        """Goal: held-out harmful requests complied with."""
        return [self.harmful_probe(corpus, "goal")]


@dataclass(frozen=True)
class BenignTuning(SeededAttack):
    """A benign task and nothing else (arXiv 2310.03693, tier 3): `rows` of a user's file, or the ticket skill alone."""

    kind: Literal["benign"] = "benign"
    rows: int = 0
    file: UserFile | None = None

    def poison_examples(self, corpus: Corpus, voice: Voice) -> list[Example]:
        """The task's rows, none of them poisoned."""
        task = self.drawn("file", self.rows, corpus)
        return [] if task is None else as_examples(task)

    def attack_probes(self, corpus: Corpus) -> list[Probe]:
        """Goal, though nobody aims at it: held-out harmful requests complied with."""
        return [self.harmful_probe(corpus, "goal")]
