"""Commitment strips: at which layer each position's last word was settled, one strip a variant."""

from __future__ import annotations

from dataclasses import replace

from deltakeeper.lens.comparison import Grid
from deltakeeper.lens.figures.cells import (
    cell_width,
    draw_cells,
    draw_colours,
    label_columns,
    label_rows,
    scales_of,
    wrap,
)
from deltakeeper.lens.figures.colours import SOFT
from deltakeeper.lens.figures.drawing import LensFigure, new_figure, place_axes, style, write
from deltakeeper.lens.figures.spelling import clean

_LEFT, _TITLE, _FOOT, _BAR, _ROW = 1.35, 0.34, 0.5, 0.85, 0.36


def strips(grid: Grid, *, layers: int | None = None) -> LensFigure:
    """One row a variant, the first on top, one column a position: the word it settles on, and since which layer.

    Args:
        grid: as `commitment_strips` gives it; its title is the definition, which is printed below.
        layers: how many layers the models have, so that figures of several prompts share their colours.

    Raises:
        LensError: matplotlib is not installed.
    """
    turned = replace(
        grid,
        values=grid.values[::-1],
        rows=grid.rows[::-1],
        texts=grid.texts[::-1],
        marks=None if grid.marks is None else grid.marks[::-1],
    )
    width = cell_width(len(grid.columns))
    wide, tall = max(2.0, width * len(grid.columns)), _ROW * len(grid.rows)
    (scale,) = scales_of([turned], None if layers is None else layers - 1.0)
    with style():
        figure = new_figure(_LEFT + wide + 0.25 + _BAR, _TITLE + tall + _FOOT)
        axes = place_axes(figure, _LEFT, _FOOT, width * len(grid.columns), tall)
        draw_cells(axes, turned, scale, width, 6.5, numbers=width > 0.22)
        label_columns(axes, grid.columns, width, 6.5)
        label_rows(axes, [wrap(name, _LEFT - 0.1, 7.5) for name in turned.rows], len(turned.rows))
        write(figure, _LEFT, _FOOT + tall + 0.1, "Layer of commitment", fontsize=8.5, fontweight="bold")
        write(figure, 0.1, 0.1, clean(grid.title), fontsize=6.5, color=SOFT)
        draw_colours(figure, scale, _LEFT + wide + 0.25, _FOOT, tall, grid.unit)
    return LensFigure(figure, f"Commitment strips: {grid.title}")
