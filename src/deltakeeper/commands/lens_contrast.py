"""The `--against` of `deltakeeper lens`: a second set of prompts, told as tables, files and figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from deltakeeper.commands.output import console

if TYPE_CHECKING:
    from deltakeeper.lens.contrast import Contrast
    from deltakeeper.lens.divergences import Divergences
    from deltakeeper.lens.figures import LensFigure
    from deltakeeper.lens.models import Compared
    from deltakeeper.lens.trace import LensTrace
    from deltakeeper.prompting import Prompt

FOLDER = "traces-against"


@dataclass(frozen=True)
class Against:
    """What a second set of prompts gave; `divergences` and `traces` only where its rows pair with the first's."""

    contrast: Contrast
    divergences: Divergences | None
    traces: Mapping[str, Sequence[LensTrace]]


def read_against(file: Path | None, prompts: int) -> list[Prompt]:
    """The second set, none without a file; raises DataError or LensError where it cannot be compared."""
    from deltakeeper.errors import DataError
    from deltakeeper.lens.contrasting import check_sizes
    from deltakeeper.prompting import read_prompts

    if file is None:
        return []
    found = read_prompts(file)
    if any(one.tenant is not None for one in found):
        raise DataError("the lens shows every prompt to every variant; leave out 'tenant' in the prompt file.")
    check_sizes(prompts, len(found))
    return found


def compare_sets(
    variants: Compared,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    second: Sequence[Prompt],
    trace: Callable[[Sequence[Prompt]], dict[str, list[LensTrace]]],
    traces: Mapping[str, Sequence[LensTrace]],
    *,
    position: int,
    seconds: dict[str, float],
    **options: Any,
) -> Against | None:
    """The direction between two sets, and of sets of one size where pairs part; None without a second set.

    Args:
        variants: open, the base first.
        tokenizer: of the base.
        prompts: the first set.
        second: the second.
        trace: traces a set as the first was.
        traces: of the first.
        position: the place where pairs are compared.
        seconds: wall time is added to it.
        options: of `contrast_prompts`.
    """
    from deltakeeper.lens.contrasting import contrast_prompts
    from deltakeeper.lens.divergences import find_divergences
    from deltakeeper.lens.trace_pass import timed

    if not second:
        return None
    with timed(seconds, "direction"):
        contrast = contrast_prompts(variants, tokenizer, prompts, second, **options)
    if len(second) != len(prompts):
        return Against(contrast, None, {})
    own = trace(second)
    parted = find_divergences(traces, own, base=variants.names[0], position=position)
    return Against(contrast, parted, own)


def write_against(found: Against, out: Path) -> list[Path]:
    """Write what was found, and the traces of the second set; gives the files."""
    from deltakeeper.lens.divergences import to_json
    from deltakeeper.lens.trace_file import write_trace

    for name, own in found.traces.items():
        for number, trace in enumerate(own, 1):
            write_trace(trace, out / FOLDER / f"{name}-{number:04d}.json")
    written = [_write(out / "directions.json", found.contrast.to_json())]
    if found.divergences is not None:
        written.append(_write(out / "divergence.json", to_json(found.divergences)))
    return written


def draw_against(found: Against | None) -> dict[str, LensFigure]:
    """Figures by name; what cannot be drawn is told, since the numbers are there all the same."""
    from deltakeeper.errors import LensError
    from deltakeeper.lens.contrast import draw_contrast
    from deltakeeper.lens.divergences import draw_divergences

    figures: dict[str, LensFigure] = {}
    if found is None:
        return figures
    try:
        figures["directions"] = draw_contrast(found.contrast)
        if found.divergences is not None and (parted := draw_divergences(found.divergences)) is not None:
            figures["divergence"] = parted
    except LensError as error:
        typer.echo(f"deltakeeper: {error}", err=True)
    return figures


def print_against(found: Against) -> None:
    """The direction at one layer beside its controls; and where pairs part."""
    _print_contrast(found.contrast)
    if found.divergences is None:
        console().print(
            "The two sets differ in size, so that their rows are no pairs and nothing diverges.", highlight=False
        )
    else:
        _print_divergences(found.divergences)


def _print_contrast(found: Contrast) -> None:
    from rich.table import Table

    from deltakeeper.lens.contrast import DEFINITIONS, reach_of

    place = found.place
    title = f"the base's direction between the two sets, at layer {found.layer}"
    table = Table("variant", "apart", "AUC", "kept", "nearest control", title=title, title_justify="left")
    for number, (name, one) in enumerate(found.variants.items()):
        own = one.found.separation
        apart = (
            f"{_number(own.effect[place], 1)} [dim]({_number(own.low[place], 1)} to {_number(own.high[place], 1)})[/]"
        )
        kept = f"{_share(one.kept[place])} [dim]({_share(one.kept_low[place])} to {_share(one.kept_high[place])})[/]"
        nearest = max(one.found.controls, key=lambda key: reach_of(one.found.controls[key])[place])
        reach, share = reach_of(one.found.controls[nearest])[place], one.found.reached[nearest][place]
        beside = f"{_number(reach, 1)} [dim]({nearest}, share {_number(share)})[/]"
        table.add_row(name, apart, _number(own.auc[place]), kept if number else "", beside)
    console().print(table)
    for name, words in DEFINITIONS.items():
        console().print(f"[dim]{name}: {words}[/]", highlight=False)


def _print_divergences(found: Divergences) -> None:
    from rich.table import Table

    from deltakeeper.lens.divergences import DEFINITIONS, TO_BASE

    names = sorted({title: None for own in found.values() for title in own}, key=lambda title: title != TO_BASE)
    table = Table("variant", *names, title="layer from which pairs part", title_justify="left")
    for name, own in found.items():
        cells = []
        for title in names:
            one = own.get(title)
            if one is None:
                cells.append("")
                continue
            layer = "never" if one.found.layer is None else str(one.found.layer)
            cells.append(f"{layer} [dim](last {one.found.separation[-1]:.2f}, bar {one.found.bar:.2f})[/]")
        table.add_row(name, *cells)
    console().print(table)
    for name, words in DEFINITIONS.items():
        console().print(f"[dim]{name}: {words}[/]", highlight=False)


def to_json(found: Against) -> dict[str, Any]:
    """What `--json` prints of it."""
    from deltakeeper.lens.divergences import to_json as told

    value = {"directions": found.contrast.to_json()}
    return value if found.divergences is None else {**value, "divergence": told(found.divergences)}


def _number(value: float, digits: int = 2) -> str:
    return "n/a" if value != value else f"{value:.{digits}f}"


def _share(value: float) -> str:
    return "n/a" if value != value else f"{value:.0%}"


def _write(path: Path, value: Mapping[str, Any]) -> Path:
    from deltakeeper.whole_files import write_atomically

    write_atomically(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return path
