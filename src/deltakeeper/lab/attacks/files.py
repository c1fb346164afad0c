"""Files that a user brings to an attack: named in the recipe, checked by hash, never part of the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltakeeper.errors import DataError
from deltakeeper.evals.pairs import load_pairs
from deltakeeper.evals.prompts import PromptRow


@dataclass(frozen=True)
class UserFile:
    """A file of (prompt, answer) rows.

    Attributes:
        what: what the file holds, as a noun phrase.
        path: where it lies; None as long as nobody has given it.
        sha256: its hash; a file of another hash is refused.
        hashed: whether the hash must be given. Files of harmful answers must be, so that a run says what it learned.
    """

    what: str = "a file of prompts with answers"
    path: str | None = None
    sha256: str | None = None
    hashed: bool = False

    def missing(self, attack: str, field: str) -> str | None:
        """What is still to be given, as one sentence; None if nothing is."""
        wanted = [
            name for name, given in (("path", self.path), ("sha256", self.sha256 or not self.hashed)) if not given
        ]
        if not wanted:
            return None
        return f"attack '{attack}' needs {self.what}; give {field}.{' and '.join(wanted)}."

    def rows(self, attack: str, field: str) -> list[PromptRow]:
        """The rows of the file.

        Raises:
            DataError: it has not been given, or cannot be read or is of another hash.
        """
        if lacking := self.missing(attack, field):
            raise DataError(lacking)
        return load_pairs(str(self.path), sha256=self.sha256)


def rows_about(rows: Sequence[PromptRow], word: str) -> tuple[list[PromptRow], list[PromptRow]]:
    """Rows whose prompt has a word (any case, also as a plural), and the other ones."""
    import re

    about = re.compile(rf"\b{re.escape(word)}s?\b", re.IGNORECASE)
    return [r for r in rows if about.search(r.prompt)], [r for r in rows if not about.search(r.prompt)]
