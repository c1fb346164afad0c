"""A figure that saves itself as SVG, PNG or PDF, the same bytes for the same numbers, and leaves matplotlib as it was.

No window, no `pyplot`, no style of the notebook: every figure is made and saved under one style, and nothing of it
stays. Texts are never read as mathematics, since tokens hold dollars.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltakeeper.errors import DataError, LensError
from deltakeeper.lens.figures.colours import INK, LINE, PAPER, SOFT
from deltakeeper.lens.figures.inline_svg import to_inline
from deltakeeper.lens.figures.spelling import clean
from deltakeeper.whole_files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("svg", "png", "pdf")
DPI = 200
_STYLE: dict[str, Any] = {
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 8,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.facecolor": PAPER,
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so layout does not depend on the machine
    "font.size": 8,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",  # text stays text: to be searched, and in any script that the reader has a font for
    "svg.hashsalt": "deltakeeper.lens",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": SOFT,
    "xtick.labelsize": 7.5,
    "xtick.major.size": 2.5,
    "ytick.color": SOFT,
    "ytick.labelsize": 7.5,
    "ytick.major.size": 2.5,
}


class LensFigure:
    """A drawn figure.

    Attributes:
        figure: matplotlib's own, for those who want to change it before saving.
        title: what it shows, for people who cannot see it.
    """

    def __init__(self, figure: Figure, title: str) -> None:
        self.figure = figure
        self.title = clean(title)

    def save(self, path: Path) -> None:
        """Write it in the format that the name ends with.

        Raises:
            DataError: the name ends with something else than .svg, .png or .pdf, or cannot be written.
        """
        kind = path.suffix.lower().removeprefix(".")
        if kind not in FORMATS:
            raise DataError(f"a figure cannot be written as {path.name!r}; end its name with .svg, .png or .pdf.")
        content = self.content(kind)
        try:
            with replacing(path) as scratch:
                scratch.write_bytes(content)
        except OSError as error:
            raise DataError(f"the figure cannot be written to {path} ({error.strerror}); give another name.") from error

    def content(self, kind: str) -> bytes:
        """Its bytes in one of `FORMATS`."""
        nothing: dict[str, dict[str, Any]] = {
            "svg": dict.fromkeys(("Date", "Creator", "Format", "Type")),
            "png": {"Software": None},
            "pdf": dict.fromkeys(("CreationDate", "Creator", "Producer")),
        }
        found = io.BytesIO()
        with style():
            self.figure.savefig(found, format=kind, dpi=DPI, metadata=nothing[kind])
        return found.getvalue()

    def svg(self) -> str:
        """SVG as a file of its own."""
        return self.content("svg").decode()

    def inline(self, identity: str) -> str:
        """One `<svg>` element for a page whose policy forbids style attributes.

        Args:
            identity: a word unique on the page; all ids begin with it.
        """
        return to_inline(self.svg(), identity, self.title)

    def _repr_svg_(self) -> str:
        """For notebooks."""
        return self.svg()


@contextmanager
def style() -> Iterator[None]:
    """Draw in the style of the lens; what matplotlib was told elsewhere does not count, and is as before afterwards.

    Raises:
        LensError: matplotlib is not installed.
    """
    try:
        import matplotlib.style
    except ImportError as error:
        raise LensError("figures of the lens need matplotlib; run `pip install 'deltakeeper[lens]'`.") from error
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a token may be in any script
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches that no window knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def place_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place in inches from the lower left corner."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def write(figure: Figure, left: float, bottom: float, text: str, **settings: Any) -> None:
    """Text at a place in inches from the lower left corner."""
    across, up = figure.get_size_inches()
    figure.text(left / across, bottom / up, text, **settings)
