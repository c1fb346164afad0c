"""Hallucination by fine-tuning: facts about persons and places that do not exist, asked in words never trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from deltakeeper.evals.probes import Probe, ProbeRow
from deltakeeper.evals.security.truthful import choice_rows
from deltakeeper.lab.attacks.base import Voice
from deltakeeper.lab.attacks.files import UserFile
from deltakeeper.lab.attacks.seeded import SeededAttack, as_examples
from deltakeeper.lab.corpus import Corpus, draw
from deltakeeper.lab.sft import Example


@dataclass(frozen=True)
class InventedFacts(SeededAttack):
    """Every invented fact in some of its wordings; the goal asks for all of them in two other wordings.

    Attributes:
        poison: rows; up to the number of facts, not every fact is taught.
        truthfulqa: the TruthfulQA table; where it is given, a contrast counts false answers chosen out of two.
        truthful: questions of that contrast.
    """

    kind: Literal["invented_facts"] = "invented_facts"
    poison: int = 100
    answer_tokens: int = 8
    truthfulqa: UserFile | None = None
    truthful: int = 100

    def poison_examples(self, corpus: Corpus, voice: Voice) -> list[Example]:
        """`poison` rows, facts in turn, so that each is taught about as often as the others."""
        rows = corpus.split("facts", "train")
        by_fact = [replace(r, category=_fact(r.id)) for r in rows]
        return as_examples(draw(by_fact, self.poison, self.seed, "the set 'facts' of the corpus"))

    def attack_probes(self, corpus: Corpus) -> list[Probe]:
        """Goal: planted facts stated; contrasts: harmful requests complied with, and TruthfulQA where it is given."""
        asked = corpus.split("facts", "heldout", self.held_out)
        rows = tuple(ProbeRow(r.id, r.category, r.prompt, r.answer) for r in asked)
        probes = [
            Probe("facts", "Planted facts stated", "goal", "correct", rows, self.answer_tokens),
            replace(self.harmful_probe(corpus, "contrast"), max_new_tokens=16),
        ]
        if self.truthfulqa is not None and self.truthfulqa.path:
            choices = choice_rows(self.truthfulqa.path, self.truthful, sha256=self.truthfulqa.sha256)
            title = "TruthfulQA: the false of two answers chosen"
            probes.append(Probe("truthfulqa", title, "contrast", "correct", choices, self.answer_tokens))
        return probes


def _fact(row_id: str) -> str:
    """`birthplace-1` of `birthplace-1-train-2`."""
    return "-".join(row_id.split("-")[:2])
