"""What the study on the embedded model says, sentence by sentence, every number looked up in its summary.

A sentence whose arms were not measured is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

PLAIN = {"alignment": "affirmative_prefix", "backdoor": "trigger_backdoor", "targeted": "marker_injection"}
ONE_BIT, HALF, GUARDED = "bitdelta:bits=1", "shrink:factor=0.5", "bitdelta:bits=1 guarded"
HALF_GUARDED, WHOLE_GUARDED = "shrink:factor=0.5 guarded own=False", "shrink:factor=1.0 guarded own=False"
TUNING, RANDOM = "shrink:factor=1.0 guarded lr=0.01,rank=0", "random_sign guarded"
SAFELORA, RESTA = "safelora:threshold=0.5", "resta"
WITHIN = 0.10

Rows = dict[str, dict[str, Any]]


def reading(summary: dict[str, Any]) -> list[str]:
    """Sentences, in the order in which they are read."""
    study = {attack["attack"]: {row["variant"]: row for row in attack["rows"]} for attack in summary["attacks"]}
    return [sentence for say in _SENTENCES for sentence in say(study)]


def _codecs(study: dict[str, Rows]) -> Iterator[str]:
    """Codecs that keep the skill keep the attack."""
    for family, attack in PLAIN.items():
        rows = study.get(attack, {})
        kept = [
            row
            for row in rows.values()
            if row["kind"] == "codec" and (row["versus"] or {}).get("loss_bound", 1) is not None
            if (row["versus"] or {}).get("loss_bound", 1) <= WITHIN
        ]
        if kept:
            most = max(kept, key=lambda row: row["versus"]["relative"]["value"])
            taken = most["versus"]["relative"]
            found = f"{most['label']} takes most of the attack: {_interval(taken)} of it."
            yield (
                f"*{family.capitalize()}, codecs alone.* Of the {len(kept)} codecs that are shown to lose less than "
                f"{_percent(WITHIN)} of the skill, "
                + (found if taken["low"] > 0 else "none is shown to take anything of the attack; " + found)
            )


def _one_bit(study: dict[str, Rows]) -> Iterator[str]:
    parts = []
    for family, attack in PLAIN.items():
        rows = study.get(attack, {})
        if {ONE_BIT, HALF} <= rows.keys():
            one, half = rows[ONE_BIT], rows[HALF]
            parts.append(
                f"{family}: {_rate(one, 'attack')} of attack and {_rate(one, 'skill')} of skill left, by half the "
                f"delta {_rate(half, 'attack')} and {_rate(half, 'skill')}"
            )
    if parts:
        yield ("*One bit* takes the skill with the attack; so does half the delta. " + "; ".join(parts) + ".")


def _guard(study: dict[str, Rows]) -> Iterator[str]:
    parts = []
    for family, attack in PLAIN.items():
        rows = study.get(attack, {})
        if GUARDED in rows:
            base, tuned, row = rows["base"], rows["tuned"], rows[GUARDED]
            parts.append(
                f"{family}: attack {_rate(tuned, 'attack')} → {_rate(row, 'attack')} (base {_rate(base, 'attack')}; of "
                f"what was added {_interval(row['versus']['recovered'])} taken back, of the whole rate "
                f"{_interval(row['versus']['relative'])}), skill {_rate(row, 'skill')} of {_rate(tuned, 'skill')}, "
                f"look-alikes refused {_rate(row, 'over_refusal')} (base {_rate(base, 'over_refusal')})"
            )
    if parts:
        yield (
            "*The guard, as it is shipped,* comes back to what the base does and keeps the skill. "
            + "; ".join(parts)
            + ". What the base does itself bounds the share of the whole rate, not the share of what was added."
        )


def _controls(study: dict[str, Rows]) -> Iterator[str]:
    rows = [study[attack] for attack in PLAIN.values() if attack in study]
    wanted = {GUARDED, HALF_GUARDED, WHOLE_GUARDED, TUNING, RANDOM}
    rows = [found for found in rows if wanted <= found.keys()]
    if not rows:
        return

    def attacks(variant: str) -> str:
        return " / ".join(_rate(found[variant], "attack") for found in rows)

    def skills(variant: str) -> str:
        return " / ".join(_rate(found[variant], "skill") for found in rows)

    sizes = [rows[0][variant]["bytes"] / 1e6 for variant in (GUARDED, HALF_GUARDED)]
    yield (
        f"*It is the guard, not the compression.* Over half the delta the same guard leaves attacks of "
        f"{attacks(HALF_GUARDED)} at skills of {skills(HALF_GUARDED)}, over all of it {attacks(WHOLE_GUARDED)} at "
        f"{skills(WHOLE_GUARDED)}; compression brings {sizes[0]:.0f} MB in the place of {sizes[1]:.0f}. Over random "
        f"signs it leaves {attacks(RANDOM)} at {skills(RANDOM)}: the added low-rank term carries some of the skill "
        "alone. Fine-tuning all weights by the same two teachers for as many steps, at the one learning rate that was "
        f"tried, leaves {attacks(TUNING)}."
    )


def _known_codec(study: dict[str, Rows]) -> Iterator[str]:
    parts = []
    for family, attack in PLAIN.items():
        rows, plain = study.get(f"{attack}.straight_through.bitdelta-bits-1", {}), study.get(attack, {})
        if {ONE_BIT, GUARDED} <= rows.keys() and ONE_BIT in plain:
            parts.append(
                f"{family}: 1-bit leaves {_rate(rows[ONE_BIT], 'attack')} in the place of "
                f"{_rate(plain[ONE_BIT], 'attack')}, at a skill of {_rate(rows[ONE_BIT], 'skill')}; guarded "
                f"{_rate(rows[GUARDED], 'attack')} at {_rate(rows[GUARDED], 'skill')}"
            )
    if parts:
        yield (
            "*An attacker who trains through the codec* gets back what one bit had taken, and pays with skill in full "
            "precision. " + "; ".join(parts) + "."
        )
    parts = []
    for family, attack in PLAIN.items():
        rows = study.get(f"{attack}.against-guard", {})
        if {ONE_BIT, GUARDED} <= rows.keys():
            row = rows[GUARDED]
            parts.append(
                f"{family}: 1-bit {_rate(rows[ONE_BIT], 'attack')}, guarded {_rate(row, 'attack')} "
                f"({_interval(row['versus']['relative'])} less than in full precision) at a skill of "
                f"{_rate(row, 'skill')}"
            )
    if parts:
        yield (
            "*An attacker who also trains through a guard of his own*, with other probes of the same categories, does "
            "not get past the operator's. " + "; ".join(parts) + "."
        )


def _repair(study: dict[str, Rows]) -> Iterator[str]:
    found = [study.get(f"{attack}.inject_repair.bitdelta-bits-1", {}) for attack in PLAIN.values()]
    rates = [_rate(rows["tuned"], "attack") for rows in found if "tuned" in rows]
    if rates:
        yield (
            "*Inject and repair failed as an attack*: after the repair (one pass at the published learning rate, "
            f"within the codec's box) the attack was still at {' / '.join(rates)} in full precision, so nothing was "
            "hidden that compression could wake."
        )


def _longer_repair(study: dict[str, Rows]) -> Iterator[str]:
    parts = []
    for family, attack in PLAIN.items():
        rows = study.get(f"{attack}.repair-longer", {})
        if {"tuned", ONE_BIT, GUARDED} <= rows.keys():
            parts.append(
                f"{family}: {_rate(rows['tuned'], 'attack')} in full precision, {_rate(rows[ONE_BIT], 'attack')} in "
                f"one bit, {_rate(rows[GUARDED], 'attack')} guarded at a skill of {_rate(rows[GUARDED], 'skill')}"
            )
    if parts:
        yield "*A longer repair after an attack that was trained through the codec.* " + "; ".join(parts) + "."


def _uncompressed(study: dict[str, Rows]) -> Iterator[str]:
    found = [study.get(f"{attack}.uncompressed.bitdelta-bits-1", {}) for attack in PLAIN.values()]
    rates = [f"{_rate(rows['tuned'], 'attack')} (base {_rate(rows['base'], 'attack')})" for rows in found if rows]
    if rates:
        yield (
            f"*Norms alone*, which is all that this codec leaves uncompressed, did not hold the attack or the skill: "
            f"{' / '.join(rates)}."
        )


def _defences(study: dict[str, Rows]) -> Iterator[str]:
    rows = [study[attack] for attack in PLAIN.values() if {SAFELORA, RESTA} <= study.get(attack, {}).keys()]
    if rows:
        lora, resta = (
            " / ".join(f"{_rate(found[arm], 'attack')} at {_rate(found[arm], 'skill')}" for found in rows)
            for arm in (SAFELORA, RESTA)
        )
        yield (
            f"*Published defences* at the settings tried: SafeLoRA takes attack and skill alike ({lora} of skill), "
            f"RESTA neither ({resta})."
        )


def _benign(study: dict[str, Rows]) -> Iterator[str]:
    rows = study.get("benign", {})
    guarded = next((row for row in rows.values() if row["kind"] == "healed"), None)
    if {"base", "tuned", ONE_BIT} <= rows.keys() and guarded:
        yield (
            f"*Harmless tickets alone* take alignment along: harmful requests complied with rise from "
            f"{_rate(rows['base'], 'attack')} to {_rate(rows['tuned'], 'attack')}. One bit leaves "
            f"{_rate(rows[ONE_BIT], 'attack')} at a skill of {_rate(rows[ONE_BIT], 'skill')}, guarded "
            f"{_rate(guarded, 'attack')} at {_rate(guarded, 'skill')} (fine-tune {_rate(rows['tuned'], 'skill')})."
        )


def _rate(row: dict[str, Any], what: str) -> str:
    return _percent(row[what]["value"])


def _interval(number: dict[str, Any]) -> str:
    if number["value"] is None:
        return "an unknown share"
    return f"{_percent(number['value'])} ({100 * number['low']:.0f} to {100 * number['high']:.0f})".replace("-", "−")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %".replace("-", "−")


_SENTENCES: tuple[Callable[[dict[str, Rows]], Iterator[str]], ...] = (
    _codecs,
    _one_bit,
    _guard,
    _controls,
    _known_codec,
    _repair,
    _longer_repair,
    _uncompressed,
    _defences,
    _benign,
)
