"""What `deltakeeper lens` shows of its numbers: a table, a page and figures; and a tuned lens from its file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from deltakeeper.commands.output import console

if TYPE_CHECKING:
    from deltakeeper.lens.figures import LensFigure
    from deltakeeper.lens.overview import VariantOverview
    from deltakeeper.lens.trace import LensTrace
    from deltakeeper.lens.trace_pass import Translators

MOST_SHOWN = 64
"""Prompts on the page."""
MOST_MAPS = 6
"""Variants in the heat map."""


def read_tuned(path: Path, root: str) -> tuple[Translators, str]:
    """A tuned lens and what to call it in traces; raises DataError or BaseMismatchError where it does not fit."""
    from deltakeeper.lens.tuned_file import read_translators

    translators = read_translators(path, base_root=root)
    return translators, f"tuned lens {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def draw(
    traces: Mapping[str, Sequence[LensTrace]],
    found: Sequence[VariantOverview],
    texts: Sequence[str],
    out: Path,
    more: Mapping[str, LensFigure],
) -> list[Path]:
    """The page and figures; what cannot be drawn is told, since the numbers are there already."""
    from deltakeeper.errors import DeltakeeperError

    drawn: list[Path] = []
    try:
        from deltakeeper.lens.page import write_lens_page
        from deltakeeper.lens.page_samples import LensSample

        samples = [
            LensSample(f"prompt-{number:04d}", text, [own[number - 1] for own in traces.values()])
            for number, text in enumerate(texts, 1)
        ]
        for name, figure in more.items():
            drawn.append(out / "figures" / f"{name}.svg")
            figure.save(drawn[-1])
        write_lens_page(out / "lens.html", samples[:MOST_SHOWN], figures=list(more.values()))
        drawn.append(out / "lens.html")
        drawn += _figures(traces, found, out / "figures")
    except DeltakeeperError as error:
        typer.echo(f"deltakeeper: {error}", err=True)
    return drawn


def _figures(traces: Mapping[str, Sequence[LensTrace]], found: Sequence[VariantOverview], folder: Path) -> list[Path]:
    """Of the first prompt what each cell says and where it commits; over all of them where variants differ."""
    from deltakeeper.lens import figures
    from deltakeeper.lens.commitment import commitment_strips

    first = [own[0] for own in traces.values()]
    drawn = {
        "heat_map": figures.heat_map(figures.side_by_side(first[:MOST_MAPS], "top1"), reference=first[0].meta.variant),
        "commitment": figures.strips(commitment_strips(first)),
    }
    for name, title in (("js:base", "JS to the base"), ("kept", "kept share of the fine-tuning's shift")):
        series = {one.variant: one.bands[name] for one in found if name in one.bands and one.variant != "base"}
        if series:
            drawn[name.replace(":", "_")] = figures.bands(series, title=title)
    for name, figure in drawn.items():
        figure.save(folder / f"{name}.svg")
    return [folder / f"{name}.svg" for name in drawn]


def print_tokens(found: Sequence[VariantOverview], names: Sequence[str]) -> None:
    """What became of sets of tokens of one's own, one row a variant; nothing without any."""
    from rich.table import Table

    from deltakeeper.lens.overview import TARGETS

    if not names:
        return
    table = Table("variant", *names, title="probability and rank of tokens in the last layer", title_justify="left")
    for one in found:
        cells = []
        for name in names:
            probable, rank = one.bands[f"prob:{name}"], one.bands[f"rank:{name}"]
            reach = f"[dim]({probable.low[-1]:.2g} to {probable.high[-1]:.2g})[/]"
            cells.append(f"{probable.median[-1]:.2g} {reach}, {rank.median[-1]:.0f}")
        table.add_row(one.variant, *cells)
    console().print(table)
    console().print(f"[dim]medians over prompts, with quartiles; {TARGETS}[/]", highlight=False)


def print_overview(found: Sequence[VariantOverview], position: Mapping[str, Any]) -> None:
    """One row a variant, and the definitions of its numbers."""
    from rich.table import Table

    from deltakeeper.lens.overview import DEFINITIONS

    table = Table("variant", "commitment layer", "kept: lower, middle, upper third", "departs from the base at layer")
    for one in found:
        middle, low, high = one.commitment
        kept = "n/a" if one.kept is None else ", ".join("n/a" if s is None else f"{s:.2f}" for s in one.kept)
        departs = "–" if one.departs is None else str(one.departs)
        table.add_row(one.variant, f"{middle:.0f} [dim]({low:.0f} to {high:.0f})[/]", kept, departs)
    console().print(table)
    console().print(f"[dim]at position {position['place']} of those traced, {position['token']!r}[/]", highlight=False)
    for name, words in DEFINITIONS.items():
        console().print(f"[dim]{name}: {words}[/]", highlight=False)
