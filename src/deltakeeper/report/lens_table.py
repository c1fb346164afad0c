"""What the lens saw of a run in the terminal: one table an attack, correlations, and definitions."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from deltakeeper.report.study_table import STYLES, new_table
from deltakeeper.report.wording import DASH, number, p_value, percent
from deltakeeper.study.lens_records import AttackLens, Layer, LensCorrelation, LensSummary


def print_lens(summary: LensSummary, console: Console) -> None:
    """Print one table an attack, its correlations, and what the numbers are."""
    for attack in summary.attacks:
        _print_attack(attack, console)
    for name, words in summary.definitions.items():
        console.print(f"[dim]{name}: {escape(words)}[/]", highlight=False)
    console.print()


def spell_layer(found: Layer) -> str:
    """A layer with its interval."""
    low, middle, high = ("never" if end is None else str(end) for end in (found.low, found.layer, found.high))
    return middle if low == high == middle else f"{middle} ({low} to {high})"


def spell_correlation(found: LensCorrelation) -> str:
    """One correlation with its two intervals, as a sentence."""
    head = f"Kept ({found.share}) and attack rate over {found.over}"
    if found.value is None:
        return f"{head}: {found.note}."
    parts = [f"\u03c1 = {number(found.value)}"]
    if found.low is not None:
        parts.append(f"{number(found.low)} to {number(found.high)} over arms")
    if found.sampled_low is not None:
        parts.append(f"{number(found.sampled_low)} to {number(found.sampled_high)} over seeds and prompts")
    return f"{head}: {', '.join(parts)}, {p_value(found.p)}; {found.note}."


def _print_attack(attack: AttackLens, console: Console) -> None:
    size = f"{attack.readings} readings, {len(attack.seeds)} seed{'' if len(attack.seeds) == 1 else 's'}"
    table = new_table(
        title=f"{escape(attack.title)} [dim](inside, {size})[/]",
        caption="kept of the stream's shift by thirds of the layers; layers with 95 % intervals",
    )
    table.add_column("arm", overflow="fold")
    for name in ("attack", "lower", "middle", "upper", "output", "commits", "departs", "nearer to the base from"):
        table.add_column(name, justify="right", overflow="fold")
    for arm in attack.arms:
        shares = [DASH if one.value is None else percent(one.value) for one in (*arm.kept, arm.kept_output)]
        departs = "" if arm.kind == "base" else spell_layer(arm.departs)
        returns = "" if arm.kind in ("base", "tuned") else spell_layer(arm.returns)
        rate = percent(arm.attack.value)
        table.add_row(
            escape(arm.label),
            rate,
            *shares,
            f"{arm.commitment:g}",
            departs,
            returns,
            style=STYLES.get(arm.kind, ""),
        )
    console.print(table)
    if attack.chosen:
        console.print("Prompts whose verdict flipped were looked into first: no fair sample of all.", highlight=False)
    for found in attack.correlations:
        console.print(spell_correlation(found), markup=False, highlight=False)
    console.print()
