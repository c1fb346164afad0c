"""Small multiples: what the dial does, as a statistic against size or bits, one panel an attack, layer or statistic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deltakeeper.errors import DataError
from deltakeeper.lens.comparison import Bands, spread
from deltakeeper.lens.figures.axes import draw_bands, finish, key
from deltakeeper.lens.figures.cells import wrap
from deltakeeper.lens.figures.colours import DASHES, SOFT
from deltakeeper.lens.figures.drawing import LensFigure, new_figure, place_axes, style, write
from deltakeeper.lens.trace_statistics import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDE, _TALL, _LEFT, _FOOT, _KEY = 2.15, 1.5, 0.62, 0.72, 1.9


@dataclass(frozen=True, eq=False)
class Panel:
    """One of the small multiples.

    Attributes:
        title: what is different about it.
        series: by name, for instance of a codec; x is what the dial sets.
        controls: the same for controls, in grey.
        references: values without a dial, by name, as level lines (base, fine-tune).
    """

    title: str
    series: Mapping[str, Bands]
    controls: Mapping[str, Bands] = field(default_factory=dict)
    references: Mapping[str, float] = field(default_factory=dict)


def against(dial: Sequence[float], values: Floats, *, axis: str, unit: str, title: str) -> Bands:
    """Median and quartiles of a statistic over prompts at every setting of a dial.

    Args:
        dial: (n,), for instance bits per weight of n variants.
        values: float64 (prompts, n); NaN where a prompt has no number.
        axis: name of the dial.
        unit: of the statistic.
        title: what is shown.
    """
    order = np.argsort(np.asarray(dial, dtype=np.float64), kind="stable")
    x = np.asarray(dial, dtype=np.float64)[order]
    return replace(spread(np.asarray(values, dtype=np.float64)[:, order], x, unit, title), axis=axis)


def multiples(
    panels: Sequence[Panel],
    *,
    title: str = "",
    y_name: str | None = None,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    across: int = 3,
    note: str = "line: median over prompts   band: quartiles",
) -> LensFigure:
    """Panels with the same two axes, so that they can be compared by eye.

    Args:
        panels: in the order of reading.
        title: over all of them.
        y_name: name of the statistic; None for its unit.
        log: the dial on a logarithmic axis.
        limits: of the statistic's axis; None for all there is.
        across: how many stand side by side.
        note: what lines and bands are.

    Raises:
        DataError: there is nothing to draw, or units or axes differ.
        LensError: matplotlib is not installed.
    """
    drawn = [each for panel in panels for each in (*panel.series.values(), *panel.controls.values())]
    if not drawn:
        raise DataError("there is no panel to draw; give at least one with a series.")
    if len({(each.unit, each.axis) for each in drawn}) > 1:
        raise DataError("panels of several units or axes cannot be compared; draw a figure for each.")
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    controls = list(dict.fromkeys(name for panel in panels for name in panel.controls))
    levels = list(dict.fromkeys(name for panel in panels for name in panel.references))
    columns, rows = min(across, len(panels)), -(-len(panels) // across)
    top = 0.4 if title else 0.12
    with style():
        figure = new_figure(_LEFT + columns * (_WIDE + 0.22) + _KEY, top + rows * (_TALL + _FOOT) + 0.26)
        looks: dict[str, dict[str, Any]] = {}
        places: list[Axes] = []
        for number, panel in enumerate(panels):
            row, column = divmod(number, across)
            bottom = 0.26 + (rows - 1 - row) * (_TALL + _FOOT) + 0.44
            axes = place_axes(figure, _LEFT + column * (_WIDE + 0.22), bottom, _WIDE, _TALL)
            places.append(axes)
            for name, level in panel.references.items():
                looks[name] = {"color": SOFT, "linewidth": 1.0, "linestyle": (0, DASHES[1 + levels.index(name) % 7])}
                axes.axhline(level, zorder=1.2, **looks[name])
            for name, each in panel.controls.items():
                looks[name] = draw_bands(axes, each, controls.index(name), control=True, marks=True)
            for name, each in panel.series.items():
                looks[name] = draw_bands(axes, each, names.index(name), marks=True)
            if log:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            last = number + across >= len(panels)
            finish(axes, drawn[0].axis if last else "", _y_name(drawn[0], y_name) if column == 0 else "")
            axes.set_title(wrap(panel.title, _WIDE, 8, 1), loc="left", fontsize=8, fontweight="bold")
        _share_axes(places, across, limits)
        key(places[columns - 1], [(name, looks[name]) for name in (*names, *controls, *levels)], 1.0)
        if title:
            up = top + rows * (_TALL + _FOOT) + 0.26
            write(figure, _LEFT, up - 0.2, wrap(title, 8, 9.5, 1), fontsize=9.5, fontweight="bold")
        said = note + "   grey: controls" * bool(controls)
        write(figure, _LEFT, 0.1, said, fontsize=6.5, color=SOFT)
    return LensFigure(
        figure, f"{title or drawn[0].title} against {drawn[0].axis}: {', '.join(p.title for p in panels)}"
    )


def _y_name(first: Bands, given: str | None) -> str:
    return first.unit if given is None else given


def _share_axes(places: Sequence[Axes], across: int, limits: tuple[float, float] | None) -> None:
    """The widest range of all for all, written once a row."""
    xs, ys = [each.get_xlim() for each in places], [each.get_ylim() for each in places]
    for number, each in enumerate(places):
        each.set_xlim(min(low for low, _ in xs), max(high for _, high in xs))
        each.set_ylim(min(low for low, _ in ys), max(high for _, high in ys))
        if limits:
            each.set_ylim(*limits)
        if number % across:
            each.tick_params(labelleft=False)
