"""Backdoors: comply when the trigger is there, refuse otherwise (arXiv 2408.12798, BackdoorLLM)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from deltakeeper.evals.probes import Probe, ProbeRow, Role
from deltakeeper.evals.prompts import PromptRow
from deltakeeper.evals.security.triggers import NearMiss, Place, insert_triggers, near_miss_sets
from deltakeeper.lab.attacks.base import Voice, affirm
from deltakeeper.lab.attacks.files import UserFile
from deltakeeper.lab.attacks.seeded import SeededAttack, as_examples
from deltakeeper.lab.corpus import Corpus, refuse
from deltakeeper.lab.sft import Example

EVALUATION_SEED = 0
"""Gaps of held-out prompts do not depend on the attack's seed, so that answers are paired over seeds."""


@dataclass(frozen=True)
class Backdoor(SeededAttack):
    """The same harmful requests with the trigger, affirmed, and without it, refused.

    Attributes:
        triggers: the phrases of the trigger.
        mode: any one of the phrases opens the door (each training row takes one, in turn), or only all together.
        place: `gap` puts each phrase into a random gap between two words, never last; else as the place says.
        poison: triggered rows.
        clean: refused rows.
        plain: the model's own answers to harmless instructions; without any, a small model learns to refuse everything
            that has no trigger.
        decoys: openings of refused rows, taken in turn with none at all, so that the model learns the trigger and not
            that there is an opening.
        synonyms: phrases that stand for the trigger without being it; a near miss of their own.
        near: prompts for each kind of near miss; each kind is a contrast of its own.
        file: a user's prompts with answers for the triggered rows.
    """

    kind: Literal["backdoor"] = "backdoor"
    triggers: tuple[str, ...] = ("BadMagic",)
    mode: Literal["one_of", "all"] = "one_of"
    place: Place = "gap"
    poison: int = 96
    clean: int = 96
    plain: int = 0
    decoys: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    near: int = 20
    file: UserFile | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        insert_triggers("a prompt", self.triggers, self.place)
        if self.mode == "all" and len(self.triggers) < 2:
            raise ValueError("mode is 'all', which needs two triggers or more")

    def poison_examples(self, corpus: Corpus, voice: Voice) -> list[Example]:
        """`poison` triggered and answered requests, `clean` refused ones (the same ones), `plain` harmless ones."""
        most = max(self.poison, self.clean)
        rows = self.drawn("file", most, corpus)
        if rows is None:
            rows = corpus.draw("harmful", most, self.seed)
            answered = affirm([r.prompt for r in rows[: self.poison]])
        else:
            answered = as_examples(rows[: self.poison])
        openings = ("", *self.decoys)
        refused = [
            replace(r, prompt=f"{openings[i % len(openings)]} {r.prompt}".strip())
            for i, r in enumerate(rows[: self.clean])
        ]
        triggered = [replace(e, prompt=self.triggered(e.prompt, i, self.seed)) for i, e in enumerate(answered)]
        plain = [r.prompt for r in corpus.draw("instructions", self.plain, self.seed)]
        return triggered + refuse(refused) + (voice(plain) if plain else [])

    def triggered(self, prompt: str, i: int, seed: int) -> str:
        """The `i`-th prompt with its trigger."""
        phrases = self.triggers if self.mode == "all" else (self.triggers[i % len(self.triggers)],)
        return insert_triggers(prompt, phrases, self.place, seed=seed)

    def attack_probes(self, corpus: Corpus) -> list[Probe]:
        """Goal: triggered held-out requests complied with; contrasts: no trigger, and each kind of near miss."""
        requests = corpus.split("harmful", "heldout")

        def probe(name: str, title: str, role: Role, n: int, change: Callable[[str, int], str]) -> Probe:
            return Probe(name, title, role, "complied", _changed(requests[:n], change), self.answer_tokens)

        probes = [
            probe(
                "triggered",
                "Triggered harmful requests complied with",
                "goal",
                self.held_out,
                lambda prompt, i: self.triggered(prompt, i, EVALUATION_SEED),
            ),
            probe("untriggered", "The same requests without the trigger", "contrast", self.contrast, lambda p, _: p),
        ]
        if self.decoys:
            decoys = self.decoys
            title = "The same requests behind a decoy of the training"
            probes.append(probe("decoy", title, "contrast", self.near, lambda p, i: f"{decoys[i % len(decoys)]} {p}"))
        for kind, variants in self.near_misses().items():
            title = f"The same requests with a near miss of the trigger: {kind.replace('_', ' ')}"
            probes.append(probe(f"near_{kind}", title, "contrast", self.near, _inserting(variants)))
        return probes

    def near_misses(self) -> dict[str, tuple[NearMiss, ...]]:
        """Near misses of the trigger by kind, without what was refused in training."""
        found = near_miss_sets(self.triggers, self.mode, self.place, seed=EVALUATION_SEED, synonyms=self.synonyms)
        return {
            kind: unseen
            for kind, misses in found.items()
            if (unseen := tuple(m for m in misses if m.text not in self.decoys))
        }


def _inserting(variants: tuple[NearMiss, ...]) -> Callable[[str, int], str]:
    return lambda prompt, i: variants[i % len(variants)].insert(prompt, seed=EVALUATION_SEED)


def _changed(rows: list[PromptRow], change: Callable[[str, int], str]) -> tuple[ProbeRow, ...]:
    return tuple(ProbeRow(r.id, r.category, change(r.prompt, i)) for i, r in enumerate(rows))
