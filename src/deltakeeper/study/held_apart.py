"""Directions of a run to the rows of a table: each arm at the layer that is told first, beside its nearest control."""

from __future__ import annotations

from deltakeeper.lens.contrast import DEFINITIONS
from deltakeeper.study.groups import Group
from deltakeeper.study.lens_directions import ArmDirection, Directions
from deltakeeper.study.lens_records import AttackDirections, HeldApart
from deltakeeper.study.store import RunStore
from deltakeeper.study.summary import AttackSummary, Number

DIRECTIONS = {f"direction: {name}" if name != "direction" else name: words for name, words in DEFINITIONS.items()}
"""To be printed beside the numbers, among those of the lens."""


def held_apart(store: RunStore, group: Group, summary: AttackSummary) -> tuple[AttackDirections, ...]:
    """One table a seed that has directions; raises RunError where they are malformed."""
    found = ((seed, store.read_directions(group.attack, seed)) for seed in group.seeds)
    return tuple(_table(seed, one, summary) for seed, one in found if one is not None)


def _table(seed: int, found: Directions, summary: AttackSummary) -> AttackDirections:
    place = found.layers.index(found.layer)
    rows = [row for row in summary.rows if row.variant in found.variants]
    arms = tuple(_arm(row.variant, row.label, row.kind, found.variants[row.variant], place) for row in rows)
    return AttackDirections(seed=seed, probes=found.probes, layer=found.layer, judged=found.judged, arms=arms)


def _arm(variant: str, label: str, kind: str, own: ArmDirection, place: int) -> HeldApart:
    control = max(own.controls, key=lambda name: own.controls[name].reach[place] or 0.0)
    return HeldApart(
        variant=variant,
        label=label,
        kind=kind,
        apart=_number((own.apart[place], own.low[place], own.high[place]), "projections have no spread"),
        kept=_number((own.kept[place], own.kept_low[place], own.kept_high[place]), "the base holds nothing apart here"),
        control=control,
        reach=own.controls[control].reach[place],
        share=own.controls[control].share[place],
    )


def _number(ends: tuple[float | None, float | None, float | None], without: str) -> Number:
    value, low, high = ends
    return Number(value=value, low=low, high=high, note="" if value is not None else without)
