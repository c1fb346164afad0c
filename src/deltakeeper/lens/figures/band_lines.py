"""Bands: median and quartiles of a statistic over prompts, layer by layer, several variants beside their controls."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from deltakeeper.errors import DataError
from deltakeeper.lens.comparison import Bands
from deltakeeper.lens.figures.axes import draw_bands, finish, key
from deltakeeper.lens.figures.cells import wrap
from deltakeeper.lens.figures.colours import SOFT
from deltakeeper.lens.figures.drawing import LensFigure, new_figure, place_axes, style, write

NO_CONTROLS: Mapping[str, Bands] = {}


def bands(
    series: Mapping[str, Bands],
    *,
    controls: Mapping[str, Bands] = NO_CONTROLS,
    title: str | None = None,
    y_name: str | None = None,
    limits: tuple[float, float] | None = None,
    note: str | None = None,
) -> LensFigure:
    """One line with its band a variant; controls in grey behind them. Small marks are ratios of sums over prompts.

    Args:
        series: by name of the variant.
        controls: by name, what the variants have to beat.
        title: what is shown; None for that of the first, without its name.
        y_name: name of the statistic; None for its unit.
        limits: of the statistic's axis, for shares that may run far out; None for all there is.
        note: what lines and bands are; None for medians and quartiles over prompts.

    Raises:
        DataError: there is nothing to draw, or units or axes differ.
        LensError: matplotlib is not installed.
    """
    drawn = [*controls.values(), *series.values()]
    if not series:
        raise DataError("there are no bands to draw; give at least one variant.")
    if len({(each.unit, each.axis) for each in drawn}) > 1:
        raise DataError("bands of several units or axes cannot share one figure; draw one for each.")
    first = next(iter(series.values()))
    shown = first.title.removeprefix(f"{next(iter(series))}: ") if title is None else title
    with style():
        figure = new_figure(6.4, 3.3)
        axes = place_axes(figure, 0.68, 0.62, 3.9, 2.3)
        looks = [(name, draw_bands(axes, each, place)) for place, (name, each) in enumerate(series.items())]
        looks += [
            (name, draw_bands(axes, each, place, control=True)) for place, (name, each) in enumerate(controls.items())
        ]
        if limits:
            axes.set_ylim(*limits)
        finish(axes, first.axis, first.unit if y_name is None else y_name, whole=first.axis == "layer")
        axes.set_title(wrap(shown, 5.6, 9, 1), loc="left", fontweight="bold")
        key(axes, looks, 1.0)
        write(figure, 0.68, 0.1, _note(first, bool(controls)) if note is None else note, fontsize=6.5, color=SOFT)
    return LensFigure(figure, f"{shown}, by {first.axis}: {', '.join([*series, *controls])}")


def _note(first: Bands, controls: bool) -> str:
    most = int(np.max(first.prompts))
    parts = [f"line: median of {most} prompts" if most > 1 else "one prompt", "band: quartiles"]
    parts += ["marks: ratio of sums"] if first.pooled is not None else []
    parts += ["grey: controls"] if controls else []
    return "   ".join(parts)
