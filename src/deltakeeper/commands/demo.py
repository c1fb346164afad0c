"""`deltakeeper demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltakeeper.commands.output import console


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; an interrupted run there goes on.")] = Path(
        "runs/demo"
    ),
    attack: Annotated[
        list[str] | None,
        typer.Option("--attack", help="Only this recipe, or another one (may be given several times)."),
    ] = None,
    harmful: Annotated[
        str | None,
        typer.Option(
            help="Other held-out harmful requests: a CSV, JSONL or JSON file, or hf:organisation/dataset:split."
        ),
    ] = None,
) -> None:
    """Run a whole study on the embedded model: three attacks, five compressions, controls, one report.

    Takes minutes on two cores the first time; a finished run is only read and reported again.

    Example: deltakeeper demo --out runs/demo
    """
    from deltakeeper.demo import run_demo

    run_demo(out, console(), tuple(attack) if attack else None, harmful)
