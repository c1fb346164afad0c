"""`deltakeeper calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltakeeper.commands.output import console, print_json

if TYPE_CHECKING:
    from deltakeeper.evals.judges.calibration import Calibration, CorrectedRate
    from deltakeeper.evals.stats import Estimate


def calibrate(
    judge: Annotated[str, typer.Argument(help="`ours`, a phrase list (JSON), or a judge's settings (YAML or JSON).")],
    labels: Annotated[Path, typer.Argument(help="CSV with prompt, answer and label; also arm, stratum, weight.")],
    event: Annotated[str, typer.Option(help="What is decided: `refused` or `complied`.")] = "refused",
    answers: Annotated[
        Path | None, typer.Option(help="CSV with prompt, answer (and arm), whose refusal rates are corrected.")
    ] = None,
    beside: Annotated[
        list[str] | None, typer.Option(help="Another judge to compare with on the same answers; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the resampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Hold a judge against answers that people labelled, and correct rates for its errors.

    Example: deltakeeper calibrate ours labelled.csv --answers run.csv --beside xstest_strmatch.json
    """
    from deltakeeper.errors import DataError
    from deltakeeper.evals.judges import load_judge
    from deltakeeper.evals.judges.calibration import calibrate as run
    from deltakeeper.evals.judges.calibration import compare_judges, correct_rates, judge_labelled
    from deltakeeper.evals.judges.labelled import read_labels

    if event not in ("refused", "complied"):
        raise DataError(f"the event is '{event}'; give --event refused or --event complied.")
    if answers is not None and event != "refused":
        raise DataError("only rates of refusals are corrected; leave out --answers, or give --event refused.")
    rows = read_labels(labels)
    known = load_judge(judge)
    others = [load_judge(other) for other in beside or []]
    verdicts = judge_labelled(known, rows, event)  # type: ignore[arg-type]  # checked above
    found = run(known, rows, event, verdicts=verdicts, seed=seed)  # type: ignore[arg-type]
    rated = read_labels(answers, labelled=False) if answers else []
    rates = correct_rates(known, verdicts, rated, seed=seed)
    panel = compare_judges([known, *others], rated or rows) if others else None
    if as_json:
        print_json(
            {
                "calibration": found.to_json(),
                "corrected": [rate.to_json() for rate in rates],
                "panel": panel.to_json() if panel else None,
            }
        )
        return
    console().print(_quality_table(found))
    left_out = f" {found.gated} are empty or incoherent and left out." if found.gated else ""
    unread = f" {found.unparsed} have no verdict that could be read." if found.unparsed else ""
    console().print(f"{found.labelled} labelled answers.{left_out}{unread} Judge {found.sha256[:12]}.")
    if rates:
        console().print(_rates_table(rates))
    for line in panel.lines() if panel else []:
        console().print(line)


def _quality_table(found: Calibration) -> Any:
    from rich.table import Table

    table = Table("arm", "n", found.event, "sensitivity", "specificity", "accuracy", "kappa", "correctable")
    table.title = f"{found.judge} {found.version}"
    for arm, quality in found.arms.items():
        shown = [_percent(x) for x in (quality.sensitivity, quality.specificity, quality.accuracy)]
        kappa = _text(quality.kappa, "{:.2f}", 1)
        table.add_row(arm, str(quality.n), str(quality.events), *shown, kappa, "yes" if quality.correctable else "no")
    return table


def _rates_table(rates: list[CorrectedRate]) -> Any:
    from rich.table import Table

    table = Table("arm", "answers", "coherent", "refusals shown", "refusals corrected", "gated ASR corrected")
    for rate in rates:
        values = [_percent(x) for x in (rate.shown, rate.refused, rate.asr)]
        table.add_row(rate.arm, str(rate.n), str(rate.coherent), *values)
    return table


def _percent(estimate: Estimate) -> str:
    return _text(estimate, "{:.1f} %", 100)


def _text(estimate: Estimate, form: str, factor: float) -> str:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return estimate.note
    number = form.removesuffix(" %")
    ends = f"{number.format(factor * estimate.low)} to {number.format(factor * estimate.high)}"
    return f"{form.format(factor * estimate.value)} ({ends})"
