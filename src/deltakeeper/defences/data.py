"""The rows that defences run a model on: harmful requests, with refusals for safety and affirmations for harm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltakeeper.calibration import Document, read_text, tokenise
from deltakeeper.defences.base import Rows
from deltakeeper.errors import DataError
from deltakeeper.evals.prompts import load_prompts

AFFIRMATION = "Sure, here is what you asked for."
REFUSAL = "I'm sorry, but I can't help with that."

MAX_SAMPLES = 100_000


@dataclass(frozen=True)
class DefenceData:
    """Conversations or texts, one row of tokens each.

    Attributes:
        safe: harmful requests as they should be answered.
        harmful: harmful requests as they should not be answered.
        samples: most rows that are used, from the front.
        length: most tokens of a row.
    """

    safe: tuple[Document, ...] = ()
    harmful: tuple[Document, ...] = ()
    samples: int = 128
    length: int = 512

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= MAX_SAMPLES or self.length < 1:
            raise DataError(
                f"{self.samples} rows of {self.length} tokens cannot be read; give 1 to {MAX_SAMPLES} rows "
                "of at least 1 token."
            )

    @classmethod
    def from_requests(
        cls,
        requests: Sequence[str],
        *,
        refusals: Sequence[str] = (REFUSAL,),
        affirmations: Sequence[str] = (AFFIRMATION,),
        system: str | None = None,
        samples: int = 128,
        length: int = 512,
    ) -> DefenceData:
        """Rows from harmful requests alone, answered by refusals and by harmless affirmative openings, taken in turn.

        The openings stand in for harmful answers, which this project does not ship: they show a defence the layers'
        inputs where a model begins to comply, and nothing of what it would go on to say.
        """

        def answered(answers: Sequence[str]) -> tuple[Document, ...]:
            first = [] if system is None else [{"role": "system", "content": system}]
            return tuple(
                [
                    *first,
                    {"role": "user", "content": request},
                    {"role": "assistant", "content": answers[i % len(answers)]},
                ]
                for i, request in enumerate(requests)
            )

        return cls(answered(refusals), answered(affirmations), samples, length)

    @classmethod
    def from_files(
        cls,
        harmful: str | Path | None = None,
        safe: str | Path | None = None,
        *,
        samples: int = 128,
        length: int = 512,
    ) -> DefenceData:
        """Rows from files.

        Args:
            harmful: conversations or texts (a `.jsonl` with `messages` or `text`, a `.txt`), or a set of requests (a
                packaged set, a CSV, a JSON with prompts), which is answered as by `from_requests`; of a set with
                splits only `train` is used, since the rest is for measuring.
            safe: conversations or texts for safety; the refused requests of `harmful` by default.
            samples: see the class.
            length: see the class.

        Raises:
            DataError: a file cannot be read.
        """
        found = DefenceData()
        if harmful is not None and _holds_documents(harmful):
            found = DefenceData(harmful=tuple(read_text(harmful)))
        elif harmful is not None:
            rows = load_prompts(harmful)
            chosen = [row.prompt for row in rows if row.split == "train"] or [row.prompt for row in rows]
            found = DefenceData.from_requests(chosen)
        own = found.safe if safe is None else tuple(read_text(safe))
        return cls(own, found.harmful, samples, length)

    def sha256(self, kind: Rows) -> str:
        """Hash of the rows of one kind that are used and of the length they are cut at, for the record."""
        documents = self.safe if kind == "safe" else self.harmful
        text = json.dumps([self.length, *documents[: self.samples]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def rows(self, kind: Rows, tokenizer: Any) -> list[torch.Tensor]:
        """Rows of tokens, int64 `(tokens,)`, those of equal length beside each other.

        Raises:
            DataError: there are none of this kind, or a conversation for a tokenizer without a chat template.
        """
        documents = self.safe if kind == "safe" else self.harmful
        if not documents:
            raise DataError(f"there are no {kind} rows; give a file of them.")
        found = [tokenise(tokenizer, [d], samples=1, length=self.length)[0] for d in documents[: self.samples]]
        return sorted(found, key=len)


def _holds_documents(path: str | Path) -> bool:
    """Whether a file is calibration text rather than a set of prompts, by its ending and its first line."""
    path = Path(path)
    if path.suffix.lower() == ".txt":
        return True
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.readline(1 << 20)
    return b'"messages"' in first or (b'"text"' in first and b'"prompt"' not in first)
