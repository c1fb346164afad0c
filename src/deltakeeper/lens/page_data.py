"""Traces as the compact JSON that the page's script reads: top tokens, statistics, and curves of tokens that matter.

A cell costs about seventy bytes. Which tokens have a whole curve is decided by how likely they ever get in any variant;
of the others the page draws the layers where they are among the top tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltakeeper.errors import DataError
from deltakeeper.lens.figures.heat_maps import final_right
from deltakeeper.lens.figures.spelling import clean, cut
from deltakeeper.lens.page_numbers import pack_shares, pack_signed, pack_whole
from deltakeeper.lens.page_samples import LensSample, names_of_statistics
from deltakeeper.lens.trace import LensTrace
from deltakeeper.lens.trace_statistics import Floats, read_statistic, unit_of

_BEFORE, _AFTER = 160, 24
_WORD = 40


@dataclass(frozen=True)
class Detail:
    """How much of each cell is stored: `top` tokens, and `curves` whole curves a position."""

    top: int
    curves: int


def compact(samples: Sequence[LensSample], anchors: Sequence[str], detail: Detail) -> dict[str, Any]:
    """Plain JSON values for the page.

    Args:
        samples: as `check_samples` lets them pass, in the order of the page.
        anchors: of each.
        detail: how much of each cell.
    """
    words = _Words()
    labels = names_of_statistics(samples)
    variants = list(dict.fromkeys(trace.meta.variant for sample in samples for trace in sample.traces))
    found = {name: [[_read(t, name) for t in sample.traces] for sample in samples] for name in labels}
    scales = {name: max([_largest(v) for row in rows for v in row if v is not None]) for name, rows in found.items()}
    shown = []
    for place, (sample, anchor) in enumerate(zip(samples, anchors, strict=True)):
        first = sample.traces[0]
        top = min(detail.top, *(trace.top_ids.shape[2] for trace in sample.traces))
        followed = [_likeliest(sample.traces, position, detail.curves) for position in range(first.cells[1])]
        start = max(0, int(first.positions[0]) - _BEFORE)
        stop = int(first.positions[-1]) + 1 + _AFTER
        shown.append(
            {
                "id": anchor,
                "layers": first.layers.tolist(),
                "positions": first.positions.tolist(),
                "start": start,
                "text": [cut(clean(token), _WORD) for token in first.tokens[start:stop]],
                "more": stop < len(first.tokens),
                "top": top,
                "followed": [pack_whole(np.array([words(first, t, sample) for t in ids]), 3) for ids in followed],
                "traces": [
                    {
                        "variant": variants.index(trace.meta.variant),
                        "verdict": clean(sample.verdicts.get(trace.meta.variant, "")),
                        "right": final_right(trace).astype(int).tolist(),
                        "ids": pack_whole(
                            np.array([words(trace, t, sample) for t in trace.top_ids[..., :top].ravel().tolist()]), 3
                        ),
                        "probs": pack_shares(trace.top_probs[..., :top]),
                        "numbers": [
                            None if (values := found[name][place][number]) is None else pack_signed(values, scale)
                            for name, scale in scales.items()
                        ],
                        "curves": [
                            pack_shares(np.array([_curve(trace, position, t) for t in ids]))
                            for position, ids in enumerate(followed)
                        ],
                    }
                    for number, trace in enumerate(sample.traces)
                ],
            }
        )
    return {
        "variants": [clean(name) for name in variants],
        "statistics": [
            {"name": clean(name), "label": clean(label), "unit": unit_of(name), "scale": scales[name]}
            for name, label in labels.items()
        ],
        "words": words.spelled,
        "samples": shown,
    }


class _Words:
    """Numbers of words on a page, by token."""

    def __init__(self) -> None:
        self.spelled: list[str] = []
        self._numbers: dict[tuple[int, str], int] = {}

    def __call__(self, trace: LensTrace, token: int, sample: LensSample) -> int:
        word = next((t.words[token] for t in (trace, *sample.traces) if token in t.words), trace.word(token))
        key = token, word
        if key not in self._numbers:
            self._numbers[key] = len(self.spelled)
            self.spelled.append(cut(clean(word), _WORD))
        return self._numbers[key]


def _read(trace: LensTrace, name: str) -> Floats | None:
    try:
        return read_statistic(trace, name)
    except DataError:
        return None


def _largest(values: Floats) -> float:
    known = np.abs(values[np.isfinite(values)])
    return float(f"{max(known.max(initial=0.0), 1e-9) * 1.0001:.5g}")


def _likeliest(traces: Sequence[LensTrace], position: int, most: int) -> list[int]:
    """Tokens by the largest probability that any variant ever gives them."""
    best: dict[int, float] = {}
    for trace in traces:
        for token, curve in trace.trajectories[position].items() if trace.trajectories else ():
            best[token] = max(best.get(token, 0.0), float(curve.max()))
    return sorted(best, key=lambda token: (-best[token], token))[:most]


def _curve(trace: LensTrace, position: int, token: int) -> Floats:
    if trace.trajectories and token in trace.trajectories[position]:
        return trace.trajectories[position][token].astype(np.float64)
    return np.full(len(trace.layers), np.nan)
