"""`deltakeeper verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from deltakeeper.commands.output import bar, console, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from deltakeeper.verify import VerifyReport


def verify(
    delta: Annotated[str, typer.Argument(help="Artifact: a folder, or a hub name org/name[@revision].")],
    base: Annotated[str, typer.Option(help="Base model: a folder or a hub name.")],
    tuned: Annotated[str | None, typer.Option(help="The true fine-tune, to measure the error by tensor.")] = None,
    tensors: Annotated[int, typer.Option(help="How many tensors to list, those of the largest error first.")] = 5,
    text: Annotated[
        Path | None, typer.Option(help="A .txt or .jsonl file, to compare predictions with the fine-tune's on it.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens of the text to look at.")] = 4096,
    precision: Annotated[
        Literal["float32", "stored"], typer.Option(help="Of the models on the text; `stored` takes less memory.")
    ] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check an artifact: its hashes, its base, what it decodes to, and how near that is to the fine-tune.

    With a text, one model is in memory at a time; the folder for temporary files (TMPDIR) holds a decoded checkpoint
    and the fine-tune's logits. Exit status 1 means that something is wrong with the artifact.

    Example: deltakeeper verify ./delta --base ./base --tuned ./tuned --text ./sample.txt
    """
    from deltakeeper.artifact import MANIFEST_NAME
    from deltakeeper.errors import ArtifactError
    from deltakeeper.hub import resolve_artifact
    from deltakeeper.verify import VerifyReport
    from deltakeeper.verify import verify as run

    source = resolve_artifact(delta)
    try:
        with bar("Verify", quiet=as_json) as progress:
            report = run(source, base, tuned, progress, text=text, tokens=tokens, precision=precision)
    except ArtifactError as error:
        if not (Path(source) / MANIFEST_NAME).is_file():
            raise  # not an artifact at all: a mistake of the call, not of the artifact
        report = VerifyReport(problems=[str(error)], exact=False)
    if as_json:
        print_json(report.to_json())
    else:
        _print(report, tensors, console())
    if not report.ok:
        raise typer.Exit(1)


def _print(report: VerifyReport, tensors: int, screen: Console) -> None:
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
    if report.worst[: max(0, tensors)]:
        table = Table(box=None, header_style="bold")
        table.add_column("largest errors", overflow="fold")
        for title in ("error", "cosine", "signs", "zeros"):
            table.add_column(title, justify="right")
        for name, found in report.worst[:tensors]:
            figures = (found.relative_error, found.cosine, found.sign_agreement, found.zero_fraction)
            table.add_row(name, *(f"{figure:.4f}" for figure in figures))
        screen.print(table)
    if report.text:
        table = Table(box=None, header_style="bold")
        for title in ("against the fine-tune", "KL a token (nats)", "largest", "same top token", "tokens"):
            table.add_column(title, justify="left" if title.startswith("against") else "right")
        for name, agreement in report.text.items():
            label = {"decoded": "decoded model", "base": "base, for reference"}.get(name, name)
            if agreement is None:
                table.add_row(label, "it lacks tokens of the text", "", "", "")
            else:
                top1 = f"{100 * agreement.top1:.1f} %"
                table.add_row(label, f"{agreement.kl:.5f}", f"{agreement.kl_worst:.3f}", top1, str(agreement.tokens))
        screen.print(table)
