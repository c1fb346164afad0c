"""What the base itself answers, kept in the run folder: fine-tunes and guards of many seeds ask it the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from deltakeeper.lab.corpus import OWN_ANSWER_TOKENS, SYSTEM
from deltakeeper.lab.sft import Example
from deltakeeper.study.keys import digest
from deltakeeper.whole_files import write_atomically

VOICE_RULE = "1"
Ask = Callable[[Sequence[str], int], list[str]]
"""Answers to prompts, cut at so many tokens."""


class Voices:
    """Answers of one base, looked up before it is asked."""

    def __init__(self, folder: Path, root: str) -> None:
        """Keep answers in a folder; `root` is the base's fingerprint."""
        self.folder, self.root = folder, root

    def kept(self, how: str, ask: Ask) -> Ask:
        """`ask`, but for what is kept; `how` names what else decides its answers, such as the dtype."""

        def answer(prompts: Sequence[str], tokens: int) -> list[str]:
            key = digest("voice", VOICE_RULE, self.root, how, list(prompts), tokens, SYSTEM)
            path = self.folder / f"{key}.json"
            found = _read(path, len(prompts))
            if found is None:
                found = ask(prompts, tokens)
                write_atomically(path, json.dumps(found, ensure_ascii=False) + "\n")
            return found

        return answer


def as_examples(prompts: Sequence[str], ask: Ask) -> list[Example]:
    """Own answers as examples that keep the base's voice; see `deltakeeper.lab.corpus.answer_as_itself`."""
    answers = ask(prompts, OWN_ANSWER_TOKENS)
    return [Example(p, a, complete=False) for p, a in zip(prompts, answers, strict=True) if a.strip()]


def _read(path: Path, count: int) -> list[str] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if isinstance(value, list) and len(value) == count and all(isinstance(text, str) for text in value):
        return value
    return None
