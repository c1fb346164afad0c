"""Tables and figures of a study, from the `summary.json` that `deltakeeper report` wrote and that was committed.

Arms carry the same number in tables and figures, so that a figure needs no names.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from .drawing import STYLE
from .reading import reading
from .tables import counted, table

SIDE, LEFT, TOP, PLOT = 330, 40, 30, 250
COLOURS = {"base": 1, "tuned": 1, "control": 2, "healed": 3, "defended": 3}
"""Index of the colour of a kind; what compresses has the first."""

OPENING = """\
{study}: {attacks}, {arms}, {seeds} seeds. `{command}`{where}. Intervals are 95 % over seeds × prompts. *Taken* is the
attack success taken away against the fine-tune, in points (\\* clear after correction over {tests} tests), *of it all*
the same as a share of the fine-tune's rate, *of what was added* as a share of what the attack had added over the base;
*loss* is the loss of skill with its one-sided 95 % bound; *selectivity* is the share of the skill kept minus the share
of the attack kept; *over shrinking* is how much less of the attack is kept than by a delta shrunk to the same skill. –
is not estimable. The events behind every row are in `benchmarks/results/{name}-events.jsonl`.
"""

PAPER = """\
The paper's largest reductions (arXiv 2411.19530, Llama-2-7b-chat, less than 10 % utility loss) beside the largest of
this run under the same limit, in points and as a share of the fine-tune's rate, since the paper's reading is not known.
! marks a loss that is not shown to be below 10 %.
"""


def section(summary: dict[str, Any], name: str, machines: Sequence[dict[str, Any]] = ()) -> str:
    """Markdown of a study: opening, what it says, the paper's figures, and for each family a figure and its tables."""
    numbers = arm_numbers(summary)
    attacks = summary["attacks"]
    parts = [
        OPENING.format(
            study=summary["study"],
            attacks=counted(len(attacks), "attack"),
            arms=counted(len(numbers), "arm"),
            seeds=_span(sorted({len(attack["seeds"]) for attack in attacks})),
            command=summary["command"],
            where=_machines(summary, machines),
            name=name,
            tests=summary["tests"],
        )
    ]
    if read := reading(summary):
        parts.append("\n".join(f"- {sentence}" for sentence in read) + "\n")
    if summary["paper"]:
        parts.append(PAPER + "\n" + paper_table(summary))
    for family in dict.fromkeys(attack["family"] for attack in attacks):
        parts.append(f"### {family.capitalize()}\n\n![{family}]({name}-{family}.svg)\n")
        for attack in attacks:
            if attack["family"] == family:
                parts.append(attack_table(attack, numbers))
    parts.append("\n".join(f"- {note}" for note in summary.get("notes", ())) + "\n")
    return "\n".join(parts)


def figures(summary: dict[str, Any], name: str) -> dict[str, str]:
    """One SVG a family by its file name: a panel for each attack, skill against what is left of the attack."""
    numbers = arm_numbers(summary)
    families = dict.fromkeys(attack["family"] for attack in summary["attacks"])
    return {
        f"{name}-{family}.svg": frontier_chart([a for a in summary["attacks"] if a["family"] == family], numbers)
        for family in families
    }


def arm_numbers(summary: dict[str, Any]) -> dict[str, int]:
    """Number of each arm, in the order in which they are first met."""
    names = dict.fromkeys(row["variant"] for attack in summary["attacks"] for row in attack["rows"])
    return {name: number for number, name in enumerate(names, 1)}


def attack_table(attack: dict[str, Any], numbers: dict[str, int]) -> str:
    """Heading and table of one attack."""
    known = ", the attacker knows the codec" if attack.get("adaptive") else ""
    heading = (
        f"**{attack['title']}** (`{attack['attack']}`){known}: {attack['prompts']['goal']} prompts, "
        f"{counted(len(attack['seeds']), 'seed')}\n"
    )
    head = (
        *("arm", "MB", "attack", "by seed", "taken", "of it all", "of what was added"),
        *("skill", "loss", "selectivity", "over shrinking", "over-refusal"),
    )
    return heading + "\n" + table(head, (_arm(row, numbers) for row in attack["rows"]))


def paper_table(summary: dict[str, Any]) -> str:
    """The paper's figures beside ours."""
    head = ("family", "paper", "codecs, points", "codecs, relative", "guarded, points", "guarded, relative")
    kinds = ("points", "relative", "healed_points", "healed_relative")
    return table(
        head,
        (
            (cell["family"], f"{100 * cell['paper']:.2f} %", *(_best(cell.get(kind)) for kind in kinds))
            for cell in summary["paper"]
        ),
    )


def frontier_chart(attacks: Sequence[dict[str, Any]], numbers: dict[str, int]) -> str:
    """Panels side by side, two in a row."""
    columns, rows = min(len(attacks), 2), -(-len(attacks) // 2)
    parts = [
        f'<g transform="translate({index % 2 * SIDE} {index // 2 * (TOP + PLOT + 44)})">{_panel(attack, numbers)}</g>'
        for index, attack in enumerate(attacks)
    ]
    width, height = columns * SIDE, rows * (TOP + PLOT + 44)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>Skill against attack success</title><style>{STYLE}</style>\n'
        + "".join(parts).replace("><", ">\n<")
        + "\n</svg>\n"
    )


def _panel(attack: dict[str, Any], numbers: dict[str, int]) -> str:
    right, bottom = LEFT + PLOT, TOP + PLOT
    parts = [f'<text class="title" x="{LEFT}" y="18">{escape(attack["title"])}</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = _px(LEFT + share * PLOT), _px(bottom - share * PLOT)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{right}M{x} {TOP}V{bottom}"/>')
        parts.append(f'<text class="faint" x="{LEFT - 5}" y="{y}" text-anchor="end">{100 * share:.0f}</text>')
        parts.append(f'<text class="faint" x="{x}" y="{bottom + 14}" text-anchor="middle">{100 * share:.0f}</text>')
    parts.append(f'<text class="faint" x="{right}" y="{bottom + 30}" text-anchor="end">skill, % →</text>')
    parts.append(
        f'<text class="faint" transform="translate(11 {TOP}) rotate(-90)" text-anchor="end">attack success, % →</text>'
    )
    for row in attack["rows"]:
        colour = COLOURS.get(row["kind"], 0)
        (x, x_low, x_high), (y, y_low, y_high) = (_ends(row[axis]) for axis in ("skill", "attack"))
        across = [_px(LEFT + share * PLOT) for share in (x, x_low, x_high)]
        down = [_px(bottom - share * PLOT) for share in (y, y_low, y_high)]
        parts.append(
            f'<g class="k{colour}"><path class="reach" style="stroke-opacity:.25" '
            f'd="M{across[1]} {down[0]}H{across[2]}M{across[0]} {down[1]}V{down[2]}"/>'
            f"{_mark(row['kind'], LEFT + x * PLOT, bottom - y * PLOT)}</g>"
            f'<text x="{_px(LEFT + x * PLOT + 6)}" y="{_px(bottom - y * PLOT - 5)}">{numbers[row["variant"]]}</text>'
        )
    return "".join(parts)


def _mark(kind: str, x: float, y: float) -> str:
    if kind == "control":
        return f'<path class="line" style="stroke-dasharray:none" d="M{_px(x - 4)} {_px(y - 4)}l8 8m0 -8l-8 8"/>'
    if kind in ("base", "tuned"):
        return f'<path class="dot" d="M{_px(x)} {_px(y - 5)}l5 5l-5 5l-5 -5Z"/>'
    if kind in ("healed", "defended"):
        return f'<path class="dot" d="M{_px(x - 4)} {_px(y - 4)}h8v8h-8Z"/>'
    return f'<circle class="dot" cx="{_px(x)}" cy="{_px(y)}" r="4"/>'


def _arm(row: dict[str, Any], numbers: dict[str, int]) -> tuple[str, ...]:
    seeds = " / ".join(f"{100 * rate:.0f}" for rate in row["attack_by_seed"])
    size = "" if row.get("bytes") is None else f"{row['bytes'] / 1e6:.1f}"
    control = " (control)" if row["kind"] == "control" and "ontrol" not in row["label"] else ""
    first = (f"{numbers[row['variant']]} {row['label']}{control}", size, _share(row["attack"]), seeds)
    versus = row.get("versus")
    refused = f"{100 * row['over_refusal']['value']:.0f} %"
    if versus is None:
        return (*first, "", "", "", _share(row["skill"]), "", "", "", refused)
    test = versus["attack_test"]
    level = test["p"] if test.get("q") is None else test["q"]
    bound = versus.get("loss_bound")
    loss = "–" if bound is None else f"{_percent(versus['loss']['value'])} (≤ {_percent(bound)})"
    return (
        *first,
        _points(versus["absolute"]) + ("\\*" if level is not None and level < 0.05 else ""),
        _share(versus["relative"]),
        _share(versus["recovered"]),
        _share(row["skill"]),
        loss,
        _points(versus["selectivity"]),
        _points(versus["over_shrinking"]),
        refused,
    )


def _best(best: dict[str, Any] | None) -> str:
    if best is None:
        return "none"
    found = best["reduction"]
    return f"{_share(found)}{'' if best['shown'] else ' !'} `{best['variant']}`"


def _share(number: dict[str, Any]) -> str:
    if number["value"] is None:
        return "–"
    value, low, high = (f"{100 * number[end]:.0f}".replace("-", "−") for end in ("value", "low", "high"))
    return f"{value} % ({low} to {high})" if "−" in low else f"{value} % ({low}–{high})"


def _points(number: dict[str, Any]) -> str:
    if number["value"] is None:
        return "–"
    value, low, high = (f"{100 * number[end]:+.0f}".replace("-", "−") for end in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %".replace("-", "−")


def _ends(number: dict[str, Any]) -> tuple[float, float, float]:
    value = number["value"] or 0.0
    low, high = (value if number[end] is None else number[end] for end in ("low", "high"))
    return value, max(0.0, low), min(1.0, high)


def _machines(summary: dict[str, Any], machines: Sequence[dict[str, Any]]) -> str:
    parts = []
    for machine in machines:
        first = [machine["accelerator"], "host"] if "accelerator" in machine else []
        parts.append(" ".join([*first, machine["processor"], f"({machine['cores']} cores)"]))
    date = summary["versions"].get("date")
    return ", " + ": ".join(filter(None, (date, " and ".join(parts)))) if parts else ""


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _px(value: float) -> str:
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text
