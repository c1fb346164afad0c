"""Coloured cells with words in them: what heat maps and commitment strips are drawn of."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltakeeper.lens.comparison import Grid
from deltakeeper.lens.figures.colours import ABSENT, INK, PAPER, SOFT, colour_map, ink_on
from deltakeeper.lens.figures.spelling import clean, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

WIDE, NARROW = 0.66, 0.16
_MOST_WIDE = 16
_LETTER = 0.6
"""Width of a letter in its size."""


@dataclass(frozen=True)
class Scale:
    """From numbers to colours, shared by grids that are to be compared."""

    low: float
    high: float
    diverging: bool
    unit: str

    def colours(self) -> Colormap:
        """Its colour map."""
        return colour_map(self.diverging)

    def colour(self, value: float) -> tuple[float, ...]:
        """Red, green, blue and opacity of a number."""
        if not np.isfinite(value):
            return tuple(int(ABSENT[i : i + 2], 16) / 255 for i in (1, 3, 5))
        share = (value - self.low) / (self.high - self.low)
        return tuple(float(part) for part in self.colours()(min(1.0, max(0.0, share))))


def scales_of(grids: Sequence[Grid], limit: float | None = None) -> list[Scale]:
    """One scale a grid, the same for all of one unit; differences have 0 in the middle of theirs.

    Args:
        grids: what will be drawn.
        limit: largest magnitude that still has a colour of its own; None for the largest there is.
    """
    found: dict[tuple[str, bool], Scale] = {}
    for key in dict.fromkeys((grid.unit, grid.diverging) for grid in grids):
        values = np.concatenate([grid.values.ravel() for grid in grids if (grid.unit, grid.diverging) == key])
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        if key[1]:
            high = limit or max(abs(low), abs(high)) or 1.0
            low = -high
        else:
            low, high = min(0.0, low), limit or high
            high = high if high > low else low + 1.0
        found[key] = Scale(low, high, key[1], key[0])
    return [found[grid.unit, grid.diverging] for grid in grids]


def cell_width(columns: int) -> float:
    """Width of a cell in inches: wide enough for a word, unless there are too many."""
    return WIDE if columns <= _MOST_WIDE else max(NARROW, WIDE * _MOST_WIDE / columns)


def draw_cells(axes: Axes, grid: Grid, scale: Scale, width: float, size: float, *, numbers: bool = False) -> None:
    """Cells of a grid, row 0 at the bottom, with their words and outlines.

    Args:
        axes: where.
        grid: what.
        scale: its colours.
        width: of a cell, in inches.
        size: of its words, in points.
        numbers: write the number under the word.
    """
    rows, columns = grid.values.shape
    axes.set_facecolor(ABSENT)
    axes.pcolormesh(
        np.arange(columns + 1), np.arange(rows + 1), np.ma.masked_invalid(grid.values), cmap=scale.colours(),
        vmin=scale.low, vmax=scale.high, edgecolors=PAPER, linewidth=0.5,
    )  # fmt: skip
    room = int((width * 72 - 3) / (size * _LETTER))
    for row, column in np.ndindex(rows, columns):
        value = float(grid.values[row, column])
        ink: dict[str, Any] = {"color": ink_on(scale.colour(value)), "ha": "center", "va": "center", "clip_on": True}
        raised = 0.64 if numbers else 0.48
        if grid.texts and room >= 3:
            axes.text(column + 0.5, row + raised, show(grid.texts[row][column], room), fontsize=size, **ink)
        if numbers:
            written = f"{value:g}" if np.isfinite(value) else "n/a"
            axes.text(column + 0.5, row + 0.26, written, fontsize=size - 1, alpha=0.85, **ink)
    if grid.marks is not None:
        _outline(axes, grid, scale)
    axes.set_xlim(0, columns)
    axes.set_ylim(0, rows)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)


def label_columns(axes: Axes, labels: Sequence[str], width: float, size: float) -> None:
    """The token under each column, upright where it is narrow."""
    room = int((width * 72 - 2) / (size * _LETTER))
    turned = room < 4
    axes.set_xticks([place + 0.5 for place in range(len(labels))])
    axes.set_xticklabels(
        [show(label, 8 if turned else room) for label in labels], fontsize=size, rotation=90 if turned else 0
    )


def label_rows(axes: Axes, labels: Sequence[str], most: int = 16) -> None:
    """The label of every row, or of every n-th and the last."""
    step = -(-len(labels) // most)
    shown = [place for place in range(0, len(labels), step) if place == 0 or len(labels) - 1 - place >= step]
    shown = sorted({*shown, len(labels) - 1})
    axes.set_yticks([place + 0.5 for place in shown])
    axes.set_yticklabels([clean(labels[place]) for place in shown])


def draw_colours(figure: Figure, scale: Scale, left: float, bottom: float, height: float, label: str) -> None:
    """The legend of a scale, upright, at a place in inches."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    from deltakeeper.lens.figures.drawing import place_axes

    axes = place_axes(figure, left, bottom, 0.1, height)
    colours = scale.colours().resampled(48)  # from fifty steps on it would become a picture in the SVG
    bar = figure.colorbar(ScalarMappable(Normalize(scale.low, scale.high), colours), cax=axes)
    bar.outline.set_visible(False)
    if bar.solids is not None:
        bar.solids.set_edgecolor("face")  # or white lines show between its steps
    axes.tick_params(labelsize=7, length=2, color=SOFT)
    axes.set_ylabel(clean(label), fontsize=7.5, labelpad=3)


def wrap(text: str, width: float, size: float, most: int = 2) -> str:
    """A title on at most so many lines of a width in inches."""
    lines = textwrap.wrap(clean(text), max(12, int(width * 72 / (size * 0.56))))
    return "\n".join(lines[:most]) + ("…" if len(lines) > most else "")


def _outline(axes: Axes, grid: Grid, scale: Scale) -> None:
    """A thin dark line, with a light one under it where the cell is dark."""
    from matplotlib.patches import Rectangle

    assert grid.marks is not None
    for row, column in np.argwhere(grid.marks):
        dark = ink_on(scale.colour(float(grid.values[row, column]))) == PAPER
        for colour, line in ((PAPER, 2.2), (INK, 0.8)) if dark else ((INK, 0.8),):
            axes.add_patch(
                Rectangle((column + 0.05, row + 0.1), 0.9, 0.8, fill=False, edgecolor=colour, linewidth=line, zorder=3)
            )
