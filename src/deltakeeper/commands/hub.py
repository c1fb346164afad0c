"""`deltakeeper push` and `deltakeeper pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltakeeper.commands.output import console


def push(
    delta: Annotated[Path, typer.Argument(help="Artifact folder.")],
    repository: Annotated[str | None, typer.Argument(help="Model repository on the hub, organisation/name.")] = None,
    to: Annotated[str | None, typer.Option(help="Address of a running service to push to, instead of the hub.")] = None,
    name: Annotated[
        str | None, typer.Option(help="What the service is to call it; the folder's name by default.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(envvar="DELTAKEEPER_KEY", show_envvar=True, help="Admin key of the service; better not typed."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made where it does not exist.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Commit message.")] = None,
) -> None:
    """Verify an artifact and upload it to the Hugging Face hub, with the token that `hf auth login` stored.

    With --to it goes to a running service, which checks it and puts it among its deltas.

    Example: deltakeeper push ./delta my-org/my-model-delta --private
    """
    from deltakeeper.errors import DataError

    if (repository is None) == (to is None):
        raise DataError("say where to push to: either a repository on the hub, or a service with --to.")
    if to is not None:
        from deltakeeper.service.uploads.sending import send_artifact

        found = send_artifact(delta, to, name or delta.resolve().name, key=key or None)
        console().print(f"Pushed {delta} to {to} as {found['id']} ({found['bytes']:,} bytes).", soft_wrap=True)
        return
    assert repository is not None
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
