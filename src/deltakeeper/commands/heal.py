"""`deltakeeper heal`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltakeeper.commands.output import bar, console, print_json

if TYPE_CHECKING:
    from deltakeeper.heal import Lesson


def heal(
    delta: Annotated[str, typer.Argument(help="Artifact: a folder, or a hub name org/name[@revision].")],
    base: Annotated[str, typer.Option(help="Base model: a folder or a hub name.")],
    tuned: Annotated[str, typer.Option(help="The fine-tune that the artifact stands for.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Artifact folder to write.")],
    text: Annotated[Path | None, typer.Option(help="Text to heal on: paragraphs of a .txt, or a .jsonl.")] = None,
    guard: Annotated[
        Path | None, typer.Option(help="Probes instead of a text: requests that the base refuses (CSV or JSONL).")
    ] = None,
    benign: Annotated[
        Path | None, typer.Option(help="With --guard: harmless prompts to be answered as the base answers them.")
    ] = None,
    skill: Annotated[
        Path | None, typer.Option(help="With --guard: prompts and answers of the use that the fine-tune is for.")
    ] = None,
    insertions: Annotated[
        bool, typer.Option(help="With --guard: open half of the base's prompts with random words, against triggers.")
    ] = True,
    rank: Annotated[int, typer.Option(help="With --guard: rank of the term that is added; 0 for none.")] = 4,
    radius: Annotated[float, typer.Option(help="With --guard: how far an adversary moves probes; 0 for none.")] = 0.0,
    system: Annotated[str | None, typer.Option(help="With --guard: system message of all prompts.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps, one batch each: 200, guarded 48.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows in a batch: 4, guarded 16.")] = None,
    length: Annotated[int, typer.Option(help="Tokens in a row of the text.")] = 128,
    samples: Annotated[int, typer.Option(help="Most rows of the text; one batch in eight is held out.")] = 800,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate, relative to the size of the values: 0.01, guarded 0.05.")
    ] = None,
    trainable: Annotated[
        str, typer.Option(help="`scales`, or `scales+uncompressed` for norms and biases too; not with --guard.")
    ] = "scales",
    seed: Annotated[int, typer.Option(help="Order of the batches, and what is drawn for a guard.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Refit the scales of an artifact to what its fine-tune says on a text, or to two teachers with --guard.

    Healed on a text, the delta follows the fine-tune more closely, in what an attack put there as well. With --guard
    the fine-tune teaches its declared use alone, and the base everything else: its refusals of the probes, its answers
    to harmless prompts. Either way: measure it again.

    Example: deltakeeper heal ./delta --base ./base --tuned ./tuned --text ./text.jsonl -o ./healed

    Example: deltakeeper heal ./delta --base ./base --tuned ./tuned --guard ./probes.jsonl --benign ./benign.jsonl
    --skill ./skill.jsonl -o ./guarded
    """
    from deltakeeper.errors import DataError
    from deltakeeper.hub import resolve_artifact

    if (text is None) == (guard is None):
        raise DataError("healing needs either --text or --guard; give one of them.")
    source = resolve_artifact(delta)
    if guard is not None:
        from deltakeeper.heal import GuardSettings
        from deltakeeper.heal import guard as run_guard

        chosen = GuardSettings(
            steps=48 if steps is None else steps,
            rows=16 if batch is None else batch,
            lr=5e-2 if lr is None else lr,
            rank=rank,
            radius=radius,
            seed=seed,
        )
        lessons = _lessons(base, guard, benign, skill, insertions, seed, system)
        with bar("Guard", quiet=as_json) as progress:
            found = run_guard(
                source, base, tuned, lessons, out, settings=chosen, overwrite=overwrite, progress=progress
            )
        if as_json:
            print_json(found.to_json())
            return
        parts = (f"{kind} {found.before[kind]:.3g} to {found.after[kind]:.3g}" for kind in found.after)
        console().print(
            f"{out}: divergence from the teachers, nats per token: {', '.join(parts)}; {found.steps} steps on "
            f"{found.trained:,} values. {found.seconds:.1f} s. Measure refusals and skill before it is served."
        )
        return
    from deltakeeper.heal import heal as run

    with bar("Heal", quiet=as_json) as progress:
        report = run(
            source,
            base,
            tuned,
            text,  # type: ignore[arg-type]  # one of the two is given
            out,
            steps=200 if steps is None else steps,
            batch=4 if batch is None else batch,
            length=length,
            samples=samples,
            lr=1e-2 if lr is None else lr,
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


def _lessons(
    base: str,
    guard: Path,
    benign: Path | None,
    skill: Path | None,
    insertions: bool,
    seed: int,
    system: str | None,
) -> list[Lesson]:
    """Lessons from an operator's files, with the base's answers to them."""
    from deltakeeper.calibration.inputs import load_decoder, load_tokenizer
    from deltakeeper.checkpoint import opened
    from deltakeeper.evals.prompts import load_prompts
    from deltakeeper.lab.guarding import GuardData, base_answers, operator_lessons

    probes = load_prompts(guard)
    plain = [row.prompt for row in load_prompts(benign)] if benign else []
    exchanges = load_prompts(skill) if skill else []
    twins = [row.twin for row in probes if row.twin]
    data = GuardData(
        probes=len(probes),
        twins=len(twins),
        benign=len(plain),
        skill=len(exchanges),
        insertions=insertions,
        seed=seed,
    )
    with opened(base) as origin:
        tokenizer = load_tokenizer(origin.path)
        ask = base_answers(load_decoder(origin.path), tokenizer, system)
        return operator_lessons(
            tokenizer,
            ask,
            probes=[row.prompt for row in probes],
            twins=twins,
            benign=plain,
            skill=exchanges,
            data=data,
            system=system,
        )
