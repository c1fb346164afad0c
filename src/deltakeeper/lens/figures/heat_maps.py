"""Heat maps: what a model would say at every layer and position, several variants side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from deltakeeper.errors import DataError
from deltakeeper.lens.comparison import Grid, grid
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
from deltakeeper.lens.trace import LensTrace
from deltakeeper.lens.trace_statistics import check_alike

_LEFT, _GAP, _TITLE, _FOOT, _NOTE, _BAR = 0.5, 0.36, 0.5, 0.34, 0.22, 0.85
_WORD = 6.0


def side_by_side(traces: Sequence[LensTrace], name: str) -> tuple[Grid, ...]:
    """A statistic of several variants, with cells marked whose likeliest token is not that of the first variant.

    Raises:
        DataError: no traces, they are not of the same cells of the same tokens, or one lacks the statistic.
    """
    if not traces:
        raise DataError("there are no lens traces to compare; trace at least one variant.")
    check_alike(traces)
    first = traces[0].top_ids[..., 0]
    return tuple(replace(grid(trace, name), marks=trace.top_ids[..., 0] != first) for trace in traces)


def final_right(trace: LensTrace) -> NDArray[np.bool_]:
    """Whether the likeliest token of the last layer is the one that comes next in the text, bool (P,).

    Behind the last token of the text nothing is known to be right.
    """
    said = [trace.word(int(token)) for token in trace.top_ids[-1, :, 0]]
    following = [trace.tokens[place + 1] if place + 1 < len(trace.tokens) else None for place in trace.positions]
    return np.array([one == other for one, other in zip(said, following, strict=True)], dtype=np.bool_)


def heat_map(
    grids: Sequence[Grid],
    *,
    right: Sequence[NDArray[np.bool_] | None] = (),
    reference: str = "the reference",
    limit: float | None = None,
    across: int = 4,
) -> LensFigure:
    """Layer × position, layer 0 at the bottom; the word is the likeliest token, the colour one statistic.

    Grids of one unit share their colours. Outlined cells are those that a grid marks; a star stands over positions
    whose last word was right.

    Args:
        grids: one a variant, or differences.
        right: for each grid, bool (columns,), whether the last likeliest token was right; None or empty for not known.
        reference: whose likeliest token marked cells differ from, for the note.
        limit: largest magnitude that still has a colour of its own.
        across: how many stand side by side at most.

    Raises:
        DataError: there is nothing to draw.
        LensError: matplotlib is not installed.
    """
    if not grids:
        raise DataError("there is no grid to draw; give at least one.")
    widths = [cell_width(len(each.columns)) for each in grids]
    height = 0.2 if max(len(each.rows) for each in grids) <= 40 else 0.145
    size = _WORD if height > 0.15 else 5.0
    scales = scales_of(grids, limit)
    each_line = -(-len(grids) // -(-len(grids) // across))  # five by four across are three and two
    lines = [range(start, min(start + each_line, len(grids))) for start in range(0, len(grids), each_line)]
    wide = max(
        sum(_LEFT * (place == line[0]) + widths[place] * len(grids[place].columns) + _GAP for place in line)
        for line in lines
    )
    tall = [_TITLE + max(len(grids[place].rows) for place in line) * height + _FOOT for line in lines]
    legends = list(dict.fromkeys(scales))
    with style():
        figure = new_figure(wide + _BAR * len(legends), sum(tall) + _NOTE)
        top = sum(tall) + _NOTE
        for line, room in zip(lines, tall, strict=True):
            left = _LEFT
            for place in line:
                each, width = grids[place], widths[place]
                up = len(each.rows) * height
                axes = place_axes(figure, left, top - _TITLE - up, width * len(each.columns), up)
                draw_cells(axes, each, scales[place], width, size)
                label_columns(axes, each.columns, width, 6.5)
                label_rows(axes, each.rows)
                if place == line[0]:
                    axes.set_ylabel("layer")
                title = wrap(each.title, width * len(each.columns), 8.5)
                write(figure, left, top - _TITLE + 0.17, title, fontsize=8.5, fontweight="bold", va="bottom")
                stars = right[place] if place < len(right) else None
                for column in np.flatnonzero(stars) if stars is not None else ():
                    axes.text(column + 0.5, len(each.rows) + 0.1, "★", ha="center", va="bottom", fontsize=7)
                left += width * len(each.columns) + _GAP
            top -= room
        up = min(2.4, tall[0] - _TITLE - _FOOT)
        bottom = sum(tall) + _NOTE - _TITLE - up
        for place, scale in enumerate(legends):
            label = "difference" + f", {scale.unit}" * bool(scale.unit) if scale.diverging else scale.unit
            draw_colours(figure, scale, wide + _BAR * place, bottom, up, label)
        note = _note(grids, right, reference)
        write(figure, _LEFT, 0.08, note, fontsize=6.5, color=SOFT)
    return LensFigure(figure, "Heat maps by layer and position: " + "; ".join(each.title for each in grids))


def _note(grids: Sequence[Grid], right: Sequence[NDArray[np.bool_] | None], reference: str) -> str:
    parts = []
    if any(each.marks is not None and each.marks.any() for each in grids):
        parts.append(f"outlined: likeliest token differs from {clean(reference)}")
    if any(stars is not None and stars.any() for stars in right):
        parts.append("★ likeliest token of the last layer comes next in the text")
    if any(not np.isfinite(each.values).all() for each in grids):
        parts.append("grey: no number")
    return "   ".join(parts)
