"""`deltakeeper heal`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltakeeper.commands.output import bar, console, print_json


def heal(
    delta: Annotated[str, typer.Argument(help="Artifact: a folder, or a hub name org/name[@revision].")],
    base: Annotated[str, typer.Option(help="Base model: a folder or a hub name.")],
    tuned: Annotated[str, typer.Option(help="The fine-tune that the artifact stands for.")],
    text: Annotated[Path, typer.Option(help="Text to heal on: paragraphs of a .txt, or a .jsonl.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Artifact folder to write.")],
    steps: Annotated[int, typer.Option(help="Steps, one batch each.")] = 200,
    batch: Annotated[int, typer.Option(help="Rows in a batch.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens in a row.")] = 128,
    samples: Annotated[int, typer.Option(help="Most rows; one batch in eight is held out.")] = 800,
    lr: Annotated[float, typer.Option(help="Learning rate, relative to the size of the values.")] = 1e-2,
    trainable: Annotated[
        str, typer.Option(help="`scales`, or `scales+uncompressed` for norms and biases too.")
    ] = "scales",
    seed: Annotated[int, typer.Option(help="Order of the batches.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Refit the scales of an artifact to what its fine-tune says on a text.

    The healed delta follows the fine-tune more closely, in what an attack put there as well: measure it again.

    Example: deltakeeper heal ./delta --base ./base --tuned ./tuned --text ./text.jsonl -o ./healed
    """
    from deltakeeper.heal import heal as run
    from deltakeeper.hub import resolve_artifact

    source = resolve_artifact(delta)
    with bar("Heal", quiet=as_json) as progress:
        report = run(
            source,
            base,
            tuned,
            text,
            out,
            steps=steps,
            batch=batch,
            length=length,
            samples=samples,
            lr=lr,
            trainable=trainable,  # type: ignore[arg-type]  # checked there
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print_json(report.to_json())
        return
    fate = "" if report.improved else " No step made it smaller, so the values are as they were."
    console().print(
        f"{out}: difference to the fine-tune's logits on held-out text (mean square) {report.before:.4g} before, "
        f"{report.after:.4g} after {report.steps} steps on {report.trained:,} values. {report.seconds:.1f} s.{fate}"
    )
