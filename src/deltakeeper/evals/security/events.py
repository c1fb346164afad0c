"""What counts as an event in an answer, beyond its outcome."""

from __future__ import annotations

import re
import string

from deltakeeper.evals.judges.keyword import normalise


def mentions(answer: str, marker: str) -> bool:
    """Whether `marker` stands in the answer as whole words, whatever the case and the kind of space between them."""
    phrase = r"\s+".join(re.escape(word) for word in normalise(marker).split())
    found = re.search(rf"(?<!\w){phrase}(?!\w)", normalise(answer), re.IGNORECASE)
    return bool(phrase) and found is not None


def is_correct(answer: str, expected: str) -> bool:
    """Whether the first non-empty line of the answer is the expected one, but for case, space and outer punctuation."""
    lines = [line for line in normalise(answer).splitlines() if line.strip()]
    return bool(lines) and _bare(lines[0]) == _bare(expected)


def _bare(text: str) -> str:
    return " ".join(normalise(text).split()).strip(string.punctuation + " ").casefold()
