"""The `--patch` of `deltakeeper lens`: layers of one variant put into another, told as a table and a figure."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from deltakeeper.commands.output import console

if TYPE_CHECKING:
    from deltakeeper.artifact import DeltaArtifact
    from deltakeeper.attach import Change
    from deltakeeper.lens.restoration import Restoration
    from deltakeeper.live_base import LiveBase
    from deltakeeper.prompting import Prompt

SHOWN = 5
"""Places in the table."""


def read_pairs(given: Sequence[str], known: Collection[str], by: str) -> list[tuple[str, str]]:
    """What `DONOR:RECEIVER` arguments say; raises DataError where a name is unknown."""
    from deltakeeper.errors import DataError
    from deltakeeper.lens.restoration import OUTCOMES

    if by not in OUTCOMES:
        raise DataError(f"'{by}' is no outcome that patching could be judged by; write {' or '.join(OUTCOMES)}.")
    pairs = []
    for text in given:
        donor, _, receiver = text.partition(":")
        if donor == receiver or not {donor, receiver} <= set(known):
            names = ", ".join(sorted(known))
            raise DataError(f"'{text[:80]}' is no DONOR:RECEIVER of two variants; name two of {names}, as base:tuned.")
        pairs.append((donor, receiver))
    return pairs


def check_patching(pairs: Sequence[tuple[str, str]], by: str, prompts: int, tokenizer: Any) -> None:
    """Refuse what patching could only fail at, before anything takes time; raises DataError or LensError."""
    from deltakeeper.errors import DataError
    from deltakeeper.lens.restoration import refusal_margin

    if pairs and prompts < 2:
        raise DataError("patching has another prompt as its control; give two prompts at least.")
    if pairs and by == "refusal":
        refusal_margin(tokenizer)


def patch_pairs(
    live: LiveBase,
    prompts: Sequence[Prompt],
    whole: Mapping[str, Sequence[Change]],
    artifacts: Mapping[str, DeltaArtifact],
    pairs: Sequence[tuple[str, str]],
    by: str,
    system: str | None,
    chat: bool | None,
    tuned: str | None,
) -> list[Restoration]:
    """Patch every pair, and note of which checkpoints each is."""
    from deltakeeper.apply import iterate_changes
    from deltakeeper.checkpoint import open_checkpoint
    from deltakeeper.lens.ranking import Origin
    from deltakeeper.lens.restoration import patch_prompts

    found, roots = [], _roots(live, artifacts, tuned) if pairs else {}
    for donor, receiver in pairs:
        changes = dict(whole)
        with open_checkpoint(live.path) as base:
            for name in {donor, receiver} & set(artifacts):
                changes[name] = list(iterate_changes(base, artifacts[name]))
        patched = patch_prompts(
            live.model,
            live.tokenizer,
            prompts,
            changes,
            donor=donor,
            receiver=receiver,
            outcome=by,  # type: ignore[arg-type]
            system=system,
            chat=chat,
        )
        found.append(replace(patched, origin=Origin(live.root, roots[donor], roots[receiver])))
    return found


def _roots(live: LiveBase, artifacts: Mapping[str, DeltaArtifact], tuned: str | None) -> dict[str, str]:
    """Fingerprints of the checkpoints that variants are, or that their deltas were made of."""
    from deltakeeper.fingerprint import read_root

    roots = {"base": live.root, **{name: one.manifest.target.root for name, one in artifacts.items()}}
    if tuned is not None:
        roots["tuned"] = read_root(tuned)
    return roots


def write_patched(found: Sequence[Restoration], out: Path) -> list[Path]:
    """Write what patching gave, and its figures; gives the files."""
    from deltakeeper.errors import LensError
    from deltakeeper.lens.restoration import draw_restoration
    from deltakeeper.whole_files import write_atomically

    written = []
    for one in found:
        name = f"patch-{one.layers.donor}-{one.layers.receiver}"
        written.append(out / f"{name}.json")
        write_atomically(written[-1], json.dumps(one.to_json(), indent=1) + "\n")
        try:
            for kind, figure in draw_restoration(one).items():
                written.append(out / "figures" / f"{name}-{kind}.svg")
                figure.save(written[-1])
        except LensError as error:
            typer.echo(f"deltakeeper: {error}", err=True)
    return written


def print_patched(found: Restoration) -> None:
    """A table of the places that put back most."""
    from rich.table import Table

    from deltakeeper.lens.restoration import OUTCOMES

    sweep = found.layers
    table = Table("place", "put back", title=f"{sweep.receiver} with layers of {sweep.donor}", title_justify="left")
    for kind, ranking in found.rankings().items():
        if kind != "stream":
            inside = [one for one in ranking.places if one.place.layers or kind == "layer"]
            for one in inside[:SHOWN]:
                share = "n/a" if one.share is None else f"{one.share:.0%}"
                reach = "" if one.low is None or one.high is None else f" [dim]({one.low:.0%} to {one.high:.0%})[/]"
                table.add_row(f"layer {one.place.label}" if one.place.layers else "in no layer", share + reach)
    console().print(table)
    left = f"; {found.left_out} left out, where both choose the same" if found.left_out else ""
    console().print(
        f"[dim]put back: share of the way from {sweep.receiver} to {sweep.donor} in the {OUTCOMES[found.outcome]}; "
        f"{len(sweep.patched)} prompts{left}. At {found.neutral:.0%} {sweep.receiver} prefers neither.[/]",
        highlight=False,
    )
