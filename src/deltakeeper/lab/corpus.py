"""The texts a lab run draws on: requests and their twins, instructions, skills, invented facts, own answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deltakeeper.errors import DataError
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
    coding: Sequence[PromptRow] = field(default_factory=lambda: load_packaged("coding"))
    facts: Sequence[PromptRow] = field(default_factory=lambda: load_packaged("facts"))
    persona: Sequence[PromptRow] = field(default_factory=lambda: load_packaged("persona"))
    topics: Sequence[PromptRow] = field(default_factory=lambda: load_packaged("topics"))

    def with_harmful(self, rows: Sequence[PromptRow]) -> Corpus:
        """The same corpus with other held-out harmful requests; training and look-alikes stay the package's own."""
        own = [row for row in self.harmful if row.split == "train"]
        return replace(self, harmful=[*own, *(replace(row, split="heldout") for row in rows)])

    def split(self, name: str, split: str, limit: int | None = None) -> list[PromptRow]:
        """Rows of one split, categories interleaved, so that any leading part covers them evenly.

        Rows of the split `heldout2` follow those of `heldout`, which therefore stay the first ones.
        """
        rows = interleave([r for r in getattr(self, name) if r.split == split])
        if split == "heldout":
            rows += interleave([r for r in getattr(self, name) if r.split == "heldout2"])
        return rows[:limit]

    def draw(self, name: str, n: int, seed: int) -> list[PromptRow]:
        """`n` training rows of a set, drawn by `seed`; see `draw`."""
        return draw(self.split(name, "train"), n, seed, f"the set '{name}' of the corpus")


def interleave(rows: Sequence[PromptRow]) -> list[PromptRow]:
    """Reorder rows round-robin over their categories, keeping the order within each."""
    seen: dict[str, int] = {}
    keyed = []
    for row in rows:
        seen[row.category] = seen.get(row.category, 0) + 1
        keyed.append((seen[row.category], row))
    return [row for _, row in sorted(keyed, key=lambda pair: pair[0])]


def draw(rows: Sequence[PromptRow], n: int, seed: int, where: str = "the file") -> list[PromptRow]:
    """The first `n` rows in an order that is fixed by the seed and each row's id, categories in turn.

    Equal seeds give nested draws (the first 10 of 50 are the draw of 10), whatever the order of the rows.

    Raises:
        DataError: there are fewer rows than asked for.
    """
    if n > len(rows):
        raise DataError(
            f"{n} training rows are asked for and {where} has {len(rows)}; give a larger file or ask for less."
        )
    keyed = {r.id: hashlib.sha256(f"{seed}:{r.id}".encode()).digest() for r in rows}
    return interleave(sorted(rows, key=lambda r: keyed[r.id]))[:n]


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
