"""`deltakeeper verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltakeeper.commands.output import bar, console, print_json


def verify(
    delta: Annotated[Path, typer.Argument(help="Artifact folder.")],
    base: Annotated[str, typer.Option(help="Base model: a folder or a hub name.")],
    tuned: Annotated[str | None, typer.Option(help="The true fine-tune, to measure the error by tensor.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check an artifact: its hashes, its base, what it decodes to, and how near that is to the fine-tune.

    Exit status 1 means that something is wrong with it.

    Example: deltakeeper verify ./delta --base ./base --tuned ./tuned
    """
    from deltakeeper.verify import verify as run

    with bar("Verify", quiet=as_json) as progress:
        report = run(delta, base, tuned, progress)
    if as_json:
        print_json(report.to_json())
    else:
        screen = console()
        for problem in report.problems:
            screen.print(f"Wrong: {problem}")
        if report.ok:
            screen.print("The artifact is whole and belongs to this base.")
            decodes = "to the very bytes it promises" if report.exact else "through matrix products, so not bit by bit"
            screen.print(f"It decodes {decodes}.")
        if report.total:
            total = report.total
            screen.print(
                f"Against the fine-tune, after rounding: relative error {total.relative_error:.4f}, cosine "
                f"{total.cosine:.4f}, sign agreement {total.sign_agreement:.4f}, zero share {total.zero_fraction:.2f}."
            )
    if not report.ok:
        raise typer.Exit(1)
