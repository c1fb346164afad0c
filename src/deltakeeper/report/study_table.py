"""A run of several seeds in the terminal: one table per attack, and the paper's figures beside ours."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deltakeeper.report.wording import DASH, percent, percent_range, points, points_range, score, size
from deltakeeper.study.summary import AttackSummary, Number, PaperBest, Row, Summary

STYLES = {
    "base": "dim",
    "tuned": "bold",
    "codec": "cyan",
    "healed": "green",
    "defended": "blue",
    "merged": "magenta",
    "quantised": "white",
    "control": "yellow",
}
COLUMNS = (
    "size",
    "attack ↓",
    "taken ↑",
    "skill ↑",
    "loss ≤",
    "selectivity ↑",
    "over shrinking ↑",
    "over-refusal ↓",
    "new",
)


def print_study(summary: Summary, console: Console) -> None:
    """Print one table per attack (and one of its general tasks, if any), the paper's figures beside ours, and notes."""
    for attack in summary.attacks:
        console.print(_attack_table(attack))
        console.print()
        if attack.tasks():
            console.print(_task_table(attack))
            console.print()
    if summary.paper:
        console.print(_paper_table(summary))
        console.print()
    for note in summary.notes:
        console.print(note, markup=False, highlight=False)


def _attack_table(attack: AttackSummary) -> Table:
    known = " [red]knows the codec[/]" if attack.adaptive else ""
    seeds = len(attack.seeds)
    table = new_table(
        title=f"{escape(attack.title)} [dim]({escape(attack.family)}, {attack.prompts['goal']} prompts, "
        f"{seeds} seed{'' if seeds == 1 else 's'})[/]{known}",
        caption="differences in points; * clear (for taken: after correction); in brackets 95 % intervals; new: gained "
        "successes",
    )
    table.add_column("arm", overflow="fold")
    for name in COLUMNS:
        table.add_column(name, justify="right", overflow="fold")
    for row in attack.rows:
        table.add_row(*_cells(row), style=STYLES.get(row.kind, ""))
    return table


def _task_table(attack: AttackSummary) -> Table:
    table = new_table(
        title=f"{escape(attack.title)} [dim](general tasks)[/]",
        caption="score, and loss against the fine-tune's with its 95 % interval: above zero the arm is worse; a "
        "perplexity's loss is its rise",
    )
    table.add_column("arm", overflow="fold")
    for name in attack.tasks():
        table.add_column(escape(name), justify="right", overflow="fold")
        table.add_column("loss", justify="right", overflow="fold")
    for row in attack.rows:
        shown = [cell for name in attack.tasks() for cell in _task_cells(row, name)]
        table.add_row(escape(row.label), *shown, style=STYLES.get(row.kind, ""))
    return table


def new_table(title: str, caption: str) -> Table:
    """A table as all of a report's are."""
    found = Table(title=title, title_justify="left", title_style="bold", caption=caption, caption_justify="left")
    found.box, found.pad_edge = None, False
    return found


def _task_cells(row: Row, name: str) -> tuple[str, str]:
    loss = row.versus.utility.get(name) if row.versus else None
    change = DASH if loss is None else "n/e" if loss.value is None else _share(loss)
    return score(row.utility.get(name)), change


def _cells(row: Row) -> tuple[str, ...]:
    versus = row.versus
    first = (escape(row.label), size(row.bytes), _share(row.attack))
    if versus is None:
        return (*first, DASH, percent(row.skill.value), DASH, DASH, DASH, percent(row.over_refusal.value), DASH)
    return (
        *first,
        _difference(versus.absolute) + ("*" if versus.attack_test.clear else ""),
        percent(row.skill.value),
        percent(versus.loss_bound),
        _brief(versus.selectivity),
        _brief(versus.over_shrinking),
        percent(row.over_refusal.value),
        str(versus.gained),
    )


def _paper_table(summary: Summary) -> Table:
    table = new_table(
        title="Largest reduction at less than 10 % utility loss",
        caption="! the loss is not shown to be below 10 %; points and share of the fine-tune's rate are both given, "
        "since the paper's reading is not known",
    )
    table.add_column("family")
    for name in ("arXiv 2411.19530", "ours, points", "ours, relative", "guarded, points", "guarded, relative"):
        table.add_column(name, justify="right", overflow="fold")
    for cell in summary.paper:
        best = (cell.points, cell.relative, cell.healed_points, cell.healed_relative)
        table.add_row(cell.family, f"{cell.paper * 100:.2f} %", *map(_best, best))
    return table


def _best(best: PaperBest | None) -> str:
    if best is None:
        return "none"
    return f"{percent(best.reduction.value)}{'' if best.shown else '!'} {escape(best.variant)}"


def _share(number: Number) -> str:
    return f"{percent(number.value)} ({percent_range(number.low, number.high)})"


def _brief(number: Number) -> str:
    if number.value is None:
        return "n/e"
    return points(number.value) + ("*" if number.above_zero or number.below_zero else "")


def _difference(number: Number) -> str:
    if number.value is None:
        return "n/e"
    return f"{points(number.value)} ({points_range(number.low, number.high)})"
