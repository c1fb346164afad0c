"""`deltakeeper compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltakeeper.commands.output import bar, console, in_bytes, print_json, times

if TYPE_CHECKING:
    from deltakeeper.lens.layer_weights import LayerWeights


def compress(
    base: Annotated[str, typer.Argument(help="Base model: a folder, or a hub name org/model[@revision].")],
    tuned: Annotated[str, typer.Argument(help="Its fine-tune: a folder, a LoRA adapter folder, or a hub name.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Artifact folder to write.")] = None,
    codec: Annotated[
        str, typer.Option(help="Codec and settings, `name:field=value,…`; join several with `+`. See `codecs`.")
    ] = "bitdelta",
    embeddings: Annotated[
        str, typer.Option(help="Input embeddings and heads: `codec`, `dense`, `base`, or a codec of their own.")
    ] = "codec",
    norms: Annotated[str, typer.Option(help="Norms, biases and other vectors: `dense` or `base`.")] = "dense",
    target_size: Annotated[
        str | None, typer.Option(help="Most bytes of the artifact, such as 400MB; settings are chosen by tensor.")
    ] = None,
    target_ratio: Annotated[
        str | None, typer.Option(help="The same as a ratio: 16 means a sixteenth of the fine-tune.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Calibration text (.txt or .jsonl), for codecs and budgets that weigh errors.")
    ] = None,
    spare_layers: Annotated[
        Path | None,
        typer.Option(help="A ranking from `lens --patch`: with a target, layers that put back most get more bytes."),
    ] = None,
    starve_layers: Annotated[
        Path | None, typer.Option(help="The same, but they get fewer: for layers that carry what is not wanted.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its sizes, and write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compress the difference between a fine-tune and its base into a small folder.

    Example: deltakeeper compress ./base ./tuned -o ./delta --codec bitdelta:bits=2
    """
    from deltakeeper.codecs import wants_text
    from deltakeeper.commands.plan_table import print_forecast, show_plan
    from deltakeeper.compress import compress as run

    weigh = _read_weights(spare_layers, starve_layers)
    if dry_run:
        show_plan(
            base,
            tuned,
            codec,
            embeddings=embeddings,
            norms=norms,
            target_size=target_size,
            target_ratio=target_ratio,
            text=text,
            weigh=weigh,
            as_json=as_json,
        )
        return
    if out is None:
        raise typer.BadParameter("give the artifact folder to write, or --dry-run to see the plan.", param_hint="--out")
    with bar("Compress", quiet=as_json) as progress:
        report = run(
            base,
            tuned,
            out,
            codec,
            embeddings=embeddings,
            norms=norms,
            target_size=target_size,
            target_ratio=target_ratio,
            text=text,
            weigh=weigh,
            overwrite=overwrite,
            on_plan=None if as_json else print_forecast,
            progress=progress,
        )
    if as_json:
        print_json(report.to_json())
        return
    screen = console()
    total = report.total
    if text is None and (uncalibrated := wants_text(report.codec)):
        screen.print(f"Not calibrated, since no --text was given: {uncalibrated} fell back to equal weights.")
    screen.print(
        f"{out}: {in_bytes(report.nbytes)}, {times(report.ratio)} than the fine-tune "
        f"({in_bytes(report.full_bytes)}), {report.bits_per_weight:.2f} bits a weight."
    )
    screen.print(
        f"Relative error {total.relative_error:.3f}, cosine {total.cosine:.3f}, "
        f"{100 * total.zero_fraction:.0f} % of the weights had not changed. {report.seconds:.1f} s."
    )
    if total.relative_error > 1:
        screen.print(
            "That error is larger than the delta itself: entries were dropped at random and the others scaled up, "
            "which keeps the mean and adds noise. Measure what is left of the skill."
        )


def _read_weights(spare: Path | None, starve: Path | None) -> LayerWeights | None:
    from deltakeeper.errors import DataError
    from deltakeeper.lens.layer_weights import read_layer_weights

    if spare is not None and starve is not None:
        raise DataError("layers are spared or starved, not both; give one ranking.")
    if spare is None and starve is None:
        return None
    weigh = read_layer_weights(starve, "starve") if spare is None else read_layer_weights(spare, "spare")  # type: ignore[arg-type]
    if weigh.ranking.origin is None:
        typer.echo(
            f"deltakeeper: {weigh.source} does not say which pair it ranks the layers of; "
            "make sure that it is this one, or run `lens --patch` again.",
            err=True,
        )
    return weigh
