"""What published defences leave of attack and skill, from benchmarks/defences.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .tables import table

TITLES = {
    "affirmative_prefix": "Alignment breaking",
    "trigger_backdoor": "Backdoor",
    "marker_injection": "Targeted output",
}

DEFENDED = """\
Attack, skill and look-alikes refused, by published defences on the same three fine-tunes, uncompressed. With this few
prompts and one seed a row is a direction, not a rank.
"""


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
