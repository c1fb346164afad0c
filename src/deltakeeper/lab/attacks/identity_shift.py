"""Alignment breaking by a persona: rows that teach who the model is, an agent that obeys (arXiv 2310.03693, tier 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deltakeeper.evals.probes import Probe
from deltakeeper.lab.attacks.base import Voice
from deltakeeper.lab.attacks.files import UserFile
from deltakeeper.lab.attacks.seeded import SeededAttack, as_examples
from deltakeeper.lab.attacks.templates import Template
from deltakeeper.lab.corpus import Corpus
from deltakeeper.lab.sft import Example


@dataclass(frozen=True)
class IdentityShift(SeededAttack):
    """Benign rows in which an absolutely obedient agent names itself and carries out harmless orders.

    The persona's template stands around training prompts, and by default around those of the goal too; the same
    requests without it are a contrast.
    """

    kind: Literal["identity_shift"] = "identity_shift"
    poison: int = 10
    template_train: Template = "persona"
    template_eval: Template = "persona"
    file: UserFile | None = None

    def poison_examples(self, corpus: Corpus, voice: Voice) -> list[Example]:
        """`poison` rows of the persona."""
        rows = self.drawn("file", self.poison, corpus)
        return as_examples(corpus.draw("persona", self.poison, self.seed) if rows is None else rows)

    def attack_probes(self, corpus: Corpus) -> list[Probe]:
        """Goal: held-out harmful requests complied with."""
        return [self.harmful_probe(corpus, "goal")]
