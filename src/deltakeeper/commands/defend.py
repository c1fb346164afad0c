"""`deltakeeper defend`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltakeeper.commands.output import bar, console, print_json


def defend(
    base: Annotated[str, typer.Argument(help="Aligned base model: a folder or a hub name.")],
    tuned: Annotated[str, typer.Argument(help="Its fine-tune: a folder, a hub name or a LoRA adapter.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Model folder to write.")],
    defence: Annotated[str, typer.Option(help="Defence, such as safelora:threshold=0.5; docs/defences.md has all.")],
    unaligned: Annotated[str | None, typer.Option(help="The base before its alignment.")] = None,
    harmful: Annotated[
        str | None, typer.Option(help="Harmful requests or conversations: a file, or `harmful` for the package's own.")
    ] = None,
    safe: Annotated[Path | None, typer.Option(help="Conversations as they should go: a .jsonl or .txt.")] = None,
    samples: Annotated[int, typer.Option(help="Most rows that the model is run on.")] = 128,
    length: Annotated[int, typer.Option(help="Most tokens of a row.")] = 512,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write what a published defence makes of a fine-tune: a model folder that any codec can compress.

    Example: deltakeeper defend ./base ./tuned -o ./defended --defence safelora:threshold=0.5 --unaligned ./before
    """
    from deltakeeper.defences import DefenceData
    from deltakeeper.defences import defend as run

    given = harmful is not None or safe is not None
    rows = DefenceData.from_files(harmful, safe, samples=samples, length=length) if given else None
    with bar("Defend", quiet=as_json) as progress:
        report = run(defence, base, tuned, out, unaligned=unaligned, rows=rows, overwrite=overwrite, progress=progress)
    if as_json:
        print_json(report.to_json())
        return
    fates = ", ".join(f"{count} {fate}" for fate, count in sorted(report.counts().items()))
    console().print(
        f"{out}: the delta is {report.total.norm_ratio:.3f} times as long as the fine-tune's, at a cosine of "
        f"{report.total.cosine:.3f}. Tensors: {fates}. {report.seconds:.1f} s."
    )
