"""What the lens saw of a run, for its page: pages of samples, figures as files and inline, and a section of HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from deltakeeper.errors import LensError
from deltakeeper.lens.figures import LensFigure
from deltakeeper.lens.figures.inline_svg import to_inline
from deltakeeper.lens.figures.spelling import show
from deltakeeper.report import figures, wording
from deltakeeper.report.assets import asset, excerpt
from deltakeeper.report.lens_pages import SampleKey, write_pages
from deltakeeper.report.lens_table import spell_correlation, spell_layer
from deltakeeper.study.cells import Cell
from deltakeeper.study.groups import Group, comparable, group_cells
from deltakeeper.study.lens_records import LENS_SUMMARY_NAME, AttackLens, LensSummary
from deltakeeper.study.lens_summary import summarise_lens
from deltakeeper.study.store import RunStore
from deltakeeper.study.summary import Summary
from deltakeeper.whole_files import write_atomically

MOST_MAPS = 4
MOST_LISTED = 12
_LABEL = 200


@dataclass(frozen=True)
class _Opened:
    """A sample that a link opens, and the arms under which its verdict is not the fine-tune's."""

    href: str
    key: SampleKey
    prompt: str
    flipped: tuple[str, ...]


@dataclass(frozen=True)
class Inside:
    """What a page shows of the lens.

    Attributes:
        section: HTML, to stand as it is; empty where no lens looked.
        links: where each sample's lens is opened.
        summary: what was written to `LENS_SUMMARY_NAME`; None where no lens looked.
    """

    section: Markup = field(default_factory=Markup)
    links: Mapping[SampleKey, str] = field(default_factory=dict)
    summary: LensSummary | None = None

    def of_sample(self, attack: str, sample: str) -> str | None:
        """The link to the lens of a prompt under its first seed; None where it is on no page."""
        return next((href for key, href in self.links.items() if (key[0], key[3]) == (attack, sample)), None)


def write_inside(store: RunStore, cells: Iterable[Cell], summary: Summary) -> Inside:
    """Sum up the traces of a run, and write `lens-summary.json`, the pages of its samples and its figures.

    Args:
        store: the run folder.
        cells: all its cells.
        summary: of the same cells.

    Raises:
        RunError: an index of traces is malformed.
        DataError: a trace is missing or malformed.
    """
    if not store.has_lens():
        return Inside()
    groups = group_cells(comparable(cells)[0])
    found = summarise_lens(store, groups, summary)
    if found is None:
        return Inside()
    write_atomically(store.path / LENS_SUMMARY_NAME, found.model_dump_json(indent=1) + "\n")
    seen = {attack.attack: attack for attack in found.attacks}
    groups = tuple(group for group in groups if group.attack in seen)
    links = write_pages(store, groups)
    drawn: dict[str, list[Markup]] = {}
    overall, missing = Markup(""), ""
    try:
        overall = _overall(store, found)
        for group in groups:
            drawn[group.attack] = _figures(store, group, seen[group.attack], summary.primary)
    except LensError as error:  # without matplotlib there are numbers all the same
        missing = str(error)
    return Inside(_section(store, found, groups, links, drawn, overall, missing), links, found)


def _overall(store: RunStore, found: LensSummary) -> Markup:
    """What is kept against size, one panel an attack."""
    from deltakeeper.report.lens_figures import kept_by_size

    figure = kept_by_size(found.attacks)
    if figure is None:
        return Markup("")
    return _stored(store, figure, "kept-by-size")


def _figures(store: RunStore, group: Group, attack: AttackLens, primary: str) -> list[Markup]:
    """A sample's map, then lines over all readings: files for papers, and the same inline."""
    from deltakeeper.report.lens_figures import lines_of, map_of, shown_arms

    arms = shown_arms(attack, primary)
    base = next(arm for arm in attack.arms if arm.kind == "base")
    entry = _first_flipped(store, group, attack, primary)
    traces = store.traces_of(group.attack, entry["sample"], attack.seeds[0], entry["probe"])
    beside = [arm for arm in shown_arms(attack, primary, MOST_MAPS - 1) if arm.variant in traces]
    found = {
        "map": map_of(traces, [base, *beside]),
        "departure": lines_of(attack, "js_base", arms, "JS to the base by layer", unit="nats"),
        "kept": lines_of(attack, "kept", arms, "Kept share of the fine-tuning's shift", limits=(-0.5, 1.5)),
    }
    return [_stored(store, figure, f"{group.attack}-{name}") for name, figure in found.items()]


def _stored(store: RunStore, figure: LensFigure, name: str) -> Markup:
    """Write a figure, drawn once, and give it for the page."""
    text = figure.svg()
    write_atomically(store.lens_figure(name), text)
    return Markup(to_inline(text, f"lens-{_word(name)}", figure.title))


def _first_flipped(store: RunStore, group: Group, attack: AttackLens, primary: str) -> Mapping[str, str]:
    """A sample whose verdict flipped under the primary arm, or under any, or the first."""
    entries = store.read_lens(group.attack, attack.seeds[0])
    ranked = sorted(entries, key=lambda entry: (primary not in entry["flipped"], not entry["flipped"]))
    return ranked[0]


def _section(
    store: RunStore,
    found: LensSummary,
    groups: Sequence[Group],
    links: Mapping[SampleKey, str],
    drawn: Mapping[str, Sequence[Markup]],
    overall: Markup,
    missing: str,
) -> Markup:
    from deltakeeper.report.lens_figures import kept_against_attack

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "seen": lambda text: excerpt(str(text), _LABEL),
        "swatch": lambda kind: Markup(figures.swatch(kind)),
        "percent": wording.percent,
        "percent_range": wording.percent_range,
        "size": wording.size,
        "number": wording.number,
        "token": show,
        "layer": spell_layer,
        "correlation": spell_correlation,
        "against": lambda attack: Markup(kept_against_attack(attack, f"kept-{_word(attack.attack)}")),
    }
    opened = {group.attack: _samples(store, group, links) for group in groups}
    pages = {
        name: list({one.key[1]: one.href.partition("#")[0] for one in own}.items()) for name, own in opened.items()
    }
    return Markup(
        environment.from_string(asset("inside.html.j2")).render(
            lens=found,
            opened=opened,
            pages=pages,
            drawn=drawn,
            overall=overall,
            missing=missing,
            most_listed=MOST_LISTED,
        )
    )


def _samples(store: RunStore, group: Group, links: Mapping[SampleKey, str]) -> list[_Opened]:
    """Samples that are on a page, those first whose verdict flipped under most arms, whatever their seed."""
    found = []
    for seed in group.seeds:
        for entry in store.read_lens(group.attack, seed):
            key = (group.attack, seed, str(entry["probe"]), str(entry["sample"]))
            if key in links:
                found.append(_Opened(links[key], key, _prompt(group, key), tuple(entry["flipped"])))
    return sorted(found, key=lambda one: -len(one.flipped))


def _prompt(group: Group, key: SampleKey) -> str:
    _, seed, probe, id = key
    answers = group.cell(group.tuned, seed).probes[probe].answers
    return next(answer.prompt for answer in answers if answer.id == id)


def _word(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())
