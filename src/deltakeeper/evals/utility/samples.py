"""Which items of a task are asked: a fixed, stratified choice that larger choices contain."""

from __future__ import annotations

import random
from collections.abc import Sequence

from deltakeeper.errors import DataError


def choose(strata: Sequence[str], count: int, seed: int = 0) -> list[int]:
    """Numbers of `count` items, in rising order, each stratum with about its share of them.

    The first k items of a task would be of one subject or one author. Every item gets a place within its shuffled
    stratum, as a fraction of the stratum's size, and the items of the lowest fractions are taken: the choice of 100
    holds the choice of 50.

    Args:
        strata: stratum of each item.
        count: how many to take; all if there are no more.
        seed: seed of the choice.

    Raises:
        DataError: `count` is not positive.
    """
    if count < 1:
        raise DataError(f"{count} samples of a task measure nothing; ask for at least one.")
    members: dict[str, list[int]] = {}
    for index, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(index)
    places: list[tuple[float, int]] = []
    for stratum in sorted(members):
        own = members[stratum]
        rng = random.Random(f"{seed}:{stratum}")
        rng.shuffle(own)
        offset = rng.random()  # else all small strata would come in at the same fraction
        places += [((rank + offset) / len(own), index) for rank, index in enumerate(own)]
    return sorted(index for _, index in sorted(places)[:count])
