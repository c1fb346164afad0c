"""Statistics of a trace by name, and which traces may stand side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deltakeeper.errors import DataError
from deltakeeper.lens.trace import LensTrace

Floats = NDArray[np.float64]


def read_statistic(trace: LensTrace, name: str) -> Floats:
    """A statistic of a trace by name, float64 (layers, positions), NaN where there is none.

    Args:
        trace: one variant on one prompt.
        name: `entropy`, `kl_final`, `top1` (probability of the likeliest token), `kl:VARIANT`, `js:VARIANT`,
            `rank:TARGET`, `log_prob:TARGET`, `prob:TARGET`, `cosine_base`, `cosine_tuned`, `kept` (share of the
            fine-tuning shift of the stream that is kept) or `remainder` (what lies across it, in its lengths).

    Raises:
        DataError: the trace has no such statistic.
    """
    kind, _, of = name.partition(":")
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind in ("kept", "remainder") and not of and trace.shift:
            square = trace.shift["tuned_square"].astype(np.float64)
            if kind == "kept":
                return np.asarray(trace.shift["dot"] / square, dtype=np.float64)
            return np.asarray(np.sqrt(trace.shift["remainder_square"] / square), dtype=np.float64)
        found: NDArray[np.generic] | None = None
        if not of and kind in ("entropy", "kl_final"):
            found = trace.entropy if kind == "entropy" else trace.kl_final
        elif name == "top1":
            found = trace.top_probs[..., 0]
        elif not of and kind in ("cosine_base", "cosine_tuned"):
            found = trace.shift.get(kind)
        elif kind in ("kl", "js"):
            found = (trace.kl if kind == "kl" else trace.js).get(of)
        elif kind in ("rank", "log_prob", "prob") and of in trace.targets:
            target = trace.targets[of]
            found = (
                target.rank if kind == "rank" else target.log_prob if kind == "log_prob" else np.exp(target.log_prob)
            )
    if found is None:
        raise DataError(f"the lens trace of {trace.meta.variant!r} has no statistic {name!r}; trace it with that.")
    return np.asarray(found, dtype=np.float64)


def unit_of(name: str) -> str:
    """Unit of a statistic by name; "" for shares, probabilities, cosines and ranks."""
    return "nats" if name.partition(":")[0] in ("entropy", "kl", "js", "kl_final", "log_prob") else ""


def check_alike(traces: Sequence[LensTrace]) -> None:
    """Refuse variants that cannot be compared cell by cell.

    Raises:
        DataError: prompt, tokens, layers, positions, site or decoding differ.
    """
    first = traces[0]
    for other in traces[1:]:
        same = all(
            getattr(first.meta, part) == getattr(other.meta, part) for part in ("prompt", "decode", "decoder", "site")
        )
        axes = np.array_equal(first.layers, other.layers) and np.array_equal(first.positions, other.positions)
        if not (same and axes and first.tokens == other.tokens):
            raise DataError(
                f"the lens traces of {first.meta.variant!r} and {other.meta.variant!r} are not of the same cells of "
                "the same tokens; trace both on one text in one way."
            )


def collect(traces: Sequence[LensTrace], name: str, position: int = -1) -> Floats:
    """A statistic at one position, float64 (prompts, layers): what bands are made of, and what a bootstrap resamples.

    Raises:
        DataError: no traces, they are of different layers, or one lacks the statistic or the position.
    """
    if not traces:
        raise DataError("there are no lens traces to compare; trace at least one prompt.")
    layers = traces[0].layers
    for trace in traces:
        if not np.array_equal(trace.layers, layers):
            raise DataError("lens traces of different layers cannot be put side by side; trace the same layers.")
        if not -len(trace.positions) <= position < len(trace.positions):
            raise trace.refuse(f"it has {len(trace.positions)} positions, and number {position} is asked for")
    return np.stack([read_statistic(trace, name)[:, position] for trace in traces])
