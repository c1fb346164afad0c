"""`deltakeeper report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deltakeeper.commands.output import console, print_json


def report(
    run: Annotated[Path, typer.Argument(help="Run folder of a study or of the demo.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Sum up a run over its seeds: a table for each attack, `summary.json`, and `summary.html` with the frontiers.

    Intervals are 95 % over seeds and prompts. The folder may still be worked on: finished cells are reported.

    Example: deltakeeper report runs/embedded
    """
    from deltakeeper.report.inside import write_inside
    from deltakeeper.report.lens_table import print_lens
    from deltakeeper.report.study_page import study_page
    from deltakeeper.report.study_table import print_study
    from deltakeeper.study.store import RunStore
    from deltakeeper.study.summarising import summarise
    from deltakeeper.study.summary import SUMMARY_NAME, write_summary
    from deltakeeper.whole_files import write_atomically

    store = RunStore(run)
    cells = store.read_cells()
    summary = summarise(cells, store.read_run())
    stored = write_summary(summary, run / SUMMARY_NAME)
    inside = write_inside(store, cells, summary)
    page = run / "summary.html"
    write_atomically(page, study_page(summary, inside))
    if as_json:
        print_json(json.loads(summary.to_text()))
        return
    screen = console()
    print_study(summary, screen)
    if inside.summary is not None:
        print_lens(inside.summary, screen)
    screen.print(f"\n{stored} and [link={page.resolve().as_uri()}]{page}[/link]", highlight=False, soft_wrap=True)
