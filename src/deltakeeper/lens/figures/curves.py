"""Trajectories: when a decision forms, as probabilities over layers; colours are tokens, dashes are variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deltakeeper.errors import DataError
from deltakeeper.lens.comparison import bands
from deltakeeper.lens.figures.axes import finish, key, line_style
from deltakeeper.lens.figures.cells import wrap
from deltakeeper.lens.figures.colours import HUES, SOFT
from deltakeeper.lens.figures.drawing import LensFigure, new_figure, place_axes, style, write
from deltakeeper.lens.figures.spelling import show
from deltakeeper.lens.trace import LensTrace
from deltakeeper.lens.trace_statistics import Floats, check_alike


@dataclass(frozen=True, eq=False)
class Curve:
    """A probability by layer.

    Attributes:
        name: of the token or set of tokens; decides the colour.
        variant: whose probability; decides the dashes.
        x: float64 (n,), numbers of layers.
        y: float64 (n,), probability; NaN where there is none.
        low: float64 (n,), lower quartile over prompts; None for one prompt.
        high: float64 (n,), upper quartile.
    """

    name: str
    variant: str
    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None

    def __post_init__(self) -> None:
        sides = [side for side in (self.y, self.low, self.high) if side is not None]
        if any(side.shape != self.x.shape for side in sides) or (self.low is None) != (self.high is None):
            raise ValueError("a curve needs a probability for each layer, and both quartiles or none")


def token_curves(traces: Sequence[LensTrace], tokens: Sequence[int], position: int = -1) -> tuple[Curve, ...]:
    """Curves of tokens on one prompt, one for each variant that followed the token.

    Args:
        traces: one a variant.
        tokens: ids.
        position: place in the traces' positions.

    Raises:
        DataError: no traces, they are not of the same cells of the same tokens, or no variant followed a token.
    """
    if not traces:
        raise DataError("there are no lens traces to compare; trace at least one variant.")
    check_alike(traces)
    found = []
    for token in tokens:
        followed = [trace for trace in traces if trace.trajectories and token in trace.trajectories[position]]
        if not followed:
            raise traces[0].refuse(f"token {token} is not among those that were followed")
        for trace in followed:
            y = trace.trajectories[position][token].astype(np.float64)
            found.append(Curve(show(trace.word(token)), trace.meta.variant, trace.layers.astype(np.float64), y))
    return tuple(found)


def target_curves(
    traces: Mapping[str, Sequence[LensTrace]], targets: Sequence[str], position: int = -1
) -> tuple[Curve, ...]:
    """Curves of named sets of tokens over prompts: the probability of one prompt, or median and quartiles of several.

    Args:
        traces: by variant, one trace a prompt.
        targets: names of sets.
        position: place in the traces' positions.

    Raises:
        DataError: as `comparison.bands`.
    """
    found = []
    for target in targets:
        for variant, group in traces.items():
            spread = bands(group, f"prob:{target}", position)
            quartiles = (spread.low, spread.high) if len(group) > 1 else (None, None)
            found.append(Curve(target, variant, spread.x, spread.median, *quartiles))
    return tuple(found)


def trajectories(curves: Sequence[Curve], *, title: str = "When the decision forms", log: bool = False) -> LensFigure:
    """Probability of tokens or sets of tokens over layers; one colour each, one line style a variant.

    Args:
        curves: what to draw, with bands where they have quartiles.
        title: what is shown.
        log: probabilities on a logarithmic axis, down to 1e-5.

    Raises:
        DataError: there is nothing to draw.
        LensError: matplotlib is not installed.
    """
    if not curves:
        raise DataError("there is no curve to draw; give at least one.")
    names = list(dict.fromkeys(curve.name for curve in curves))
    variants = list(dict.fromkeys(curve.variant for curve in curves))
    with style():
        figure = new_figure(6.4, 3.3)
        axes = place_axes(figure, 0.62, 0.62, 3.95, 2.3)
        for curve in curves:
            colour = HUES[names.index(curve.name) % len(HUES)]
            floor = 1e-5 if log else 0.0
            axes.plot(
                curve.x, np.maximum(curve.y, floor), color=colour, **line_style(variants.index(curve.variant), curve.x)
            )
            if curve.low is not None and curve.high is not None:
                low, high = (np.maximum(side, floor) for side in (curve.low, curve.high))
                axes.fill_between(curve.x, low, high, color=colour, alpha=0.12, linewidth=0)
        if log:
            axes.set_yscale("log")
            axes.set_ylim(8e-6, 1.3)
        else:
            axes.set_ylim(-0.02, 1.02)
        finish(axes, "layer", "probability", whole=True)
        axes.set_title(wrap(title, 4.2, 9, 1), loc="left", fontweight="bold")
        key(axes, [(show(name, 18), {"color": HUES[i % len(HUES)]}) for i, name in enumerate(names)], 1.0)
        styles = [(name, {"color": SOFT} | line_style(i, curves[0].x)) for i, name in enumerate(variants)]
        key(axes, styles, 1.0 - 0.085 * len(names) - 0.06)
        if any(curve.low is not None for curve in curves):
            write(figure, 0.62, 0.1, "line: median over prompts   band: quartiles", fontsize=6.5, color=SOFT)
    return LensFigure(figure, f"{title}: probability of {', '.join(names)} by layer in {', '.join(variants)}")
