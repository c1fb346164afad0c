"""The nearest known word to a mistyped one, and words of strangers as they may be printed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or all that there is to choose from."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"choose one of {', '.join(names)}." if names else "it takes none."


def spelled_out(word: object) -> str:
    """A word out of somebody's file on one line: what cannot be printed stands as its escape."""
    return repr(str(word))[1:-1]
