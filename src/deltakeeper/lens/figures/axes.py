"""Lines, legends and axes that all figures with curves share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deltakeeper.lens.figures.colours import CONTROL, DASHES, HUES, LINE, MARKERS
from deltakeeper.lens.figures.spelling import clean, cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from deltakeeper.lens.comparison import Bands


def line_style(place: int, x: Sequence[float] | Any) -> dict[str, Any]:
    """Dashes and, where dashes are used up, marks of the n-th variant."""
    dashes = DASHES[place % len(DASHES)]
    found: dict[str, Any] = {"linewidth": 1.4, "linestyle": (0, dashes) if dashes else "-"}
    if place >= len(DASHES):
        found |= {"marker": MARKERS[place % len(MARKERS)], "markersize": 3.2, "markevery": max(1, len(x) // 8)}
    return found


def finish(axes: Axes, x_name: str, y_name: str, *, whole: bool = False) -> None:
    """Names of the axes and quiet lines behind the curves."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(clean(x_name))
    axes.set_ylabel(clean(y_name))
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.margins(x=0.02)


def key(axes: Axes, entries: Sequence[tuple[str, dict[str, Any]]], top: float) -> None:
    """A legend right of the axes, from a height in shares of them downwards."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **({"linewidth": 1.8} | settings)) for _, settings in entries]
    labels = [cut(clean(name), 26) for name, _ in entries]
    axes.add_artist(
        axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.02, top), handlelength=2.6, borderaxespad=0)
    )


def draw_bands(axes: Axes, bands: Bands, place: int, *, control: bool = False, marks: bool = False) -> dict[str, Any]:
    """Median and quartiles of the n-th series, and marks for the ratio of sums where there is one; its style."""
    colour = CONTROL if control else HUES[place % len(HUES)]
    look: dict[str, Any] = {"color": colour} | line_style(place, bands.x)
    look |= {"linewidth": 1.1, "zorder": 1.5} if control else {"zorder": 2.5}
    if marks:
        look |= {"marker": MARKERS[place % len(MARKERS)], "markersize": 3.6}
    axes.fill_between(
        bands.x, bands.low, bands.high, color=colour, alpha=0.2 if control else 0.13, linewidth=0, zorder=1
    )
    axes.plot(bands.x, bands.median, **look)
    if bands.pooled is not None:
        marker = MARKERS[place % len(MARKERS)]
        axes.plot(
            bands.x, bands.pooled, linestyle="", marker=marker, markersize=2.8, markerfacecolor="white",
            markeredgecolor=colour, markeredgewidth=0.8, zorder=3,
        )  # fmt: skip
    return look
