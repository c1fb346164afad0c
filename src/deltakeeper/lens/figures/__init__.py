"""Figures of the lens for papers and pages: numbers in, a figure out that saves as SVG, PNG or PDF; never a model."""

from deltakeeper.lens.figures.band_lines import bands
from deltakeeper.lens.figures.commitment_strips import strips
from deltakeeper.lens.figures.curves import Curve, target_curves, token_curves, trajectories
from deltakeeper.lens.figures.drawing import LensFigure
from deltakeeper.lens.figures.heat_maps import final_right, heat_map, side_by_side
from deltakeeper.lens.figures.panels import Panel, against, multiples

__all__ = [
    "Curve",
    "LensFigure",
    "Panel",
    "against",
    "bands",
    "final_right",
    "heat_map",
    "multiples",
    "side_by_side",
    "strips",
    "target_curves",
    "token_curves",
    "trajectories",
]
