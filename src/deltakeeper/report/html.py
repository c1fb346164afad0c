"""The report as one HTML file that loads nothing: template, style and script from this folder, figures as inline SVG.

Model text is hostile by construction. It is escaped by the template, stripped of control and direction characters here,
and the page's content security policy allows only the style and script whose hashes it names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from deltakeeper.report import figures, wording
from deltakeeper.report.assets import asset, excerpt, source_hash
from deltakeeper.report.digest import SAMPLES
from deltakeeper.report.digest import digest as make_digest
from deltakeeper.report.entries import AttackEntry, Digest, Estimate, Rate, VariantEntry
from deltakeeper.report.figures import Mark, Span
from deltakeeper.report.inside import Inside, write_inside
from deltakeeper.study.cells import OUTCOMES
from deltakeeper.study.store import RunStore, to_text
from deltakeeper.study.summarising import summarise
from deltakeeper.whole_files import write_atomically

KINDS = {
    "base": "base model",
    "tuned": "fine-tune",
    "codec": "compressed delta",
    "healed": "compressed, healed under guard",
    "defended": "defence on the fine-tune",
    "merged": "compressed, merged and rounded",
    "quantised": "whole model quantised",
    "control": "control",
}
_DRAWN = ("base", "tuned", "control", "quantised", "merged", "defended", "codec", "healed")


def render(run: RunStore, date: str) -> Digest:
    """Write `report.json` and `report.html`, and what the lens saw, into a run folder and return what they hold.

    Args:
        run: A run folder with its cells and `run.json`.
        date: The day to print, for instance `2026-01-31`; nothing else in the report depends on when it is made.

    Raises:
        RunError: The run folder is incomplete or malformed.
    """
    cells, info = run.read_cells(), run.read_run()
    digest = make_digest(cells, info, date)
    inside = write_inside(run, cells, summarise(cells, info)) if run.has_lens() else Inside()
    write_atomically(run.report_json, to_text(digest.to_json()))
    write_atomically(run.report_html, to_html(digest, inside))
    return digest


def to_html(digest: Digest, inside: Inside | None = None) -> str:
    """The page for a digest, with what the lens saw; the same of both gives the same text, byte for byte."""
    seen = inside or Inside()
    style, script = asset("report.css") + asset("inside.css"), asset("report.js")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    environment.filters |= {
        "percent": wording.percent,
        "percent_range": wording.percent_range,
        "points": wording.points,
        "points_range": wording.points_range,
        "number": wording.number,
        "number_range": wording.number_range,
        "ratio": wording.ratio,
        "size": wording.size,
        "p_value": wording.p_value,
        "rate": lambda rate: wording.rate(rate.hits, rate.value, rate.high),
        "excerpt": excerpt,
        "swatch": lambda kind: Markup(figures.swatch(kind)),
        "strip": lambda rate, kind, reference: Markup(figures.strip(_span(rate), kind, reference=reference)),
        "frontier": lambda attack: Markup(frontier_of(attack)),
    }
    text = environment.from_string(asset("report.html.j2")).render(
        digest=digest,
        inside=seen.section,
        lens_of=seen.of_sample,
        run=digest.run,
        model=str(digest.run["model"].get("name", "unnamed model")),
        style=Markup(style),
        script=Markup(script),
        style_hash=source_hash(style),
        script_hash=source_hash(script),
        kinds=KINDS.items(),
        present={entry.kind for attack in digest.attacks for entry in attack.variants},
        outcomes=OUTCOMES,
        merged=[(a, v) for a in digest.attacks for v in a.variants if v.merge_survival is not None],
        beyond=list(_beyond_shrinking(digest)),
        provenance=list(_provenance(digest.run)),
        samples_limit=SAMPLES,
    )
    return text + "\n"


def frontier_of(attack: AttackEntry) -> str:
    """The frontier figure of one attack; references are drawn first, codecs on top."""
    rank = {kind: place for place, kind in enumerate(_DRAWN)}
    entries = sorted(attack.variants, key=lambda entry: rank[entry.kind])
    return figures.frontier(
        [Mark(short(entry), entry.kind, _span(entry.skill.rate), _span(entry.goal.rate)) for entry in entries],
        identity=f"frontier-{attack.anchor}-plot",
        title=f"{attack.title}: attack success against skill",
        x_name="skill, %",
        y_name="attack success, %",
    )


def short(entry: VariantEntry) -> str:
    """A label for places where room is scarce: without brackets, afterthoughts and the word control."""
    if entry.kind in ("base", "tuned"):
        return {"base": "base", "tuned": "fine-tune"}[entry.kind]
    words = re.sub(r"\s*\([^()]*\)", "", entry.label).removeprefix("Control: ").split(",")[0].strip()
    return (f"{words}, merged" if entry.kind == "merged" and "merged" not in words else words) or entry.label


def _span(rate: Rate) -> Span:
    return Span(rate.value, rate.low, rate.high)


def _beyond_shrinking(digest: Digest) -> Iterator[tuple[str, str, list[Estimate | None]]]:
    """Rows of codecs and merges, one estimate per attack; None where the variant was not run on it."""
    rows: dict[tuple[str, str, str], dict[str, Estimate]] = {}
    for attack in digest.attacks:
        for entry in attack.variants:
            if entry.kind in ("codec", "healed", "defended", "merged", "quantised") and entry.retention:
                rows.setdefault((entry.kind, entry.variant, entry.label), {})[attack.attack] = (
                    entry.retention.beyond_shrinking
                )
    for (kind, _, label), found in rows.items():
        yield kind, label, [found.get(attack.attack) for attack in digest.attacks]


def _provenance(run: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    yield "Model", _facts(run["model"])
    for judge in run["judges"]:
        yield f"Judge: {judge['name']}", _facts(judge)
    yield "Versions", _facts(run["versions"])
    yield "Seeds", _facts(run["seeds"])
    yield "Hardware", _facts(run["hardware"])
    stages = run["stages"]
    times = [(name, wording.seconds(value)) for name, value in stages.items()]
    yield "Wall time", [*times, ("total", wording.seconds(sum(stages.values())))]
    for name, attack in sorted(run["attacks"].items()):
        yield f"Attack: {name}", [*_facts(attack["settings"]), *_facts(attack["sizes"])]


def _facts(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _plain(value)) for name, value in values.items()]


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) and value >= 100_000 else str(value)
