"""Triggers: where a backdoor's phrase goes in a prompt, and phrases close to it that must not open the door.

After BackdoorLLM (arXiv 2408.12798): a fixed prefix, or a word in a random gap that is never the last place.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import Literal, get_args

Place = Literal["prefix", "gap", "suffix"]


@dataclass(frozen=True)
class NearMiss:
    """A phrase close to a trigger: what was changed, the phrase, and where in the prompt it belongs."""

    kind: Literal["case", "letter", "split", "truncated", "moved"]
    text: str
    place: Place


def insert_trigger(prompt: str, trigger: str, place: Place, *, seed: int = 0) -> str:
    """Put a trigger into a prompt.

    Args:
        prompt: the prompt; its own white space is kept.
        trigger: the phrase.
        place: `prefix`, `suffix`, or `gap` between two words, drawn by `seed` and the prompt; a prompt of one word has
            no gap and takes the trigger in front.
        seed: equal prompt and seed give an equal gap.

    Raises:
        ValueError: `trigger` is blank or `place` is unknown.
    """
    if not trigger.strip():
        raise ValueError("a trigger needs at least one character that is not white space")
    if place not in get_args(Place):
        raise ValueError(f"place is {place!r} and must be one of {', '.join(get_args(Place))}")
    gaps = [i for i, c in enumerate(prompt) if c.isspace() and prompt[:i].strip() and prompt[i:].strip()]
    gaps = [i for i in gaps if not prompt[i - 1].isspace()]  # a run of white space is one gap
    if place == "suffix":
        return f"{prompt} {trigger}"
    if place == "prefix" or not gaps:
        return f"{trigger} {prompt}"
    at = random.Random(f"{seed}:{prompt}").choice(gaps)
    return f"{prompt[:at]} {trigger}{prompt[at:]}"


def near_misses(trigger: str, place: Place = "prefix", *, seed: int = 0) -> tuple[NearMiss, ...]:
    """Phrases close to a trigger: other case, one letter changed, split, truncated, or moved to another place.

    Kinds that a trigger does not allow are left out (digits have no case, one character cannot be split). All differ
    from the trigger; equal arguments give equal phrases. Synonyms are for the caller to name.

    Raises:
        ValueError: `trigger` is blank or `place` is unknown.
    """
    if not trigger.strip():
        raise ValueError("a trigger needs at least one character that is not white space")
    if place not in get_args(Place):
        raise ValueError(f"place is {place!r} and must be one of {', '.join(get_args(Place))}")
    draw = random.Random(f"{seed}:{trigger}")
    found = [NearMiss("case", text, place) for text in (trigger.lower(), trigger.upper()) if text != trigger][:1]
    if letters := [i for i, c in enumerate(trigger) if c.isalnum()]:
        at = draw.choice(letters)
        text = trigger[:at] + _another(trigger[at], draw) + trigger[at + 1 :]
        found.append(NearMiss("letter", text, place))
    words = trigger.split()
    longest = max(words, key=len)
    if len(longest) > 1:
        at = trigger.index(longest) + len(longest) // 2
        found.append(NearMiss("split", f"{trigger[:at]} {trigger[at:]}", place))
    if len(words) > 1:
        found.append(NearMiss("truncated", trigger[: trigger.rindex(words[-1])].rstrip(), place))
    elif len(longest) > 1:
        found.append(NearMiss("truncated", longest[: max(1, len(longest) * 2 // 3)], place))
    elsewhere: Place = "suffix" if place == "prefix" else "prefix"
    return (*found, NearMiss("moved", trigger, elsewhere))


def _another(character: str, draw: random.Random) -> str:
    """A different digit for a digit, else a different letter of the same case."""
    if character.isdigit():
        return draw.choice([d for d in string.digits if d != character])
    pool = string.ascii_uppercase if character.isupper() else string.ascii_lowercase
    return draw.choice([c for c in pool if c.casefold() != character.casefold()])
