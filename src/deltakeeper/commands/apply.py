"""`deltakeeper apply`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltakeeper.commands.output import console


def apply(
    base: Annotated[str, typer.Argument(help="Base model: a folder or a hub name.")],
    delta: Annotated[str, typer.Argument(help="Artifact: a folder, or a hub name org/name[@revision].")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Model folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")] = False,
) -> None:
    """Write the fine-tune that an artifact makes of its base: a folder that transformers loads.

    Example: deltakeeper apply ./base ./delta -o ./tuned-again
    """
    from deltakeeper.apply import apply_delta
    from deltakeeper.hub import resolve_artifact

    console().print(f"Wrote {apply_delta(base, resolve_artifact(delta), out, overwrite=overwrite)}.")
