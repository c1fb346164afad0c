"""`deltakeeper evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltakeeper.commands.output import bar, console, print_json

if TYPE_CHECKING:
    from deltakeeper.evals.stats import Estimate
    from deltakeeper.evals.utility import Comparison, Summary


def evaluate(
    base: Annotated[str, typer.Argument(help="Base model, or any model on its own: a folder or a hub name.")],
    task: Annotated[
        list[str],
        typer.Option(
            help="gsm8k|mmlu|piqa|truthfulqa|text=PATH (text: perplexity), or the name of a task of "
            "lm-evaluation-harness, whose data comes from the hub (may be given several times)."
        ),
    ],
    delta: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH: an artifact to evaluate beside the base (may be given several times)."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Items of each task, a fixed choice over all subjects; all by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many items of each task instead.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice.")] = 0,
    shots: Annotated[
        int | None, typer.Option(help="Few-shot examples, where a task takes any; what is usual by default.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the chat template.")] = False,
    reference: Annotated[str, typer.Option(help="Whom losses are measured against: `base` or a delta.")] = "base",
    kv_bytes: Annotated[int, typer.Option(help="Memory of the KV cache, in bytes.")] = 1 << 30,
    items: Annotated[
        Path | None, typer.Option(help="Write a record for every item and arm into this .jsonl file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print scores and losses as JSON.")] = False,
) -> None:
    """Measure what a base and its deltas can do, item by item, from one copy of the base and in one batch.

    Scores come with 95 % intervals. The loss of each delta is relative to the reference, on the same items, with its
    one-sided 95 % bound. Nothing is merged, and nothing is asked of the network where all tasks are files.

    Example: deltakeeper evaluate ./base --delta d=./delta --task piqa=./piqa --task mmlu=./mmlu.jsonl --samples 200
    """
    import time

    from deltakeeper.engine import EngineSettings
    from deltakeeper.errors import DataError
    from deltakeeper.evals.utility import ItemRecord, ask, compare, parse_task, prepared, summarise, to_lines
    from deltakeeper.live_base import named_sources, open_base
    from deltakeeper.study.scorer import BASE, scoring
    from deltakeeper.whole_files import write_atomically

    sources = [parse_task(text) for text in task]
    deltas = named_sources(delta or ())
    if reference != BASE and reference not in deltas:
        raise DataError(f"losses cannot be measured against '{reference}', which is neither base nor a delta given.")
    live = open_base(base)
    artifacts = live.artifacts(deltas)
    records, started = list[ItemRecord](), time.perf_counter()
    with (
        prepared(sources, samples=samples, limit=limit, seed=seed, shots=shots) as tasks,
        scoring(
            live.model, live.tokenizer, artifacts, settings=EngineSettings(kv_bytes=kv_bytes, max_running=32)
        ) as scorers,
        bar("Evaluate", quiet=as_json) as progress,
    ):
        for scorer in scorers:

            def tell(what: str, done: int, total: int, names: str = ", ".join(scorer.arms)) -> None:
                progress(done, total, f"{what}: {names}")

            records += ask(tasks, scorer, chat=chat, progress=tell)
        apart = len(scorers) > 1  # templates of their own make other prompts of the same items
    seconds = time.perf_counter() - started
    if items is not None:
        write_atomically(items, to_lines(records))
    arms = {arm: [r for r in records if r.arm == arm] for arm in (BASE, *deltas)}
    scores = {arm: summarise(own) for arm, own in arms.items()}
    losses = {
        arm: compare(arms[reference], own, same_prompts=not apart) for arm, own in arms.items() if arm != reference
    }
    cut = sum(score.truncated for own in scores.values() for score in own)
    if as_json:
        print_json(
            {
                "tasks": [facts.to_json() for facts in tasks.facts],
                "scores": {arm: [_score_json(score) for score in own] for arm, own in scores.items()},
                "losses": {arm: [_loss_json(loss) for loss in own] for arm, own in losses.items()},
                "reference": reference,
                "seed": seed,
                "chat": chat,
                "truncated": cut,
                "seconds": round(seconds, 1),
            }
        )
        return
    _print_tables(scores, losses, reference)
    files = {path: sha for facts in tasks.facts for path, sha in facts.sources.items()}
    for path, sha in files.items():
        console().print(f"{path}: sha256 {sha}")
    console().print(f"{len(records):,} values of {len(arms)} models in {seconds:.0f} s.")
    if cut:
        console().print(
            f"[bold red]{cut:,} of them belong to prompts whose start was cut: the context is too short.[/]"
        )


def _print_tables(scores: dict[str, list[Summary]], losses: dict[str, list[Comparison]], reference: str) -> None:
    from rich.table import Table

    from deltakeeper.evals.utility import Measure

    def title(measure: Measure) -> str:
        of = "" if measure.filter == "none" else f" ({measure.filter})"
        return f"{measure.task}{of} {measure.metric}"

    table = Table("measure", "items", *scores, title="Scores with 95 % intervals", title_justify="left")
    for rows in zip(*scores.values(), strict=True):
        table.add_row(title(rows[0].measure), str(rows[0].n), *(_interval(row.score) for row in rows))
    console().print(table)
    if not losses:
        return
    table = Table("measure", *losses, title=f"Loss against {reference}, and its upper bound", title_justify="left")
    for found in zip(*losses.values(), strict=True):
        table.add_row(title(found[0].measure), *map(_loss, found))
    console().print(table)


def _interval(score: Estimate) -> str:
    if score.value is None or score.low is None or score.high is None:
        return score.note
    digits = 3 if abs(score.value) < 2 else 2
    return f"{score.value:.{digits}f} [dim]({score.low:.{digits}f} to {score.high:.{digits}f})[/]"


def _loss(found: Comparison) -> str:
    if found.loss is None or found.bound is None:
        return "cannot tell"
    return f"{100 * found.loss:+.1f} % [dim](at most {100 * found.bound:+.1f} %)[/]"


def _score_json(score: Summary) -> dict[str, object]:
    value = score.score
    return {
        **score.measure._asdict(),
        "n": score.n,
        "value": value.value,
        "interval": _pair((value.low, value.high)),
        "truncated": score.truncated,
    }


def _loss_json(found: Comparison) -> dict[str, object]:
    return {
        **found.measure._asdict(),
        "n": found.n,
        "reference": found.reference,
        "value": found.other,
        "difference": found.difference.value,
        "interval": _pair((found.difference.low, found.difference.high)),
        "lost": found.lost,
        "gained": found.gained,
        "p": found.p,
        "loss": found.loss,
        "bound": found.bound,
        "within_tenth": found.within(),
    }


def _pair(ends: Sequence[float | None]) -> list[float] | None:
    return None if None in ends else [float(end) for end in ends if end is not None]
