"""Figures of what the lens saw of one attack, from its summary and from the traces of one sample."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from deltakeeper.lens import figures
from deltakeeper.lens.comparison import Bands
from deltakeeper.lens.figures import LensFigure
from deltakeeper.lens.trace import LensTrace
from deltakeeper.lens.trace_statistics import Floats
from deltakeeper.report.figures import Mark, Span, frontier
from deltakeeper.study.lens_records import AttackLens, LensArm, Line
from deltakeeper.study.summary import Number

MOST_LINES = 6
_ORDER = ("tuned", "codec", "healed", "merged", "quantised", "defended", "control")


def map_of(traces: Mapping[str, LensTrace], arms: Sequence[LensArm]) -> LensFigure:
    """Layer × position with the likeliest tokens, some arms of one sample side by side, the base first."""
    found = [traces[arm.variant] for arm in arms]
    grids = figures.side_by_side(found, "top1")
    unit = "probability of the likeliest token"
    named = [replace(grid, title=arm.label, unit=unit) for grid, arm in zip(grids, arms, strict=True)]
    return figures.heat_map(named, reference=arms[0].label)


def lines_of(
    attack: AttackLens,
    statistic: str,
    arms: Sequence[LensArm],
    title: str,
    *,
    unit: str = "",
    limits: tuple[float, float] | None = None,
) -> LensFigure:
    """A statistic by layer, one line with its band an arm."""
    series = {arm.label: _bands(attack, arm.lines[statistic], title, unit) for arm in arms if statistic in arm.lines}
    return figures.bands(series, title=title, limits=limits)


def kept_by_size(attacks: Sequence[AttackLens]) -> LensFigure | None:
    """What is kept of the stream's shift against how much smaller the delta is, one panel an attack."""
    panels = []
    for attack in attacks:
        whole = next((arm.bytes for arm in attack.arms if arm.kind == "tuned"), None)
        series: dict[str, list[LensArm]] = {}
        for arm in attack.arms:
            if arm.kind == "codec" and whole and arm.bytes and arm.kept[2].value is not None:
                series.setdefault(arm.variant.split(":")[0], []).append(arm)
        if whole and series:
            panels.append(figures.Panel(attack.title, {name: _by_size(own, whole) for name, own in series.items()}))
    if not panels:
        return None
    title = "Kept in the upper third of the layers"
    note = "points: ratio of sums   band: 95 % over seeds and prompts"
    return figures.multiples(panels, title=title, y_name="kept", log=True, note=note)


def kept_against_attack(attack: AttackLens, identity: str) -> str:
    """What arms keep of the shift in the stream against what they keep of the attack, as SVG; empty for nothing."""
    marks = [
        Mark(_short(arm), arm.kind, _span(arm.kept[2]), _span(arm.attack))
        for arm in sorted(attack.arms, key=lambda arm: arm.kind in ("codec", "healed"))
        if arm.kept[2].value is not None and arm.attack.value is not None
    ]
    if not marks:
        return ""
    return frontier(
        marks,
        identity=identity,
        title=f"{attack.title}: attack success against what the stream keeps",
        x_name="kept of the shift, upper third of the layers, %",
        y_name="attack success, %",
        ideal=False,
    )


def shown_arms(attack: AttackLens, primary: str, most: int = MOST_LINES) -> list[LensArm]:
    """The fine-tune, the primary comparison, guarded arms, then others as they come; never the base."""
    others = [arm for arm in attack.arms if arm.kind != "base"]
    others.sort(key=lambda arm: (arm.kind != "tuned", arm.variant != primary, arm.kind != "healed"))
    return sorted(others[:most], key=lambda arm: _ORDER.index(arm.kind))


def _short(arm: LensArm) -> str:
    known = {"base": "base", "tuned": "fine-tune"}.get(arm.kind)
    return known or re.sub(r"\s*\([^()]*\)", "", arm.label).removeprefix("Control: ") or arm.variant


def _span(number: Number) -> Span:
    value = number.value or 0.0
    ends = (value, *(value if end is None else end for end in (number.low, number.high)))
    return Span(*(min(1.0, max(0.0, end)) for end in ends))


def _by_size(arms: Sequence[LensArm], whole: int) -> Bands:
    own = sorted(arms, key=lambda arm: whole / (arm.bytes or whole))
    value, low, high = (
        np.array([getattr(arm.kept[2], end) for arm in own], dtype=np.float64) for end in ("value", "low", "high")
    )
    x = np.array([whole / (arm.bytes or whole) for arm in own])
    once = np.ones(len(own), dtype=np.int64)
    return Bands(x, value, low, high, "", "kept", once, axis="times smaller than the fine-tune")


def _bands(attack: AttackLens, line: Line, title: str, unit: str) -> Bands:
    median, low, high = map(_array, (line.median, line.low, line.high))
    count = np.full(len(attack.layers), attack.readings)
    x = np.array(attack.layers, dtype=np.float64)
    return Bands(x, median, low, high, unit, title, count, None if line.pooled is None else _array(line.pooled))


def _array(values: Sequence[float | None]) -> Floats:
    return np.array([math.nan if value is None else value for value in values])
