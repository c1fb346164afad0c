"""At which layer the final choice of each position is made for good, one variant beside another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from deltakeeper.errors import DataError
from deltakeeper.lens.comparison import Grid
from deltakeeper.lens.metrics import commitment
from deltakeeper.lens.trace import LensTrace
from deltakeeper.lens.trace_statistics import Floats, check_alike

RULES = {
    "top1": "first layer from which the final top-1 token stays top-1",
    "top3": "first layer from which the final top-1 token stays in the top 3",
    "half": "first layer from which the final top-1 token keeps p > 0.5",
}
"""The definitions, to be printed beside the number."""


def find_commitment(trace: LensTrace, rule: str = "top1") -> Floats:
    """Number of the layer at which each position commits to its final top-1 token, float64 (P,).

    Args:
        trace: one variant on one prompt.
        rule: one of `RULES`.

    Returns:
        Layer numbers; NaN where not even the last layer satisfies the rule, which only `half` allows.

    Raises:
        DataError: the rule is unknown, or needs more top tokens than the trace holds.
    """
    if rule not in RULES:
        raise DataError(f"there is no commitment rule {rule!r}; take one of {', '.join(RULES)}.")
    width = 3 if rule == "top3" else 1
    if width > trace.top_ids.shape[2]:
        raise trace.refuse(f"the rule {rule!r} needs {width} top tokens a cell, and it holds {trace.top_ids.shape[2]}")
    holds = (trace.top_ids[..., :width] == trace.top_ids[-1:, :, :1]).any(-1)
    if rule == "half":
        holds &= trace.top_probs[..., 0] > 0.5
    found = commitment(torch.from_numpy(holds)).numpy()
    layers = np.append(trace.layers.astype(np.float64), np.nan)
    return layers[np.where(np.isnan(found), len(trace.layers), found).astype(np.int64)]


def commitment_strips(traces: Sequence[LensTrace], rule: str = "top1") -> Grid:
    """One row a variant, one column a position: the layer of commitment, with the token it commits to.

    Raises:
        DataError: no traces, they are not of the same cells of the same tokens, or as `find_commitment`.
    """
    if not traces:
        raise DataError("there are no lens traces to compare; trace at least one variant.")
    check_alike(traces)
    return Grid(
        values=np.stack([find_commitment(trace, rule) for trace in traces]),
        rows=tuple(trace.meta.variant for trace in traces),
        columns=tuple(traces[0].tokens[place] for place in traces[0].positions),
        unit="layer",
        title=RULES[rule],
        texts=tuple(tuple(trace.word(int(token)) for token in trace.top_ids[-1, :, 0]) for trace in traces),
    )
