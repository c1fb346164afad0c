"""`deltakeeper push` and `deltakeeper pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltakeeper.commands.output import console


def push(
    delta: Annotated[Path, typer.Argument(help="Artifact folder.")],
    repository: Annotated[str, typer.Argument(help="Model repository on the hub, organisation/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made where it does not exist.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Commit message.")] = None,
) -> None:
    """Verify an artifact and upload it to the Hugging Face hub, with the token that `hf auth login` stored.

    Example: deltakeeper push ./delta my-org/my-model-delta --private
    """
    from deltakeeper.hub import push as run

    address = run(delta, repository, private=private, revision=revision, message=message)
    console().print(f"Pushed {delta} to {repository}: {address}", soft_wrap=True)


def pull(
    source: Annotated[str, typer.Argument(help="Artifact on the hub, organisation/name[@revision].")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Artifact folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is there.")] = False,
) -> None:
    """Download an artifact from the Hugging Face hub and verify it.

    Example: deltakeeper pull my-org/my-model-delta@main -o ./delta
    """
    from deltakeeper.hub import pull as run

    console().print(f"Wrote {run(source, out, overwrite=overwrite)}.", soft_wrap=True)
