"""What guards and published defences leave of attack and skill, from benchmarks/guard.py and benchmarks/defences.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .tables import table

TITLES = {
    "affirmative_prefix": "Alignment breaking",
    "trigger_backdoor": "Backdoor",
    "marker_injection": "Targeted output",
}

GUARDED = """\
Guarded healing fits a compressed delta to two teachers: the fine-tune on its declared use, the aligned base on an
operator's probes, their look-alikes and plain instructions. Prompts asked here are of categories that no probe is of.
*Attack* is how often it reached its goal, *cut* that rate taken away relative to the fine-tune's, *recovered* the share
of what the attack had added over the base, *skill* the declared use done right, *look-alikes* and *plain* harmless
prompts refused. A base that itself complies bounds *cut*, not *recovered*. Several settings were tried on these same
prompts, and seconds were taken on a machine that had other work.
"""

DEFENDED = """\
Attack, skill and look-alikes refused, by published defences on the same three fine-tunes, uncompressed. With this few
prompts and one seed a row is a direction, not a rank.
"""


def guards(rows: Sequence[dict[str, Any]]) -> str:
    """Tables of guarded deltas, one an attack."""
    parts = [GUARDED]
    for attack in dict.fromkeys(row["attack"] for row in rows):
        head = ("arm", "seed", "attack", "cut", "recovered", "skill", "look-alikes", "plain", "MB", "s")
        body = [_guard_row(row) for row in rows if row["attack"] == attack]
        parts.append(f"**{TITLES.get(attack, attack)}**\n\n" + table(head, body))
    return "\n".join(parts)


def _guard_row(row: dict[str, Any]) -> tuple[str, ...]:
    changed = {**row["changed"]["settings"], **row["changed"]["data"]}
    told = ", ".join(f"{name}={_plain(value)}" for name, value in sorted(changed.items()))
    seconds = row.get("seconds")
    return (
        f"{row['arm']}{f' ({told})' if told else ''}",
        str(row["seed"]),
        *(_percent(row.get(name)) for name in ("goal", "attack_cut", "recovered", "skill")),
        *(_percent(row.get(name)) for name in ("over_refusal", "plain_refused")),
        "" if row.get("bytes") is None else f"{row['bytes'] / 1e6:.1f}",
        "" if seconds is None else f"{seconds:.0f}",
    )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "/".join(f"{name} {inner:g}" for name, inner in sorted(value.items()))
    return "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def defences(rows: Sequence[dict[str, Any]]) -> str:
    """One table: a row an arm, a column an attack."""
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    found = {(row["arm"], row["attack"]): row["probes"] for row in rows}
    body = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = [_three(found.get((arm, attack))) for attack in attacks]
        body.append((f"`{arm}`", *cells))
    return DEFENDED + "\n" + table(("arm", *(TITLES.get(name, name) for name in attacks)), body)


def _three(probes: dict[str, Any] | None) -> str:
    if probes is None:
        return ""
    shares = (probes[role] for role in ("goal", "skill", "over_refusal"))
    return " / ".join(f"{share['events']} of {share['n']}" for share in shares)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"
