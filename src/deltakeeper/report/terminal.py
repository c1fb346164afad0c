"""The same figures for the terminal: the two sentences and one table per attack."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deltakeeper.report.entries import AttackEntry, Digest, Estimate, ProbeEntry, VariantEntry
from deltakeeper.report.wording import (
    DASH,
    percent_range,
    points,
    points_range,
    rate,
    ratio,
    size,
)

_STYLES = {
    "base": "dim",
    "tuned": "bold",
    "codec": "cyan",
    "healed": "bright_cyan",
    "defended": "blue",
    "merged": "magenta",
    "quantised": "green",
    "control": "yellow",
}


def print_summary(digest: Digest, console: Console) -> None:
    """Print one table per attack and the answer; `*` marks changes that are clear after correction."""
    for attack in digest.attacks:
        console.print(_table(attack))
        console.print()
    console.print(digest.answer.attack, markup=False, highlight=False)
    console.print()
    console.print(digest.answer.usefulness, markup=False, highlight=False)


def _table(attack: AttackEntry) -> Table:
    n = attack.variants[0].goal.rate.n
    table = Table(
        title=f"{escape(attack.title)} [dim]({escape(attack.family)}, n = {n})[/]",
        title_justify="left",
        title_style="bold",
        caption="change in points against the fine-tune; * clear after correction",
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("variant", no_wrap=True)
    for name in (
        "size",
        "attack ↓",
        "change ↓",
        "gained",
        "skill ↑",
        "change ↑",
        "selectivity ↑",
        "refuses harmless ↓",
    ):
        table.add_column(name, justify="right")
    for entry in attack.variants:
        table.add_row(*_row(entry), style=_STYLES[entry.kind])
    return table


def _row(entry: VariantEntry) -> tuple[str, ...]:
    versus = entry.goal.versus_tuned
    stored = f"{size(entry.bytes)} ({ratio(entry.ratio)})" if entry.bytes is not None else DASH
    return (
        escape(entry.label),
        stored,
        _rate(entry.goal),
        _change(entry.goal),
        str(versus.gained) if versus else DASH,
        _rate(entry.skill),
        _change(entry.skill),
        _selectivity(entry.retention.selectivity) if entry.retention else DASH,
        rate(entry.over_refusal.rate.hits, entry.over_refusal.rate.value, entry.over_refusal.rate.high),
    )


def _rate(probe: ProbeEntry) -> str:
    spoken = rate(probe.rate.hits, probe.rate.value, probe.rate.high)
    return f"{spoken} ({percent_range(probe.rate.low, probe.rate.high)})" if probe.rate.hits else spoken


def _change(probe: ProbeEntry) -> str:
    versus = probe.versus_tuned
    if versus is None:
        return DASH
    gap = versus.difference
    return f"{points(gap.value)}{'*' if versus.direction else ''} ({points_range(gap.low, gap.high)})"


def _selectivity(estimate: Estimate) -> str:
    if not estimate.estimable:
        return "n/e"
    return f"{points(estimate.value)} ({points_range(estimate.low, estimate.high)})"
