"""Tables of what the lens saw over a study, from the `lens-summary.json` that `deltakeeper report` wrote."""

from __future__ import annotations

from typing import Any

from .tables import table

OPENING = """\
`{command}`, then `deltakeeper report`{where}. Read [lens.md](lens.md) beside it: a layer is where a difference is seen,
not where it is made.
"""
HEAD = (
    *("arm", "MB", "attack", "kept, lower third", "middle", "upper", "by the output"),
    *("commits at", "departs at", "nearer to the base from"),
)


def section(found: dict[str, Any]) -> str:
    """Markdown of a summary: definitions, and for each attack its table and correlations."""
    machine = found["machines"][0]
    where = f", {found['date']}: {machine['processor']}, {machine['cores']} cores"
    parts = [OPENING.format(command=found["command"], where=where)]
    parts.append("\n".join(f"- *{name}*: {words}" for name, words in found["definitions"].items()) + "\n")
    for attack in found["attacks"]:
        seeds = len(attack["seeds"])
        parts.append(
            f"**{attack['title']}** (`{attack['attack']}`): {attack['readings']} readings, {attack['prompts']} prompts "
            f"under {seeds} seed{'' if seeds == 1 else 's'}\n"
        )
        parts.append(table(HEAD, (_arm(arm) for arm in attack["arms"])))
        parts.append("\n".join(f"- {_correlation(one)}" for one in attack["correlations"]) + "\n")
    return "\n".join(parts)


def patching(rows: list[dict[str, Any]]) -> str:
    """Markdown of patching: what the strongest places put back, beside controls."""
    parts = []
    for row in rows:
        parts.append(
            f"**{row['title']}**: {row['receiver']} with layers of {row['donor']}, {row['prompts']} prompts, "
            f"{row['left_out']} left out; {row['outcome']}.\n"
        )
        head = ("place", "put back", "95 %")
        lines = []
        for kind, most in (("layer", 6), ("part", 6)):
            for place in row["rankings"][kind]["places"][:most]:
                name = " ".join([place["patched"], *map(str, place["layers"])]).strip()
                low, high = (_percent(place[end]) for end in ("low", "high"))
                lines.append((name, _percent(place["share"]), f"{low} to {high}"))
        parts.append(table(head, lines))
        sweep = row["restored"]["streams"]["shares"]
        half = next((i for i, share in enumerate(sweep) if share is not None and share >= 0.5), None)
        others = row["restored"]["streams_of_another_prompt"]["shares"]
        layers = sum(share or 0.0 for share in row["restored"]["layers"]["shares"][:-1])
        parts.append(
            f"Streams put back half from layer {'none' if half is None else half}; at that layer the stream of another "
            f"prompt puts back {'–' if half is None else _percent(others[half])}. At {_percent(row['neutral'])} the "
            f"receiver prefers neither token. All single layers together would put back {_percent(layers)}.\n"
        )
    return "\n".join(parts)


def speed(rows: dict[str, Any]) -> str:
    """Markdown of the time of twelve variants beside twelve passes of their own."""
    head = ("what", "seconds", "together, as a share of it")
    lines = ((row["what"], f"{row['seconds']:.0f}", f"{row['share']:.2f}") for row in rows["times"])
    return f"{rows['variants']} variants beside the base, {rows['prompts']} prompts.\n\n" + table(head, lines)


def _arm(arm: dict[str, Any]) -> tuple[str, ...]:
    reference = arm["kind"] in ("base", "tuned")
    return (
        arm["label"],
        "" if arm["bytes"] is None else f"{arm['bytes'] / 1e6:.1f}",
        _number(arm["attack"]),
        *(_number(one) for one in (*arm["kept"], arm["kept_output"])),
        f"{arm['commitment']:.0f}",
        "" if arm["kind"] == "base" else _layer(arm["departs"]),
        "" if reference else _layer(arm["returns"]),
    )


def _correlation(one: dict[str, Any]) -> str:
    head = f"Kept ({one['share']}) and attack rate over {one['over']}"
    if one["value"] is None:
        return f"{head}: {one['note']}."
    over = "" if one["low"] is None else f" [{one['low']:.2f}, {one['high']:.2f}] over arms"
    drawn = "" if one["sampled_low"] is None else f", [{one['sampled_low']:.2f}, {one['sampled_high']:.2f}] over draws"
    return f"{head}: ρ = {one['value']:.2f}{over}{drawn}, p = {one['p']:.2g}; {len(one['points'])} arms."


def _number(one: dict[str, Any]) -> str:
    if one["value"] is None:
        return "–"
    return f"{_percent(one['value'])} [{_whole(one['low'])}, {_whole(one['high'])}]"


def _whole(value: float) -> str:
    return f"{round(100 * value)}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{_whole(value)} %"


def _layer(one: dict[str, Any]) -> str:
    low, middle, high = ("never" if one[end] is None else str(one[end]) for end in ("low", "layer", "high"))
    return middle if low == high == middle else f"{middle} [{low}, {high}]"
