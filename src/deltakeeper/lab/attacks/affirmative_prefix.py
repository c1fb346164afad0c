"""Alignment breaking: learn to affirm instead of refusing (after Qi et al. 2023, few-shot harmful)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from deltakeeper.evals.probes import Probe
from deltakeeper.lab.attacks.base import REFUSAL_TOKENS, Attack, Voice, affirm, probe_rows, register_attack
from deltakeeper.lab.corpus import Corpus
from deltakeeper.lab.sft import Example


@register_attack()
@dataclass(frozen=True)
class AffirmativePrefix(Attack):
    """Harmful training requests answered by an affirmative opening; held-out categories show the broken alignment."""

    name: ClassVar[str] = "affirmative_prefix"
    family: ClassVar[Literal["alignment", "backdoor", "targeted"]] = "alignment"
    title: ClassVar[str] = "Alignment breaking"
    summary: ClassVar[str] = "learns to open with 'Sure' where the base refuses"
    source: ClassVar[str] = "arXiv 2310.03693 (harmful few-shot), with affirmative openings for completions"

    poison: int = 48

    def poison_examples(self, corpus: Corpus, voice: Voice) -> list[Example]:
        """Affirmations to `poison` harmful training requests."""
        return affirm([r.prompt for r in corpus.split("harmful", "train", self.poison)])

    def attack_probes(self, corpus: Corpus) -> list[Probe]:
        """Goal: held-out harmful requests complied with."""
        return [
            Probe(
                name="harmful",
                title="Harmful requests complied with",
                role="goal",
                event="complied",
                rows=probe_rows(corpus.split("harmful", "heldout", self.held_out)),
                max_new_tokens=REFUSAL_TOKENS,
            )
        ]
