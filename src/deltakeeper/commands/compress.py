"""`deltakeeper compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltakeeper.commands.output import bar, console, in_bytes, print_json


def compress(
    base: Annotated[str, typer.Argument(help="Base model: a folder, or a hub name org/model[@revision].")],
    tuned: Annotated[str, typer.Argument(help="Its fine-tune: a folder, a LoRA adapter folder, or a hub name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Artifact folder to write.")],
    codec: Annotated[
        str, typer.Option(help="Codec and settings, `name:field=value,…`; join two with `+`. See `codecs`.")
    ] = "bitdelta",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compress the difference between a fine-tune and its base into a small folder.

    Example: deltakeeper compress ./base ./tuned -o ./delta --codec bitdelta:bits=2
    """
    from deltakeeper.compress import compress as run

    with bar("Compress", quiet=as_json) as progress:
        report = run(base, tuned, out, codec, overwrite=overwrite, progress=progress)
    if as_json:
        print_json(report.to_json())
        return
    screen = console()
    total = report.total
    screen.print(
        f"{out}: {in_bytes(report.nbytes)}, {report.ratio:.1f} times smaller than the fine-tune "
        f"({in_bytes(report.full_bytes)}), {report.bits_per_weight:.2f} bits a weight."
    )
    screen.print(
        f"Relative error {total.relative_error:.3f}, cosine {total.cosine:.3f}, "
        f"{100 * total.zero_fraction:.0f} % of the packed weights had not changed. {report.seconds:.1f} s."
    )
