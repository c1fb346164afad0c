"""The plan of a compression as a table: what each group of tensors takes, and with a budget the error foreseen."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from rich.table import Table

from deltakeeper.budget.forecast import Forecast, GroupForecast
from deltakeeper.budget.weigh import Weigh
from deltakeeper.commands.output import bar, console, in_bytes, print_json, times

SHOWN = 3
"""Settings that are named for one group; with a budget there may be dozens."""


def show_plan(
    base: str | Path,
    tuned: str | Path,
    codec: str,
    *,
    embeddings: str = "codec",
    norms: str = "dense",
    target_size: str | None = None,
    target_ratio: str | None = None,
    text: str | Path | None = None,
    weigh: Weigh | None = None,
    as_json: bool = False,
) -> None:
    """Print what `compress` would make of a pair, and write nothing.

    Only headers are read, unless there is a budget: then every tensor is, because its error is measured (weighted by
    what layers are fed on `text`, if it is given).

    Raises:
        DeltakeeperError: as `compress` does.
    """
    from deltakeeper.budget import allocate, check_weigh, target_bytes, weigh_errors
    from deltakeeper.budget.forecast import forecast
    from deltakeeper.calibration import Calibration
    from deltakeeper.checkpoint import opened
    from deltakeeper.delta import pair
    from deltakeeper.model_folder import tuned_folder
    from deltakeeper.plan import Rules, choose_codec

    with opened(base) as origin, opened(tuned, base=origin) as target, ExitStack() as stack:
        models = pair(origin, target)
        budget = target_bytes(models, size=target_size, ratio=target_ratio)
        check_weigh(weigh, budgeted=budget is not None)
        rules = Rules(choose_codec(codec, budgeted=budget is not None), embeddings, norms)
        allocation = None
        if budget is not None:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deltakeeper-")))
            fed = None if text is None else Calibration(tuned_folder(target, origin, scratch), text).inputs
            with bar("Measure", quiet=as_json) as progress:
                weights = weigh_errors(weigh, models)
                allocation = allocate(models, rules, budget, inputs=fed, weights=weights, progress=progress)
        print_forecast(forecast(models, rules, allocation), as_json=as_json)


def print_forecast(found: Forecast, *, as_json: bool = False) -> None:
    """Print a forecast as a table, or as JSON."""
    if as_json:
        print_json(found.to_json())
        return
    screen = console()
    screen.print(plan_table(found))
    about, ratio = ("" if found.certain else "about "), times(found.full_bytes / found.total_bytes)
    screen.print(
        f"Artifact: {about}{in_bytes(found.total_bytes)}, {ratio} than the fine-tune ({in_bytes(found.full_bytes)})."
    )
    if found.target_bytes is not None:
        left = 1 - found.total_bytes / found.target_bytes
        screen.print(f"Budget: {in_bytes(found.target_bytes)}, of which {100 * left:.2f} % is left.")
    elif not all(group.known for group in found.groups.values()):
        screen.print("> marks sizes that only the data tell: they are not counted here.")
    elif not found.certain:
        screen.print("~ marks sizes that depend on the data: how many weights changed, or which entries are drawn.")


def plan_table(found: Forecast) -> Table:
    """One row for each group of tensors, one for the files about them, and the total."""
    measured = any(group.error is not None for group in found.groups.values())
    table = Table(box=None, header_style="bold")
    for title in ("group", "stored as"):
        table.add_column(title, overflow="fold")
    for title in ("tensors", "bytes", "ratio", *(["error"] if measured else [])):
        table.add_column(title, justify="right")
    for name, group in found.groups.items():
        error = ["" if group.error is None else f"{group.error:.3f}"] if measured else []
        table.add_row(name, _stored(group), str(group.tensors), _bytes(group), _ratio(group), *error)
    table.add_row("files", "manifest, report, headers, configuration", "", f"{found.file_bytes:,}", "")
    count = sum(group.tensors for group in found.groups.values())
    known = all(group.known for group in found.groups.values())
    about = "" if found.certain else "~" if known else ">"
    ratio = f"{found.full_bytes / found.total_bytes:.1f}"
    table.add_row("total", "", str(count), f"{about}{found.total_bytes:,}", ratio, style="bold")
    return table


def _stored(group: GroupForecast) -> str:
    shown = [name if len(group.stored) == 1 else f"{count} {name}" for name, count in group.stored.items()]
    more = len(shown) - SHOWN
    return ", ".join(shown[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _bytes(group: GroupForecast) -> str:
    return ("" if group.certain else "~" if group.known else ">") + f"{group.bytes:,}"


def _ratio(group: GroupForecast) -> str:
    return f"{group.ratio:.1f}" if group.bytes and group.known else "-"
