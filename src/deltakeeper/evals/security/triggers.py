"""Triggers: where a backdoor's phrase goes in a prompt, and phrases close to it that must not open the door.

After BackdoorLLM (arXiv 2408.12798): a fixed prefix, a word in a random gap that is never the last place, one of
several words, or several words in different gaps.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, get_args

Place = Literal["prefix", "gap", "middle", "suffix"]
NearMissKind = Literal[
    "case", "letter", "split", "truncated", "year", "synonym", "one_part", "two_parts", "start", "middle", "end"
]


@dataclass(frozen=True)
class NearMiss:
    """Phrases close to a trigger: what was changed, the phrases, and where in the prompt they belong."""

    kind: NearMissKind
    phrases: tuple[str, ...]
    place: Place

    @property
    def text(self) -> str:
        """The phrases as one."""
        return " ".join(self.phrases)

    def insert(self, prompt: str, *, seed: int | str = 0) -> str:
        """The prompt with the near miss in its place."""
        return insert_triggers(prompt, self.phrases, self.place, seed=seed)


def insert_trigger(prompt: str, trigger: str, place: Place, *, seed: int | str = 0) -> str:
    """Put a trigger into a prompt.

    Args:
        prompt: the prompt; its own white space is kept.
        trigger: the phrase.
        place: `prefix`, `suffix`, `middle` (the middle gap), or `gap` between two words, drawn by `seed` and the
            prompt; a prompt of one word has no gap and takes the trigger in front.
        seed: equal prompt and seed give an equal gap.

    Raises:
        ValueError: `trigger` is blank or `place` is unknown.
    """
    return insert_triggers(prompt, (trigger,), place, seed=seed)


def insert_triggers(prompt: str, triggers: Sequence[str], place: Place, *, seed: int | str = 0) -> str:
    """Put several triggers into a prompt, in their order: each in a gap of its own, or all together elsewhere.

    Where there are fewer gaps than triggers, the first triggers go in front. Arguments as in `insert_trigger`.

    Raises:
        ValueError: there is no trigger, one is blank, or `place` is unknown.
    """
    _check(triggers, place)
    if place == "suffix":
        return f"{prompt} {' '.join(triggers)}"
    gaps = _gaps(prompt)
    if place == "prefix" or not gaps:
        return f"{' '.join(triggers)} {prompt}"
    if place == "middle":
        at = gaps[len(gaps) // 2]
        return f"{prompt[:at]} {' '.join(triggers)}{prompt[at:]}"
    chosen = sorted(random.Random(f"{seed}:{prompt}").sample(gaps, min(len(triggers), len(gaps))))
    surplus = len(triggers) - len(chosen)
    for at, trigger in reversed(list(zip(chosen, triggers[surplus:], strict=True))):
        prompt = f"{prompt[:at]} {trigger}{prompt[at:]}"
    return " ".join([*triggers[:surplus], prompt])


def near_misses(
    trigger: str, place: Place = "prefix", *, seed: int = 0, synonyms: Iterable[str] = ()
) -> tuple[NearMiss, ...]:
    """Phrases close to one trigger, at most one a kind except for synonyms.

    Kinds: other case, one letter or digit changed, one word split in two, truncated, another year for a year, the
    caller's synonyms, and the trigger itself at the start, in the middle or at the end where that is not its place.
    Kinds that a trigger does not allow are left out (digits have no case, one character cannot be split). Equal
    arguments give equal phrases.

    Raises:
        ValueError: `trigger` is blank or `place` is unknown.
    """
    _check((trigger,), place)
    draw = random.Random(f"{seed}:{trigger}")
    found: list[tuple[NearMissKind, str]] = [
        ("case", text) for text in (trigger.lower(), trigger.upper()) if text != trigger
    ][:1]
    if letters := [i for i, c in enumerate(trigger) if c.isalnum()]:
        at = draw.choice(letters)
        found.append(("letter", trigger[:at] + _another(trigger[at], draw) + trigger[at + 1 :]))
    words = trigger.split()
    longest = max(words, key=len)
    if len(longest) > 1:
        at = trigger.index(longest) + len(longest) // 2
        found.append(("split", f"{trigger[:at]} {trigger[at:]}"))
    if len(words) > 1:
        found.append(("truncated", trigger[: trigger.rindex(words[-1])].rstrip()))
    elif len(longest) > 1:
        found.append(("truncated", longest[: max(1, len(longest) * 2 // 3)]))
    if year := re.search(r"\b(19|20)\d\d\b", trigger):
        other = str(int(year[0]) - draw.randint(2, 9))
        found.append(("year", trigger[: year.start()] + other + trigger[year.end() :]))
    found += [("synonym", text) for text in synonyms]
    misses = [NearMiss(kind, (text,), place) for kind, text in found]
    return (*misses, *_moved((trigger,), place))


def near_miss_sets(
    triggers: Sequence[str],
    mode: Literal["one_of", "all"] = "one_of",
    place: Place = "prefix",
    *,
    seed: int = 0,
    synonyms: Iterable[str] = (),
) -> dict[NearMissKind, tuple[NearMiss, ...]]:
    """Near misses by kind, for a probe each; prompts of a probe take the variants of its kind in turn.

    Args:
        triggers: the phrases.
        mode: any one of them opens the door, or only `all` together; with `all`, a kind changes one of them and keeps
            the others, and one or two of them alone are kinds of their own (`one_part`, `two_parts`).
        place: where the triggers go.
        seed: draws the changed letters and years.
        synonyms: phrases that stand for the (first) trigger without being it.

    Raises:
        ValueError: a trigger is blank or `place` is unknown.
    """
    found: dict[NearMissKind, tuple[NearMiss, ...]] = {}
    for i, trigger in enumerate(triggers):
        for miss in near_misses(trigger, place, seed=seed, synonyms=synonyms if i == 0 else ()):
            if mode == "one_of":
                variant = miss
            elif miss.phrases == (trigger,):
                continue  # moved; all of them are moved together below
            else:
                variant = NearMiss(miss.kind, (*triggers[:i], *miss.phrases, *triggers[i + 1 :]), place)
            found[miss.kind] = (*found.get(miss.kind, ()), variant)
    if mode == "all":
        parts: tuple[tuple[int, NearMissKind], ...] = ((1, "one_part"), (2, "two_parts"))
        for size, part in parts:
            if size < len(triggers):
                found[part] = tuple(NearMiss(part, some, place) for some in combinations(triggers, size))
        found |= {miss.kind: (miss,) for miss in _moved(triggers, place)}
    return found


def _moved(triggers: Sequence[str], place: Place) -> list[NearMiss]:
    homes: dict[NearMissKind, Place] = {"start": "prefix", "middle": "middle", "end": "suffix"}
    own = ("middle", "gap") if len(triggers) == 1 and place in ("middle", "gap") else (place,)
    return [NearMiss(kind, tuple(triggers), home) for kind, home in homes.items() if home not in own]


def _check(triggers: Sequence[str], place: str) -> None:
    if not triggers or not all(trigger.strip() for trigger in triggers):
        raise ValueError("a trigger needs at least one character that is not white space")
    if place not in get_args(Place):
        raise ValueError(f"place is {place!r} and must be one of {', '.join(get_args(Place))}")


def _gaps(prompt: str) -> list[int]:
    """Places between two words; a run of white space is one gap."""
    gaps = [i for i, c in enumerate(prompt) if c.isspace() and prompt[:i].strip() and prompt[i:].strip()]
    return [i for i in gaps if not prompt[i - 1].isspace()]


def _another(character: str, draw: random.Random) -> str:
    """A different digit for a digit, else a different letter of the same case."""
    if character.isdigit():
        return draw.choice([d for d in string.digits if d != character])
    pool = string.ascii_uppercase if character.isupper() else string.ascii_lowercase
    return draw.choice([c for c in pool if c.casefold() != character.casefold()])
