"""Colours of the lens: one map for magnitudes, one for differences, and hues that the colour-blind tell apart.

Both maps change evenly in lightness, so they also survive a grey printer; the page takes the same stops. Hues are those
of the report. Nothing is said by colour alone: variants differ by dashes and marks, changed cells by an outline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.colors import Colormap

INK, SOFT, LINE, PAPER, ABSENT = "#1b1e22", "#5a616a", "#d9dad5", "#ffffff", "#e4e4df"
CONTROL = "#a3a8ae"
SEQUENTIAL = ("#f5f7f8", "#c3dcec", "#7fb3d8", "#2f7db5", "#003a66")
"""From nothing to much."""
DIVERGING = ("#6e2c00", "#c4661f", "#f0bd8b", "#f7f6f3", "#a9cde6", "#3b82b5", "#003a66")
"""From less, by way of no difference, to more."""
SEQUENTIAL_DARK = ("#20252a", "#164666", "#2273a8", "#62b2e6", "#dcf0ff")
DIVERGING_DARK = ("#ffe0c4", "#ec9550", "#834719", "#24282c", "#164666", "#3f97d3", "#dcf0ff")
"""The same on a dark page."""
HUES = ("#0068a8", "#b04f00", "#00745a", "#93458a", "#7a5c00", "#4a5bc4", "#1b1e22", "#8c2d2d")
HUES_DARK = ("#62b6ee", "#f0a45c", "#4cc9a3", "#dd9bd2", "#d9bd52", "#9fb0ff", "#f4f2ec", "#ff9d8a")
DASHES: tuple[tuple[float, ...], ...] = (
    (), (5, 2), (1.2, 1.6), (6, 1.6, 1.2, 1.6), (9, 2.5), (3, 1.2), (6, 1.6, 1.2, 1.6, 1.2, 1.6), (1.2, 3),
)  # fmt: skip
"""Lengths of line and gap in widths of the line; empty for an unbroken one."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")


def colour_map(diverging: bool) -> Colormap:
    """The map for differences or for magnitudes, with grey for missing numbers."""
    from matplotlib.colors import LinearSegmentedColormap

    name, stops = ("lens-diverging", DIVERGING) if diverging else ("lens-sequential", SEQUENTIAL)
    return LinearSegmentedColormap.from_list(name, list(stops)).with_extremes(bad=ABSENT)


def lightness(colour: Sequence[float]) -> float:
    """CIE lightness L*, 0 to 100, of red, green and blue from 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    y = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * y ** (1 / 3) - 16 if y > 216 / 24389 else y * 24389 / 27


def ink_on(colour: Sequence[float]) -> str:
    """The colour in which text can be read on another."""
    return INK if lightness(colour) > 56 else PAPER
