"""`deltakeeper inspect`."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated

import typer
from rich.table import Table

from deltakeeper.commands.output import console, in_bytes, print_json, times


def inspect(
    delta: Annotated[str, typer.Argument(help="Artifact: a folder, or a hub name org/name[@revision].")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Show what an artifact holds: base, codec, sizes, and what was done with each kind of tensor.

    Example: deltakeeper inspect ./delta --tensors
    """
    from deltakeeper.artifact import open_artifact
    from deltakeeper.hub import resolve_artifact

    artifact = open_artifact(resolve_artifact(delta))
    manifest = artifact.manifest
    if as_json:
        print_json(
            {
                "base": {"name_or_path": manifest.base.name_or_path, "root": manifest.base.root},
                "target": {"name_or_path": manifest.target.name_or_path, "root": manifest.target.root},
                "codec": manifest.codec,
                "exact": manifest.exact,
                "bytes": artifact.nbytes,
                "side_bytes": artifact.side_bytes,
                "full_bytes": artifact.full_bytes,
                "bits_per_weight": artifact.bits_per_weight,
                "missing": list(manifest.missing),
                "tensors": {
                    name: {
                        "shape": list(record.shape),
                        "role": record.role,
                        "encoding": record.encoding,
                        "layouts": sorted({term.layout for term in record.terms}),
                        "bytes": record.stored_bytes,
                    }
                    for name, record in sorted(manifest.tensors.items())
                },
            }
        )
        return
    screen = console()
    screen.print(f"Delta of  {manifest.target.name_or_path}\nOn base   {manifest.base.name_or_path}")
    screen.print(f"          root {manifest.base.root[:16]}…\nCodec     {manifest.codec}")
    screen.print(
        f"Size      {in_bytes(artifact.nbytes)}, {artifact.bits_per_weight:.2f} bits a weight, "
        f"{times(artifact.full_bytes / artifact.nbytes)} than {in_bytes(artifact.full_bytes)}"
    )
    screen.print(f"Besides   {in_bytes(artifact.side_bytes)} of tokenizer and model card")
    table = Table(box=None, header_style="bold")
    for title in ("role", "stored as"):
        table.add_column(title, overflow="fold")
    for title in ("tensors", "bytes"):
        table.add_column(title, justify="right")
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name, record in sorted(manifest.tensors.items()):
        stored = " + ".join(dict.fromkeys(term.layout for term in record.terms)) or record.encoding
        groups[(name, f"{record.role}: {stored}") if tensors else (record.role, stored)].append(record.stored_bytes)
    for (first, second), sizes in groups.items():
        table.add_row(first, second, str(len(sizes)), f"{sum(sizes):,}")
    screen.print(table)
