"""A run of several seeds as one HTML file that loads nothing: a frontier per attack, every number, the paper's."""

from __future__ import annotations

from collections.abc import Callable

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from deltakeeper.report import figures, wording
from deltakeeper.report.assets import asset, excerpt, source_hash
from deltakeeper.report.figures import Mark, Span
from deltakeeper.report.inside import Inside
from deltakeeper.report.wording import DASH
from deltakeeper.study.summary import AttackSummary, Number, Row, Summary

KINDS = {
    "base": "base model",
    "tuned": "fine-tune",
    "codec": "compressed delta",
    "healed": "healed delta",
    "defended": "defended fine-tune",
    "merged": "merged and rounded",
    "quantised": "whole model quantised",
    "control": "control",
}
STYLE = """
.k-healed { --k: #2b7a0b; } .k-defended { --k: #7a5c00; }
@media (prefers-color-scheme: dark) { .k-healed { --k: #7fd65a; } .k-defended { --k: #d8b64a; } }
.scroll { overflow-x: auto; } td { white-space: nowrap; } ul.lead { padding-left: 1.2em; }
"""
_LABEL = 200


def study_page(summary: Summary, inside: Inside | None = None) -> str:
    """The page of a summary, with what the lens saw; the same of both gives the same text, byte for byte."""
    seen = inside or Inside()
    style = asset("report.css") + STYLE + asset("inside.css")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    filters: dict[str, Callable[..., str]] = {
        "seen": lambda text: excerpt(str(text), _LABEL),
        "percent": wording.percent,
        "size": wording.size,
        "p": wording.p_value,
        "q": lambda value: wording.p_value(value, "q"),
        "share": _share,
        "score": wording.score,
        "points": _points,
        "swatch": lambda kind: Markup(figures.swatch(kind)),
        "frontier": lambda attack: Markup(frontier_of(attack)),
    }
    environment.filters |= filters
    present = {row.kind for attack in summary.attacks for row in attack.rows}
    text = environment.from_string(asset("study.html.j2")).render(
        summary=summary,
        inside=seen.section,
        model=summary.model.get("name", "unnamed model"),
        style=Markup(style),
        style_hash=source_hash(style),
        kinds=[(kind, title) for kind, title in KINDS.items() if kind in present],
    )
    return text + "\n"


def frontier_of(attack: AttackSummary) -> str:
    """Skill against what is left of the attack; references are drawn first, what could be served on top."""
    rank = {kind: place for place, kind in enumerate(("base", "tuned", "control", "quantised", "merged", "defended"))}
    rows = sorted(attack.rows, key=lambda row: rank.get(row.kind, len(rank)))
    return figures.frontier(
        [Mark(_short(row), row.kind, _span(row.skill), _span(row.attack)) for row in rows],
        identity="frontier-" + "".join(c if c.isalnum() else "-" for c in attack.attack.lower()),
        title=f"{attack.title}: attack success against skill",
        x_name="skill, %",
        y_name="attack success, %",
    )


def _short(row: Row) -> str:
    fixed = {"base": "base", "tuned": "fine-tune"}.get(row.kind)
    return fixed or excerpt(row.label.removeprefix("Control: ").split(",")[0].split("(")[0].strip() or row.variant, 40)


def _span(number: Number) -> Span:
    value = number.value or 0.0
    low, high = (value if end is None else end for end in (number.low, number.high))
    return Span(*(min(1.0, max(0.0, share)) for share in (value, low, high)))


def _share(number: Number) -> str:
    if number.value is None:
        return f"{DASH} {number.note}".strip()
    return f"{wording.percent(number.value)} ({wording.percent_range(number.low, number.high)})"


def _points(number: Number) -> str:
    if number.value is None:
        return f"{DASH} {number.note}".strip()
    return f"{wording.points(number.value)} ({wording.points_range(number.low, number.high)})"
