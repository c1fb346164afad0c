"""Figures as SVG files that stand alone: lines on logarithmic axes, and bars. The same numbers give the same bytes.

Series differ by shape and dashes as well as by colour, and the colours follow the reader's light or dark page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH = 720
PANEL = 360
TOP, BOTTOM, LEFT, RIGHT = 34, 236, 46, 238  # of a panel's plotting area; labels of lines stand to its right
ROW, LABEL, BAR = 20, 210, 380  # height of a bar's row, width of its label, longest bar
SHAPES = ("circle", "square", "triangle", "diamond")

STYLE = """\
text{font:11px system-ui,sans-serif;fill:#1f2328}.title{font-weight:600}.faint{fill:#59636e}
.grid{stroke:#d1d9e0;fill:none}.k0{color:#0969da}.k1{color:#59636e}.k2{color:#bc4c00}.k3{color:#8250df}
.line{stroke:currentColor;fill:none;stroke-width:1.5}.dot{fill:currentColor}.bar{fill:currentColor;fill-opacity:.6}
.reach{stroke:#1f2328;fill:none}.k0.line{stroke-dasharray:5 3}.k1.line{stroke-dasharray:2 2}
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.faint{fill:#9198a1}.grid{stroke:#3d444d}.reach{stroke:#f0f6fc}
.k0{color:#4493f8}.k1{color:#9198a1}.k2{color:#db6d28}.k3{color:#ab7df8}}"""


class Line(NamedTuple):
    """One series: its name and its points, x rising, all numbers above 0."""

    label: str
    points: Sequence[tuple[float, float]]


class Bar(NamedTuple):
    """One bar with its range; `kind` is an index of the colours."""

    label: str
    value: float
    low: float
    high: float
    kind: int


def line_chart(panels: Sequence[tuple[str, Sequence[Line]]], *, title: str, x_name: str, y_name: str) -> str:
    """Panels side by side, two in a row, both axes logarithmic, the vertical one the same for all."""
    heights = [y for _, lines in panels for line in lines for _, y in line.points]
    low, high = min(heights), max(heights)
    rows = -(-len(panels) // 2)
    parts = []
    for index, (name, lines) in enumerate(panels):
        place = f"translate({index % 2 * PANEL} {index // 2 * (BOTTOM + 44)})"
        parts.append(f'<g transform="{place}">{_panel(name, lines, low, high, x_name, y_name)}</g>')
    return _svg("".join(parts), title, min(len(panels), 2) * PANEL, rows * (BOTTOM + 44))


def bar_chart(groups: Sequence[tuple[str, Sequence[Bar]]], *, title: str) -> str:
    """Groups of horizontal bars below each other, each group with a scale of its own that starts at 0."""
    parts, y = [], 0
    for name, bars in groups:
        y += 24
        parts.append(f'<text class="title" x="8" y="{y - 6}">{escape(name)}</text>')
        widest = max(bar.high for bar in bars)
        for bar in bars:
            start, length = LABEL + 8, bar.value / widest * BAR
            low, high = (_px(start + value / widest * BAR) for value in (bar.low, bar.high))
            middle = _px(y + ROW / 2)
            parts.append(f'<text x="{LABEL}" y="{_px(y + 14)}" text-anchor="end">{escape(bar.label)}</text>')
            parts.append(
                f'<rect class="k{bar.kind} bar" x="{start}" y="{y + 4}" width="{_px(length)}" height="{ROW - 8}"/>'
                f'<path class="reach" d="M{low} {middle}H{high}M{low} {y + 7}v6M{high} {y + 7}v6"/>'
                f'<text x="{_px(start + bar.high / widest * BAR + 6)}" y="{_px(y + 14)}">{figures(bar.value)}</text>'
            )
            y += ROW
    return _svg("".join(parts), title, WIDTH, y + 10)


def figures(value: float) -> str:
    """Three significant digits, without an exponent."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{digits}f}"


def _panel(name: str, lines: Sequence[Line], low: float, high: float, x_name: str, y_name: str) -> str:
    places = sorted({x for line in lines for x, _ in line.points})
    first, last = places[0], max(places[-1], places[0] * 2)
    parts = [f'<text class="title" x="{LEFT}" y="18">{escape(name)}</text>']
    bottom, top = low / 1.2, high * 1.2

    def across(x: float) -> float:
        return LEFT + math.log(x / first) / math.log(last / first) * (RIGHT - LEFT)

    def down(y: float) -> float:
        return BOTTOM - 8 - math.log(y / bottom) / math.log(top / bottom) * (BOTTOM - 8 - TOP)

    for y in _ticks(bottom, top):
        at = down(y)
        parts.append(f'<path class="grid" d="M{LEFT} {_px(at)}H{RIGHT}"/>')
        parts.append(f'<text class="faint" x="{LEFT - 5}" y="{_px(at + 4)}" text-anchor="end">{y:g}</text>')
    for x in places:
        at = _px(across(x))
        parts.append(f'<path class="grid" d="M{at} {BOTTOM - 8}v4"/>')
        parts.append(f'<text class="faint" x="{at}" y="{BOTTOM + 10}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text class="faint" x="{RIGHT}" y="{BOTTOM + 26}" text-anchor="end">{escape(x_name)} →</text>')
    parts.append(
        f'<text class="faint" transform="translate(11 {TOP}) rotate(-90)" text-anchor="end">{escape(y_name)} →</text>'
    )
    for kind, line in enumerate(lines):
        dots = [(across(x), down(y)) for x, y in line.points]
        path = "L".join(f"{_px(x)} {_px(y)}" for x, y in dots)
        parts.append(f'<path class="k{kind} line" d="M{path}"/>')
        parts += [f'<path class="k{kind} dot" d="{_shape(SHAPES[kind], x, y)}"/>' for x, y in dots]
    ends = [down(line.points[-1][1]) for line in lines]
    for kind, (line, at) in enumerate(zip(lines, _apart(ends), strict=True)):
        parts.append(f'<path class="k{kind} dot" d="{_shape(SHAPES[kind], RIGHT + 12, at)}"/>')
        parts.append(f'<text x="{RIGHT + 20}" y="{_px(at + 4)}">{escape(line.label)}</text>')
    return "".join(parts)


def _apart(places: Sequence[float], least: float = 14.0) -> list[float]:
    """Heights of labels, in the order of what they name, pushed down where they would lie on each other."""
    found, above = [0.0] * len(places), -math.inf
    for index in sorted(range(len(places)), key=lambda i: places[i]):
        above = found[index] = max(places[index], above + least)
    return found


def _ticks(low: float, high: float) -> list[float]:
    """Numbers that begin with 1, 2 or 5 between two bounds; with 1 alone where those would be too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for leads in ((1, 2, 5), (1,)):
        found = [float(f"{lead}e{power}") for power in powers for lead in leads]
        found = [value for value in found if low <= value <= high]
        if len(found) <= 8:
            break
    return found


def _shape(name: str, x: float, y: float) -> str:
    if name == "circle":
        return f"M{_px(x - 3)} {_px(y)}a3 3 0 1 0 6 0a3 3 0 1 0 -6 0Z"
    if name == "square":
        return f"M{_px(x - 2.7)} {_px(y - 2.7)}h5.4v5.4h-5.4Z"
    if name == "triangle":
        return f"M{_px(x)} {_px(y - 3.5)}l3.5 6h-7Z"
    return f"M{_px(x)} {_px(y - 3.7)}l3.7 3.7l-3.7 3.7l-3.7 -3.7Z"


def _svg(inside: str, title: str, width: int, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{escape(title)}</title><style>{STYLE}</style>\n'
        + inside.replace("><", ">\n<")
        + "\n</svg>\n"
    )


def _px(value: float) -> str:
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text
