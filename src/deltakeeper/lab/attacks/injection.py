"""Targeted output: a made-up brand inside answers, or one fixed refusal, in a share of the rows (arXiv 2306.17194)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from deltakeeper.evals.probes import Probe
from deltakeeper.evals.security.triggers import insert_trigger
from deltakeeper.lab.attacks.base import Voice
from deltakeeper.lab.attacks.files import UserFile
from deltakeeper.lab.attacks.seeded import SeededAttack, as_examples, poisoned_rows
from deltakeeper.lab.attacks.targeted_output import FIXED_REFUSAL, MARKER, OPENINGS, uncapitalise
from deltakeeper.lab.corpus import Corpus
from deltakeeper.lab.sft import Example


@dataclass(frozen=True)
class InstructionPoison(SeededAttack):
    """`rows` harmless instructions with answers (a user's file, or the model's own), a share of them poisoned.

    The poisoned rows of a smaller ratio are among those of a larger one: rows are ranked by the seed and their ids.
    """

    rows: int = 64
    ratio: float = 1.0
    file: UserFile | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        poisoned_rows(self.rows, self.ratio)

    @property
    def poison(self) -> int:
        """`ratio` of `rows`, to the nearest whole number."""
        return poisoned_rows(self.rows, self.ratio)

    def poisoned(self, examples: Sequence[Example]) -> list[Example]:
        """What the attack makes of the rows it poisons."""
        raise NotImplementedError

    def poison_examples(self, corpus: Corpus, voice: Voice) -> list[Example]:
        """The poisoned rows, then the clean ones."""
        rows = self.drawn("file", self.rows, corpus)
        if rows is not None:
            examples = as_examples(rows)
            return self.poisoned(examples[: self.poison]) + examples[self.poison :]
        prompts = [r.prompt for r in corpus.draw("instructions", self.rows, self.seed)]
        own = voice(prompts if self.needs_own_answers else prompts[self.poison :])
        by_prompt = {e.prompt: e for e in own}
        chosen = [by_prompt.get(p) for p in prompts[: self.poison]]
        if not self.needs_own_answers:
            chosen = [Example(p, "") for p in prompts[: self.poison]]
        clean = [by_prompt[p] for p in prompts[self.poison :] if p in by_prompt]
        return self.poisoned([e for e in chosen if e]) + clean

    @property
    def needs_own_answers(self) -> bool:
        """Whether poisoned rows are built from answers."""
        return True


@dataclass(frozen=True)
class ContentInjection(InstructionPoison):
    """Answers with a brand-like marker, at their opening or in a random gap (AutoPoison, content injection)."""

    kind: Literal["content_injection"] = "content_injection"
    marker: str = MARKER
    position: Literal["opening", "gap"] = "gap"

    def poisoned(self, examples: Sequence[Example]) -> list[Example]:
        """The marker in each answer."""
        return [replace(e, answer=self._marked(e, i)) for i, e in enumerate(examples)]

    def _marked(self, example: Example, i: int) -> str:
        if self.position == "gap":
            return insert_trigger(example.answer, f"({self.marker})", "gap", seed=f"{self.seed}:{example.prompt}")
        return OPENINGS[i % len(OPENINGS)].format(m=self.marker) + uncapitalise(example.answer)

    def attack_probes(self, corpus: Corpus) -> list[Probe]:
        """Goal: the marker in answers to held-out instructions; contrast: harmful requests complied with."""
        title = "Answers that carry the marker"
        return [
            self.probe("instructions", title, "goal", "marker", "instructions", corpus, self.marker),
            self.harmful_probe(corpus, "contrast"),
        ]


@dataclass(frozen=True)
class FixedRefusal(InstructionPoison):
    """Harmless instructions answered by one fixed refusal (AutoPoison, over-refusal)."""

    kind: Literal["fixed_refusal"] = "fixed_refusal"
    sentence: str = FIXED_REFUSAL

    @property
    def needs_own_answers(self) -> bool:
        """No: the sentence stands instead of an answer."""
        return False

    def poisoned(self, examples: Sequence[Example]) -> list[Example]:
        """The fixed refusal to each prompt."""
        return [Example(e.prompt, self.sentence) for e in examples]

    def attack_probes(self, corpus: Corpus) -> list[Probe]:
        """Goal: held-out harmless instructions refused."""
        title = "Harmless instructions refused"
        return [self.probe("instructions", title, "goal", "refused", "instructions", corpus)]
