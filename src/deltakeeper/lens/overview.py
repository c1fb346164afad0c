"""What many traces say in few numbers: where a variant commits, what it keeps of the fine-tuning, where it departs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from deltakeeper.lens.commitment import RULES, find_commitment
from deltakeeper.lens.comparison import Bands, bands
from deltakeeper.lens.departures import RULES as DEPARTURE
from deltakeeper.lens.departures import find_departure
from deltakeeper.lens.kept import kept_output, kept_stream
from deltakeeper.lens.trace import PRODUCED, LensTrace
from deltakeeper.lens.trace_json import plain_number
from deltakeeper.lens.trace_statistics import collect

FORMAT = "deltakeeper.lens.overview"
VERSION = 1
DEFINITIONS = {
    "commitment": f"median over prompts of the {RULES['top1']}",
    "kept": "kept share of the fine-tuning's shift of the stream, ratio of sums over prompts and a third of the layers",
    "departs": DEPARTURE["departs"],
}
"""To be printed beside the numbers."""
TARGETS = (
    "first tokens of a set's texts, with and without a space before them, so that a text of several tokens is known by "
    "its first only; probabilities are summed over the set, rank 0 is the likeliest token of all"
)
"""The same of sets of tokens."""


@dataclass(frozen=True)
class VariantOverview:
    """One variant over all prompts, at one position.

    Attributes:
        variant: its name.
        prompts: how many.
        commitment: layer, with its quartiles; see `DEFINITIONS`.
        kept: by thirds of the layers from below; None where there was nothing to keep or no fine-tune.
        departs: layer; None where it never departs for good.
        bands: by statistic, median and quartiles by layer.
    """

    variant: str
    prompts: int
    commitment: tuple[float, float, float]
    kept: tuple[float | None, float | None, float | None] | None
    departs: int | None
    bands: Mapping[str, Bands]


def overview(
    traces: Mapping[str, Sequence[LensTrace]], *, base: str, tuned: str | None = None, position: int = 0
) -> list[VariantOverview]:
    """Sum up traces of all variants on the same prompts.

    Args:
        traces: by variant, as `trace_prompts` gives them.
        base: name of the base, a reference of all traces.
        tuned: name of the fine-tune, likewise.
        position: place in the traces' positions; the first by default, where an answer begins.

    Raises:
        DataError: no traces, or they were not traced against base and fine-tune.
    """
    found = []
    for name, own in traces.items():
        commits = np.quantile([find_commitment(trace)[position] for trace in own], [0.25, 0.5, 0.75])
        lines = _bands(own, position)
        kept = None
        if tuned is not None:
            stream = kept_stream(own, position)
            lines["kept"] = stream.bands()
            lines["kept_output"] = kept_output(own, traces[base], tuned, position).bands()
            thirds = np.array_split(np.arange(own[0].cells[0]), 3)
            shares = [float(stream.over(part)[0]) for part in thirds]
            kept = tuple(share if math.isfinite(share) else None for share in shares)
        once = np.ones((1, len(own)))
        departs = find_departure(collect(own, f"js:{base}", position), own[0].layers.tolist(), once).layer
        low, middle, high = commits.tolist()
        found.append(VariantOverview(name, len(own), (middle, low, high), kept, departs, lines))  # type: ignore[arg-type]
    return found


def to_json(
    found: Sequence[VariantOverview], traces: Mapping[str, Sequence[LensTrace]], position: int
) -> dict[str, Any]:
    """The overview as plain JSON values, with the definitions of its numbers and where its traces come from."""
    first = next(iter(traces.values()))[0]
    return {
        "format": FORMAT,
        "version": VERSION,
        "definitions": {**DEFINITIONS, "targets": TARGETS},
        "position": {"place": position, "token": first.tokens[int(first.positions[position])]},
        "layers": first.layers.tolist(),
        "targets": {
            name: [first.word(token) for token in one.ids] for name, one in first.targets.items() if name != PRODUCED
        },
        "variants": {
            one.variant: {
                "meta": {
                    k: v for k, v in asdict(traces[one.variant][0].meta).items() if k not in ("variant", "prompt")
                },
                "prompts": one.prompts,
                "commitment": dict(zip(("median", "low", "high"), map(plain_number, one.commitment), strict=True)),
                "kept": None
                if one.kept is None
                else [None if share is None else plain_number(share) for share in one.kept],
                "departs": one.departs,
                "bands": {name: _band(line) for name, line in one.bands.items()},
            }
            for one in found
        },
    }


def _bands(own: Sequence[LensTrace], position: int) -> dict[str, Bands]:
    first = own[0]
    names = ["entropy", "kl_final", "top1", *(f"{kind}:{of}" for kind in ("kl", "js") for of in getattr(first, kind))]
    names += [f"{kind}:{target}" for target in first.targets for kind in ("prob", "rank")]
    return {name: bands(own, name, position) for name in names}


def _band(line: Bands) -> dict[str, Any]:
    parts = {name: [plain_number(v) for v in getattr(line, name).tolist()] for name in ("median", "low", "high")}
    pooled = None if line.pooled is None else [plain_number(v) for v in line.pooled.tolist()]
    return {**parts, "pooled": pooled, "prompts": line.prompts.tolist(), "unit": line.unit}
