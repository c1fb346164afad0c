"""`deltakeeper study`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from deltakeeper.commands.output import console, print_json


def study(
    file: Annotated[Path, typer.Argument(help="Study file, such as studies/synthetic.yaml.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; an interrupted run there goes on.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show cells, time, memory and disk; load no model and need no weights.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes side by side, each on fine-tunes of its own.")] = 1,
    ray: Annotated[
        bool, typer.Option("--ray", help="Work as Ray tasks, on the cluster of RAY_ADDRESS or here.")
    ] = False,
    only: Annotated[str | None, typer.Option(help="Only this group, or GROUP/RECIPE.")] = None,
    discard_models: Annotated[
        bool, typer.Option("--discard-models", help="Remove weights and deltas once all their arms are measured.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome, or the estimate, as JSON.")] = False,
) -> None:
    """Run a study from its file: base, recipes, codecs, fidelities, attackers and seeds, into one run folder.

    Every result is kept under a hash of all that it depends on: a run that was killed goes on where it stopped, and a
    changed file measures only what changed. Arms that fail are told at the end, with exit status 1.

    Example: deltakeeper study studies/synthetic.yaml -o runs/synthetic
    """
    from deltakeeper.study.file import load_study

    found = load_study(file)
    screen = console()
    if dry_run:
        from deltakeeper.commands.forecast_table import print_forecast
        from deltakeeper.study.forecast import forecast

        estimate = forecast(found, workers=workers, only=only, discard=discard_models)
        if as_json:
            print_json(estimate.to_json())
        else:
            print_forecast(estimate, screen)
        return
    import torch
    from rich.console import Console

    from deltakeeper.study.progress import Progress
    from deltakeeper.study.run import run_study

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    command = f"deltakeeper study {shlex.quote(str(file))} -o {shlex.quote(str(out))}"
    with Progress(Console(stderr=True) if as_json else screen) as progress:
        outcome = run_study(
            found, out, progress, command=command, workers=workers, ray=ray, only=only, discard=discard_models
        )
    if as_json:
        print_json({"measured": outcome.measured, "planned": outcome.planned, "failures": outcome.failures})
    else:
        screen.print(f"{outcome.measured} of {outcome.planned} cells measured in {out}.", highlight=False)
        for name, said in outcome.failures.items():
            screen.print(f"Failed: {name}: {said}", highlight=False, markup=False)
        screen.print(f"Read them with: deltakeeper report {out}", highlight=False)
    if outcome.failures:
        raise typer.Exit(1)
