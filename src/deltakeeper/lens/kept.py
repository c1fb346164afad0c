"""How much of the fine-tuning's effect a variant keeps, layer by layer, over many prompts.

A share is a ratio whose denominator is small on prompts that fine-tuning hardly touched, so shares are never averaged:
prompts are summed first, or the median is taken. Prompts where there was nothing to keep are left out, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltakeeper.errors import DataError
from deltakeeper.lens.comparison import Bands, spread
from deltakeeper.lens.metrics import JS_FLOOR
from deltakeeper.lens.trace import LensTrace
from deltakeeper.lens.trace_statistics import Floats, check_alike, collect


@dataclass(frozen=True, eq=False)
class KeptShares:
    """Numerators and denominators of kept shares by prompt and layer, both NaN where there was nothing to keep.

    Attributes:
        kept: float64 (prompts, L).
        whole: float64 (prompts, L), above 0.
        layers: float64 (L,), numbers of the layers.
        title: what is shared, and of which variant.
    """

    kept: Floats
    whole: Floats
    layers: Floats
    title: str

    def ratios(self) -> Floats:
        """Share of each prompt, (prompts, L)."""
        return np.asarray(self.kept / self.whole, dtype=np.float64)

    def pooled(self, counts: Floats | None = None) -> Floats:
        """Ratio of sums over prompts, NaN where no prompt has a share.

        Args:
            counts: how often each prompt counts, (resamples, prompts), as a bootstrap draws them; None for once.

        Returns:
            (L,), or (resamples, L).
        """
        weights = np.ones((1, len(self.kept))) if counts is None else counts
        with np.errstate(invalid="ignore", divide="ignore"):
            found = (weights @ np.nan_to_num(self.kept)) / (weights @ np.nan_to_num(self.whole))
        return np.asarray(found[0] if counts is None else found, dtype=np.float64)

    def over(self, part: NDArray[np.signedinteger], counts: Floats | None = None) -> Floats:
        """Ratio of sums over prompts and some layers, NaN where there was nothing to keep.

        Args:
            part: places of the layers.
            counts: as for `pooled`.

        Returns:
            (1,), or (resamples,).
        """
        weights = np.ones((1, len(self.kept))) if counts is None else counts
        kept, whole = (weights @ np.nansum(values[:, part], axis=1) for values in (self.kept, self.whole))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(kept / whole, dtype=np.float64)

    def bands(self) -> Bands:
        """Median and quartiles of the prompts' shares by layer, with the ratio of sums as `pooled`."""
        return spread(self.ratios(), self.layers, "", self.title, self.pooled())


def kept_stream(traces: Sequence[LensTrace], position: int = -1) -> KeptShares:
    """Share of the stream's shift: ⟨h − h_base, h_tuned − h_base⟩ / ‖h_tuned − h_base‖².

    Args:
        traces: one variant, one trace a prompt, with streams.
        position: place in the traces' positions.

    Raises:
        DataError: as `collect`, or traces without streams.
    """
    share = collect(traces, "kept", position)
    whole = np.stack([trace.shift["tuned_square"][:, position] for trace in traces]).astype(np.float64)
    whole[~(np.isfinite(share) & (whole > 0))] = np.nan
    title = f"{traces[0].meta.variant}: share of the fine-tuning's shift that the stream keeps"
    return KeptShares(share * whole, whole, traces[0].layers.astype(np.float64), title)


def kept_output(traces: Sequence[LensTrace], base: Sequence[LensTrace], tuned: str, position: int = -1) -> KeptShares:
    """Share of the effect on the decoded output: 1 − √JS(tuned, variant) / √JS(base, tuned).

    Args:
        traces: one variant, one trace a prompt, traced with `tuned` as a reference.
        base: the base's traces of the same prompts in the same order.
        tuned: name of the fine-tuned variant.
        position: place in the traces' positions.

    Raises:
        DataError: as `collect`, or base and variant are not of the same prompts.
    """
    if len(traces) != len(base):
        raise DataError(
            f"there are {len(traces)} traces of a variant and {len(base)} of its base; pair them by prompt."
        )
    for pair in zip(traces, base, strict=True):
        check_alike(pair)
    distance, whole = (collect(group, f"js:{tuned}", position) for group in (traces, base))
    whole[~(whole >= JS_FLOOR) | np.isnan(distance)] = np.nan
    whole = np.sqrt(whole)
    title = f"{traces[0].meta.variant}: share of the fine-tuning's effect on the output that is kept"
    return KeptShares(whole - np.sqrt(distance), whole, traces[0].layers.astype(np.float64), title)
