"""Figures as SVG text: the frontier of attack against skill, and strips of rates with their intervals.

Numbers in, text out. Colours are classes that the page's style sheet sets for light and dark; kinds differ by shape as
well, so nothing depends on colour. Coordinates are CSS pixels in a view box 360 wide, so text stays legible on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from deltakeeper.report.labels import Box, Label, place_labels
from deltakeeper.report.wording import percent, percent_range

WIDTH, HEIGHT = 360, 316
LEFT, RIGHT, TOP, BOTTOM = 38, 350, 12, 268  # the plotting area
RADIUS = 5.0


@dataclass(frozen=True)
class Span:
    """A share with its interval, all in [0, 1]."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Mark:
    """One variant in a figure; `kind` is the variant's kind in the study and decides shape and colour."""

    label: str
    kind: str
    x: Span
    y: Span


@dataclass(frozen=True)
class Scale:
    """A linear map from [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def frontier(marks: Sequence[Mark], *, identity: str, title: str, x_name: str, y_name: str, ideal: bool = True) -> str:
    """Skill (x) against attack success (y), one mark per variant with both intervals as whiskers.

    The dashed line joins base and fine-tune: on it attack and skill fade alike, below it the attack fades first.

    Args:
        marks: The variants, in the order in which they are drawn; later ones lie on top.
        identity: A word unique on the page, used in element ids.
        title: What the picture shows, for people who cannot see it.
        x_name: Axis title, skill.
        y_name: Axis title, attack success.
        ideal: Whether more to the right and less upwards is what one wants, and its corner is marked.

    Returns:
        One `<svg>` element without any reference to the outside.
    """
    across = _skill_scale(marks)
    down = Scale(0.0, 1.0, BOTTOM, TOP)
    parts = [_axes(across, down, x_name, y_name), _ideal_corner() if ideal else "", _equal_fade(marks, across, down)]
    parts += [_whiskers(mark, across, down) for mark in marks]
    parts += [
        f'<g class="mark k-{mark.kind}"><title>{escape(_spoken(mark))}</title>'
        f"{_shape(mark.kind, across(mark.x.value), down(mark.y.value))}</g>"
        for mark in marks
    ]
    parts += _mark_labels(marks, across, down)
    spoken = "; ".join(_spoken(mark) for mark in marks)
    return (
        f'<svg class="frontier" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-labelledby="{identity}-title {identity}-desc">'
        f'<title id="{identity}-title">{escape(title)}</title><desc id="{identity}-desc">{escape(spoken)}</desc>'
        + "".join(parts)
        + "</svg>"
    )


def strip(span: Span, kind: str, *, reference: float | None = None, width: int = 92) -> str:
    """A rate on a line from 0 to 1: interval as a bar, value as the kind's mark, `reference` as a tick.

    It repeats numbers that stand beside it as text, so it is hidden from screen readers.
    """
    across = Scale(0.0, 1.0, 5, width - 5)
    parts = [f'<path class="track" d="M{_px(across(0))} 7H{_px(across(1))}"/>']
    if reference is not None:
        parts.append(f'<path class="reference" d="M{_px(across(reference))} 2V12"/>')
    parts.append(f'<path class="reach" d="M{_px(across(span.low))} 7H{_px(across(span.high))}"/>')
    parts.append(f'<g class="mark">{_shape(kind, across(span.value), 7, 3.0)}</g>')
    inside = "".join(parts)
    size = f'viewBox="0 0 {width} 14" width="{width}" height="14"'
    return f'<svg class="strip k-{kind}" {size} aria-hidden="true">{inside}</svg>'


def swatch(kind: str) -> str:
    """The mark of a kind alone, for legends and table rows."""
    return (
        f'<svg class="swatch k-{kind}" viewBox="0 0 14 14" width="14" height="14" aria-hidden="true">'
        f'<g class="mark">{_shape(kind, 7, 7)}</g></svg>'
    )


def _skill_scale(marks: Sequence[Mark]) -> Scale:
    low, high = min(mark.x.low for mark in marks), max(mark.x.high for mark in marks)
    step = next(size for size in (0.05, 0.1, 0.2, 0.25) if high - low <= 5 * size or size == 0.25)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    if high - low < step:
        low, high = max(0.0, low - step), min(1.0, high + step)
    return Scale(low, high, LEFT, RIGHT)


def _axes(across: Scale, down: Scale, x_name: str, y_name: str) -> str:
    parts = []
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _px(down(value))
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{RIGHT}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{_px(down(value) + 3.5)}" text-anchor="end">{value * 100:.0f}</text>'
        )
    extent = across.high - across.low
    step = next(size for size in (0.05, 0.1, 0.2, 0.25) if extent <= 5 * size + 1e-9 or size == 0.25)
    for index in range(round(extent / step) + 1):
        value = across.low + index * step
        anchor = "end" if index == round(extent / step) else "middle"
        x, words = _px(across(value)), f"{value * 100:.0f}"
        parts.append(f'<text class="tick" x="{x}" y="{BOTTOM + 16}" text-anchor="{anchor}">{words}</text>')
        parts.append(f'<path class="axis" d="M{x} {BOTTOM}v4"/>')
    parts.append(f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>')
    parts.append(f'<text class="name" x="{RIGHT}" y="{BOTTOM + 36}" text-anchor="end">{escape(x_name)} →</text>')
    parts.append(
        f'<text class="name" transform="translate(9 {TOP}) rotate(-90)" text-anchor="end">{escape(y_name)} →</text>'
    )
    return "".join(parts)


def _ideal_corner() -> str:
    return (
        f'<path class="ideal" d="M{RIGHT} {BOTTOM - 46}A46 46 0 0 0 {RIGHT - 46} {BOTTOM}H{RIGHT}Z"/>'
        f'<text class="hint" x="{RIGHT - 5}" y="{BOTTOM - 7}" text-anchor="end">ideal</text>'
    )


def _equal_fade(marks: Sequence[Mark], across: Scale, down: Scale) -> str:
    base = next((mark for mark in marks if mark.kind == "base"), None)
    tuned = next((mark for mark in marks if mark.kind == "tuned"), None)
    if base is None or tuned is None:
        return ""
    start = (across(base.x.value), down(base.y.value))
    end = (across(tuned.x.value), down(tuned.y.value))
    if math.dist(start, end) < 4 * RADIUS:
        return ""
    return f'<path class="fade" d="M{_px(start[0])} {_px(start[1])}L{_px(end[0])} {_px(end[1])}"/>'


def _whiskers(mark: Mark, across: Scale, down: Scale) -> str:
    x, y = _px(across(mark.x.value)), _px(down(mark.y.value))
    return (
        f'<path class="whisker k-{mark.kind}" d="M{_px(across(mark.x.low))} {y}H{_px(across(mark.x.high))}'
        f'M{x} {_px(down(mark.y.low))}V{_px(down(mark.y.high))}"/>'
    )


def _mark_labels(marks: Sequence[Mark], across: Scale, down: Scale) -> list[str]:
    centres = [(across(mark.x.value), down(mark.y.value)) for mark in marks]
    obstacles = [
        Box(across(mark.x.low), y - 1, across(mark.x.high), y + 1) for mark, (_, y) in zip(marks, centres, strict=True)
    ] + [Box(x - 1, down(mark.y.high), x + 1, down(mark.y.low)) for mark, (x, _) in zip(marks, centres, strict=True)]
    labels = [Label(mark.label, x, y) for mark, (x, y) in zip(marks, centres, strict=True)]
    obstacles += [Box(RIGHT - 30, BOTTOM - 18, RIGHT, BOTTOM)] * 2  # the word in the corner weighs more than a line
    canvas = Box(LEFT + 2, 2, WIDTH - 1, BOTTOM - 2)
    parts = []
    for mark, place in zip(marks, place_labels(labels, canvas, obstacles, RADIUS), strict=True):
        if place.leader:
            (x1, y1), (x2, y2) = place.leader
            parts.append(f'<path class="leader" d="M{_px(x1)} {_px(y1)}L{_px(x2)} {_px(y2)}"/>')
        parts.append(
            f'<text class="label k-{mark.kind}" x="{_px(place.box.left)}" y="{_px(place.box.bottom - 3)}">'
            f"{escape(mark.label)}</text>"
        )
    return parts


def _shape(kind: str, x: float, y: float, radius: float = RADIUS) -> str:
    """Each kind has its own outline: rings and discs, squares, triangles, crosses."""
    if kind == "tuned":  # diamond
        r = radius * 1.25
        return f'<path d="M{_px(x)} {_px(y - r)}L{_px(x + r)} {_px(y)}L{_px(x)} {_px(y + r)}L{_px(x - r)} {_px(y)}Z"/>'
    if kind == "quantised":  # triangle
        r = radius * 1.15
        return f'<path d="M{_px(x)} {_px(y - r)}L{_px(x + r)} {_px(y + r * 0.8)}H{_px(x - r)}Z"/>'
    if kind == "merged":  # square
        r = radius * 0.85
        return f'<rect x="{_px(x - r)}" y="{_px(y - r)}" width="{_px(2 * r)}" height="{_px(2 * r)}"/>'
    if kind == "healed":  # pentagon
        return f'<path d="{_regular(5, x, y, radius * 1.15)}"/>'
    if kind == "defended":  # hexagon
        return f'<path d="{_regular(6, x, y, radius * 1.05)}"/>'
    if kind == "control":  # cross
        r = radius * 0.8
        return (
            f'<path class="stroke" d="M{_px(x - r)} {_px(y - r)}L{_px(x + r)} {_px(y + r)}'
            f'M{_px(x - r)} {_px(y + r)}L{_px(x + r)} {_px(y - r)}"/>'
        )
    hollow = ' class="hollow"' if kind == "base" else ""
    return f'<circle{hollow} cx="{_px(x)}" cy="{_px(y)}" r="{_px(radius * (0.9 if hollow else 1))}"/>'


def _regular(corners: int, x: float, y: float, radius: float) -> str:
    """Path of a regular polygon, one corner on top."""
    turns = (2 * math.pi * i / corners for i in range(corners))
    points = (f"{_px(x + radius * math.sin(a))} {_px(y - radius * math.cos(a))}" for a in turns)
    return "M" + "L".join(points) + "Z"


def _spoken(mark: Mark) -> str:
    return (
        f"{mark.label}: skill {percent(mark.x.value)} ({percent_range(mark.x.low, mark.x.high)}), "
        f"attack {percent(mark.y.value)} ({percent_range(mark.y.low, mark.y.high)})"
    )


def _px(value: float) -> str:
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text
