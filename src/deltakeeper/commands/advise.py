"""`deltakeeper advise`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from deltakeeper.commands.output import console, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from deltakeeper.advice import Advice, Arm


def advise(
    run: Annotated[Path, typer.Argument(help="Run folder of a study.")],
    max_loss: Annotated[float, typer.Option(help="Largest loss of skill, as a share; it must be shown.")] = 0.1,
    family: Annotated[
        list[str] | None, typer.Option("--family", help="Only attacks of this family (may be given several times).")
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Largest size of a delta.")] = None,
    max_over_refusal: Annotated[
        float | None, typer.Option(help="Largest rise of refused harmless prompts over the base, as a share.")
    ] = None,
    adaptive: Annotated[bool, typer.Option("--adaptive", help="Let attackers who know the codec count.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the advice as JSON.")] = False,
) -> None:
    """Pick the codec and fidelity that leave the least of the attacks and keep the skill, or say that none can be told.

    Risk is the success of the worst attack minus the base's. A loss of skill is within the limit if its one-sided 95 %
    bound is; a risk is lower if it clearly is, at 5 % after correction. Controls never win.

    Example: deltakeeper advise runs/embedded --max-loss 0.1 --family backdoor
    """
    from pydantic import ValidationError

    from deltakeeper.advice import Terms
    from deltakeeper.advice import advise as choose
    from deltakeeper.errors import DataError
    from deltakeeper.study.store import RunStore

    try:
        terms = Terms(
            max_loss=max_loss,
            families=tuple(family or ()),
            max_bytes=max_bytes,
            max_over_refusal=max_over_refusal,
            adaptive=adaptive,
        )
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise DataError(f"{option}: {first['msg'].lower()}; shares lie between 0 and 1.") from error
    advice = choose(RunStore(run).read_cells(), terms)
    if as_json:
        print_json(advice.model_dump(mode="json"))
    else:
        _print(advice, console())


def _print(advice: Advice, screen: Console) -> None:
    table = Table(
        title=f"Worst of {len(advice.attacks)} attacks ({', '.join(advice.families)})",
        title_justify="left",
        caption="risk and over-refusal: points over the base; * on the frontier of risk and loss",
        caption_justify="left",
        box=None,
        header_style="bold",
        pad_edge=False,
    )
    for name in ("risk ↓", "loss (at most) ↓", "over-refusal", "size"):
        table.add_column(name, justify="right", no_wrap=name != "over-refusal")
    table.add_column("arm", overflow="fold")
    for arm in advice.arms:
        style = "bold green" if arm.variant == advice.pick else "dim" if arm.refused else ""
        table.add_row(*_row(arm), style=style)
    screen.print(table)
    screen.print()
    for line in (advice.sentence, *advice.cautions):
        screen.print(line, markup=False, highlight=False)


def _row(arm: Arm) -> tuple[str, ...]:
    from deltakeeper.advice.wording import percent, signed
    from deltakeeper.report.wording import size

    bound = "" if arm.loss_bound is None else f"{percent(arm.loss.value)} ({percent(arm.loss_bound)})"
    reason = f"\n  {escape(arm.refused)}" if arm.refused else ""
    return (
        "" if arm.risk.value is None else signed(arm.risk.value),
        bound,
        "" if arm.over_refusal.value is None else signed(arm.over_refusal.value),
        "" if arm.bytes is None else size(arm.bytes),
        escape(arm.variant) + (" *" if arm.frontier else "") + reason,
    )
