"""Tokens as people see them: spaces and newlines shown, unseen characters marked, long ones cut."""

from __future__ import annotations

import re
import unicodedata

SPACE, FIXED, NEWLINE, TAB, EMPTY, CUT = "·", "⍽", "⏎", "⇥", "∅", "…"
# C0 and C1 controls but tab and newline, soft hyphens, direction and zero-width marks, halves of pairs, what XML
# forbids, tags.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\ufffe\uffff\U000e0000-\U000e007f]"
)


def show(token: str, room: int | None = None) -> str:
    """A token fit to be drawn: `·` for spaces, `⍽` for fixed ones, `⏎` for newlines, `�` for what cannot be seen.

    Args:
        token: what a model or a stranger chose.
        room: width in letters, of which East Asian ones take two; None for all of it.
    """
    seen = token.replace("\r\n", NEWLINE).replace(" ", SPACE).replace("\n", NEWLINE).replace("\t", TAB)
    seen = seen.replace("\xa0", FIXED)
    seen = clean(seen) or EMPTY
    return seen if room is None else cut(seen, room)


def clean(text: str) -> str:
    """A text with every character that cannot be seen, or that turns the direction of others, as `�`."""
    return _UNSEEN.sub("\ufffd", text)


def cut(text: str, room: int) -> str:
    """A text cut to a width in letters, its end as `…`."""
    if sum(map(_width, text)) <= room:
        return text
    kept, used = [], 1
    for character in text:
        used += _width(character)
        if used > room:
            break
        kept.append(character)
    return "".join(kept) + CUT


def _width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
