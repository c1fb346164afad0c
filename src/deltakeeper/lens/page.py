"""Traces of many prompts as one HTML file that loads nothing: choose a prompt, see its variants, click a cell.

Model text is hostile by construction. It is stripped of characters that cannot be seen, escaped by the template or set
as text by the script, and the policy of the page allows only the style and script whose hashes it names.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from deltakeeper.errors import DataError, LensError
from deltakeeper.lens.figures.colours import (
    DASHES,
    DIVERGING,
    DIVERGING_DARK,
    HUES,
    HUES_DARK,
    SEQUENTIAL,
    SEQUENTIAL_DARK,
)
from deltakeeper.lens.figures.drawing import LensFigure
from deltakeeper.lens.figures.spelling import clean, cut
from deltakeeper.lens.page_data import Detail, compact
from deltakeeper.lens.page_samples import LensSample, check_samples
from deltakeeper.lens.trace import LensTrace
from deltakeeper.whole_files import write_atomically

MOST_BYTES = 3_000_000
"""How large a page may be."""
_DETAILS = (Detail(5, 16), Detail(5, 10), Detail(5, 6), Detail(5, 3), Detail(3, 3), Detail(3, 0), Detail(1, 0))
_EXCERPT = 220


class PageTooLargeError(DataError):
    """Samples that do not fit a page; fewer may."""


def lens_page(
    samples: Sequence[LensSample],
    *,
    title: str = "Inside the models",
    notes: Sequence[str] = (),
    figures: Sequence[LensFigure] = (),
) -> str:
    """The page of some samples, those with flipped verdicts first; the same samples give the same text.

    Of many samples fewer tokens a cell and fewer whole curves are kept, so that the page stays small.

    Args:
        samples: prompts with their traces.
        title: what the page is about.
        notes: sentences to print under it.
        figures: to be shown over all prompts.

    Raises:
        DataError: samples cannot stand on one page.
        PageTooLargeError: they are too many for `MOST_BYTES`.
        LensError: jinja2 is not installed.
    """
    check_samples(samples)
    drawn = [figure.inline(f"figure-{number}") for number, figure in enumerate(figures)]
    ordered = sorted(samples, key=lambda sample: not sample.flipped)
    anchors = [anchor_of(sample.name) for sample in ordered]
    for detail in _DETAILS:
        data = compact(ordered, anchors, detail)
        data["colours"] = {
            "light": [SEQUENTIAL, DIVERGING, HUES],
            "dark": [SEQUENTIAL_DARK, DIVERGING_DARK, HUES_DARK],
            "dashes": DASHES,
        }
        page = _render(ordered, anchors, data, detail, title, notes, drawn)
        if len(page.encode()) <= MOST_BYTES:
            return page
    raise PageTooLargeError(
        f"{len(samples)} samples do not fit a page of {MOST_BYTES / 1e6:g} MB; "
        "show fewer, or fewer positions or variants."
    )


def write_lens_page(
    path: Path,
    samples: Sequence[LensSample],
    *,
    title: str = "Inside the models",
    notes: Sequence[str] = (),
    figures: Sequence[LensFigure] = (),
) -> None:
    """Write the page of some samples.

    Raises:
        DataError: as `lens_page`, or it cannot be written there.
        LensError: jinja2 is not installed.
    """
    page = lens_page(samples, title=title, notes=notes, figures=figures)
    try:
        write_atomically(path, page)
    except OSError as error:
        raise DataError(f"the lens page cannot be written to {path} ({error.strerror}); give another name.") from error


def anchor_of(name: str) -> str:
    """What stands behind `#` in a link to a sample, for instance from a report."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:60]
    return (
        f"s-{plain}" if plain == name else f"s-{plain}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:8]}"
    )


def embed(data: Mapping[str, object]) -> str:
    """JSON that can stand in a script element: nothing in it ends or begins markup."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _render(
    samples: Sequence[LensSample],
    anchors: Sequence[str],
    data: Mapping[str, object],
    detail: Detail,
    title: str,
    notes: Sequence[str],
    drawn: Sequence[str],
) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise LensError("the lens page needs jinja2; run `pip install 'deltakeeper[lens]'`.") from error
    style, script = _asset("page.css"), _asset("page.js")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"clean": clean, "excerpt": lambda text: cut(clean(text), _EXCERPT) or "(empty)"}
    text = environment.from_string(_asset("page.html.j2")).render(
        title=title,
        notes=notes,
        drawn=[Markup(figure) for figure in drawn],
        rows=[(anchor, sample, _by_verdict(sample)) for anchor, sample in zip(anchors, samples, strict=True)],
        flipped=sum(sample.flipped for sample in samples),
        models=_models(samples),
        detail=detail,
        data=Markup(embed(data)),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    return text + "\n"


def _by_verdict(sample: LensSample) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for trace in sample.traces:
        if (name := trace.meta.variant) in sample.verdicts:
            found.setdefault(sample.verdicts[name], []).append(name)
    return found


def _models(samples: Sequence[LensSample]) -> list[LensTrace]:
    """One trace of each variant: where its numbers come from."""
    found: dict[str, LensTrace] = {}
    for sample in samples:
        for trace in sample.traces:
            found.setdefault(trace.meta.variant, trace)
    return list(found.values())


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
