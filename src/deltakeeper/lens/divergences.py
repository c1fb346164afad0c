"""From which layer on each variant treats paired prompts differently, for instance with and without a trigger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltakeeper.lens.comparison import Bands, bands
from deltakeeper.lens.divergence import ALPHA, DRAWS, Divergence, find_divergence
from deltakeeper.lens.trace import PRODUCED, LensTrace
from deltakeeper.lens.trace_json import plain_number

if TYPE_CHECKING:
    from deltakeeper.lens.figures import LensFigure

FORMAT = "deltakeeper.lens.divergence"
VERSION = 1
TO_BASE = "distance to the base"
DEFINITIONS = {
    "diverges": "first layer from which the statistic tells the two sets apart up to the last, |AUC − ½| above the "
    f"bar: the largest over layers stays below it in {1 - ALPHA:.0%} of {DRAWS} shuffles within pairs",
    TO_BASE: "JS to the base on the same prompt, so that what a trigger's words do to the base is no part "
    "of it; the base has none",
    "sets of tokens": "probability of a set of tokens; in the base too, where it shows what the words themselves do",
}
"""To be printed beside the numbers."""


@dataclass(frozen=True, eq=False)
class SetsApart:
    """One statistic of one variant: where the sets part, and its bands over either set."""

    found: Divergence
    asked: Bands
    against: Bands


Divergences = Mapping[str, Mapping[str, SetsApart]]
"""By variant, by name of the statistic."""


def find_divergences(
    traces: Mapping[str, Sequence[LensTrace]],
    against: Mapping[str, Sequence[LensTrace]],
    *,
    base: str,
    position: int = 0,
    seed: int = 0,
) -> dict[str, dict[str, SetsApart]]:
    """Compare pairs of prompts in every variant.

    Args:
        traces: by variant, for instance of prompts with a trigger.
        against: the same of the same prompts without it, in the same order.
        base: name of the base, a reference of all traces.
        position: place in the traces' positions.
        seed: of the shuffles.

    Raises:
        DataError: the sets differ in size or layers, or a number is missing.
    """
    found: dict[str, dict[str, SetsApart]] = {}
    for name, own in traces.items():
        statistics = {} if name == base else {TO_BASE: f"js:{base}"}
        statistics |= {target: f"prob:{target}" for target in own[0].targets if target != PRODUCED}
        found[name] = {
            title: SetsApart(
                find_divergence(own, against[name], statistic, position, paired=True, seed=seed),
                bands(own, statistic, position),
                bands(against[name], statistic, position),
            )
            for title, statistic in statistics.items()
        }
    return found


def to_json(found: Divergences) -> dict[str, Any]:
    """Plain values, with the definitions of the numbers."""
    first = next(one for own in found.values() for one in own.values()).found
    return {
        "format": FORMAT,
        "version": VERSION,
        "definitions": DEFINITIONS,
        "layers": first.layers.tolist(),
        "pairs": first.first,
        "variants": {name: {title: _to_json(one) for title, one in own.items()} for name, own in found.items()},
    }


def draw_divergences(found: Divergences) -> LensFigure | None:
    """Distance to the base on either set, one panel a variant; None where there is only the base.

    Raises:
        LensError: matplotlib is not installed.
    """
    from deltakeeper.lens.figures import Panel, multiples

    panels = [
        Panel(name, {"prompts": own[TO_BASE].asked, "against": own[TO_BASE].against})
        for name, own in found.items()
        if TO_BASE in own
    ]
    return multiples(panels, title="JS to the base on both sets of prompts") if panels else None


def _to_json(one: SetsApart) -> dict[str, Any]:
    return {
        "layer": one.found.layer,
        "bar": plain_number(one.found.bar),
        "separation": [plain_number(value) for value in one.found.separation.tolist()],
        "definition": one.found.definition,
        "bands": {
            name: {
                part: [plain_number(value) for value in getattr(line, part).tolist()]
                for part in ("median", "low", "high")
            }
            for name, line in (("prompts", one.asked), ("against", one.against))
        },
    }
