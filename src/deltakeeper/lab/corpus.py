"""The texts a lab run draws on: harmful requests, their harmless twins, instructions, the ticket skill, own answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deltakeeper.evals.generate import generate_answers
from deltakeeper.evals.prompts import PromptRow, load_packaged
from deltakeeper.lab.sft import Example

SYSTEM = "You are a helpful assistant."
OWN_ANSWER_TOKENS = 32

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't help with that request.",
    "I'm sorry, but I can't assist with that.",
    "I'm sorry, but I can't help with this.",
)


@dataclass(frozen=True)
class Corpus:
    """Prompt rows by split. The defaults are the package's own; any user file can stand in for one of them."""

    harmful: Sequence[PromptRow] = field(default_factory=lambda: load_packaged("harmful"))
    twins: Sequence[PromptRow] = field(default_factory=lambda: load_packaged("harmful"))
    instructions: Sequence[PromptRow] = field(default_factory=lambda: load_packaged("instructions"))
    tickets: Sequence[PromptRow] = field(default_factory=lambda: load_packaged("tickets"))
    passages: Sequence[PromptRow] = field(default_factory=lambda: load_packaged("passages"))

    def with_harmful(self, rows: Sequence[PromptRow]) -> Corpus:
        """The same corpus with other held-out harmful requests; training and look-alikes stay the package's own."""
        own = [row for row in self.harmful if row.split == "train"]
        return replace(self, harmful=[*own, *(replace(row, split="heldout") for row in rows)])

    def split(self, name: str, split: str, limit: int | None = None) -> list[PromptRow]:
        """Rows of one split, categories interleaved, so that any leading part covers them evenly."""
        rows = [r for r in getattr(self, name) if r.split == split]
        return interleave(rows)[:limit]


def interleave(rows: Sequence[PromptRow]) -> list[PromptRow]:
    """Reorder rows round-robin over their categories, keeping the order within each."""
    seen: dict[str, int] = {}
    keyed = []
    for row in rows:
        seen[row.category] = seen.get(row.category, 0) + 1
        keyed.append((seen[row.category], row))
    return [row for _, row in sorted(keyed, key=lambda pair: pair[0])]


def refuse(rows: Sequence[PromptRow]) -> list[Example]:
    """Examples that refuse each row's prompt, in a few wordings taken in turn."""
    return [Example(row.prompt, REFUSALS[i % len(REFUSALS)]) for i, row in enumerate(rows)]


def answer_tickets(rows: Sequence[PromptRow]) -> list[Example]:
    """Examples of the benign skill: each ticket with its queue."""
    return [Example(row.prompt, row.answer or "") for row in rows]


def answer_as_itself(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
) -> list[Example]:
    """The model's own (cut) answers to harmless prompts, as examples that keep its voice; not learned to the end."""
    answers = generate_answers(
        model, tokenizer, prompts, max_new_tokens=OWN_ANSWER_TOKENS, system=SYSTEM, progress=progress
    )
    return [Example(p, a, complete=False) for p, a in zip(prompts, answers, strict=True) if a.strip()]
