"""`deltakeeper import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltakeeper.commands.output import bar, console, in_bytes, print_json


def import_delta(
    source: Annotated[str, typer.Argument(help="A PEFT LoRA adapter (folder or hub name), or BitDelta's .pt file.")],
    base: Annotated[str, typer.Option(help="Base model: a folder, or a hub name org/model[@revision].")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Artifact folder to write.")],
    files: Annotated[
        Path | None, typer.Option(help="Folder with tokenizer and configuration of the fine-tune.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write another tool's delta as an artifact, without its fine-tune and without loss.

    Files are read without running any code in them.

    Example: deltakeeper import ./adapter --base ./base -o ./delta
    """
    from dataclasses import asdict

    from deltakeeper.importing import import_delta as run

    with bar("Import", quiet=as_json) as progress:
        report = run(source, base, out, files=files, overwrite=overwrite, progress=progress)
    if as_json:
        print_json(asdict(report))
        return
    console().print(
        f"{out}: {in_bytes(report.nbytes)}, {report.full_bytes / report.nbytes:.1f} times smaller than the model; "
        f"{report.changed} tensors changed, {report.unchanged} are the base's.",
        soft_wrap=True,
    )
