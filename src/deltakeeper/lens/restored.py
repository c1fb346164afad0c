"""What patching gave: an outcome of each prompt at each place, and which share of the way back that is.

The restored share is (patched − corrupted) / (clean − corrupted): 1 where patching gives the donor's outcome, 0 where
it changes nothing, above 1 or below 0 where it does more or the contrary. Shares of prompts whose outcome donor and
receiver hardly differ in are noise, so shares over prompts are ratios of sums, over all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch

from deltakeeper.errors import LensError
from deltakeeper.lens.comparison import Bands, spread
from deltakeeper.lens.trace_statistics import Floats

FLOOR = 0.01
"""Least difference of donor and receiver in the outcome, a prompt or in the mean, that a share is made of."""
MOST_FAILING = 0.05
"""Share of resamples that may lack a restored share before there is no interval."""
Patched = Literal["stream", "layer", "attention", "mlp", "outside"]
"""The residual stream behind a layer; the delta of a layer, of a part of it, or of what is in no layer."""
PATCHED: tuple[Patched, ...] = get_args(Patched)


@dataclass(frozen=True)
class Place:
    """What was replaced.

    Attributes:
        patched: see `Patched`.
        layers: one, or a window of neighbours; none for what is in no layer.
    """

    patched: Patched
    layers: tuple[int, ...]

    @property
    def label(self) -> str:
        """For a table: `12`, `12–14 mlp`, `outside`."""
        span = "–".join(str(end) for end in dict.fromkeys((self.layers[0], self.layers[-1]))) if self.layers else ""
        word = "" if self.patched in ("stream", "layer") else self.patched
        return " ".join(filter(None, (span, word)))


@dataclass(frozen=True, eq=False)
class Sweep:
    """The outcome of each prompt with each place patched.

    Attributes:
        places: in the order of the layers.
        patched: float64 (prompts, places).
        clean: float64 (prompts,), of the donor alone.
        corrupted: float64 (prompts,), of the receiver alone.
        donor: name of the variant that gives.
        receiver: name of the variant that is patched.
        title: what was done, one line.
        floor: see `FLOOR`.
    """

    places: tuple[Place, ...]
    patched: Floats
    clean: Floats
    corrupted: Floats
    donor: str
    receiver: str
    title: str
    floor: float = FLOOR

    def __post_init__(self) -> None:
        prompts = (len(self.patched),)
        if self.patched.shape != (*prompts, len(self.places)) or self.clean.shape != prompts != self.corrupted.shape:
            raise ValueError("a sweep needs an outcome of each prompt at each place, clean and corrupted")

    def ratios(self) -> Floats:
        """Share of each prompt, (prompts, places); NaN where donor and receiver are closer than the floor."""
        whole = self.clean - self.corrupted
        whole = np.where(np.abs(whole) >= self.floor, whole, np.nan)
        return np.asarray((self.patched - self.corrupted[:, None]) / whole[:, None], dtype=np.float64)

    def restored(self, counts: Floats | None = None) -> Floats:
        """Ratio of sums over all prompts; NaN where donor and receiver are closer than the floor in the mean.

        Args:
            counts: how often each prompt counts, (resamples, prompts), as a bootstrap draws them; None for once.

        Returns:
            (places,), or (resamples, places).
        """
        weights = np.ones((1, len(self.patched))) if counts is None else np.asarray(counts, dtype=np.float64)
        if weights.ndim != 2 or weights.shape[1] != len(self.patched):
            raise LensError(f"the counts are not of {len(self.patched)} prompts; draw them for this sweep.")
        whole, total = weights @ (self.clean - self.corrupted), weights.sum(1)
        whole = np.where((np.abs(whole) >= self.floor * total) & (total > 0), whole, np.nan)
        found = weights @ (self.patched - self.corrupted[:, None]) / whole[:, None]
        return np.asarray(found[0] if counts is None else found, dtype=np.float64)

    def gained(self, counts: Floats | None = None) -> Floats:
        """What each place restores beyond the one before it, the first beyond nothing; as `restored`.

        A stream holds what all layers before it did, so its share rises towards the last layer; what it gains is what
        that layer adds.
        """
        return np.diff(self.restored(counts), axis=-1, prepend=0.0)

    def bands(self) -> Bands:
        """Median and quartiles of the prompts' shares by first layer, with the ratio of sums as `pooled`.

        Raises:
            LensError: there are places of several kinds; choose one with `only`.
        """
        if len({place.patched for place in self.places}) != 1 or not self.places[0].layers:
            raise LensError("a figure by layer takes places of one kind; choose them with only('layer').")
        x = np.array([place.layers[0] for place in self.places], dtype=np.float64)
        return spread(self.ratios(), x, "", self.title, self.restored())

    def only(self, patched: Patched) -> Sweep:
        """The places of one kind."""
        kept = [i for i, place in enumerate(self.places) if place.patched == patched]
        return replace(self, places=tuple(self.places[i] for i in kept), patched=self.patched[:, kept])


def windows_of(layers: Sequence[int] | None, count: int, width: int) -> list[tuple[int, ...]]:
    """Windows of neighbouring layers by their first one; negative layers count from the end.

    Raises:
        LensError: there is no such layer, or no window of that width.
    """
    if not 1 <= width <= count or (layers is not None and not all(-count <= layer < count for layer in layers)):
        raise LensError(f"layers {layers or 'of all'} in windows of {width} do not fit a model of {count} layers.")
    first = sorted({range(count)[layer] for layer in (range(count) if layers is None else layers)})
    found = [tuple(range(layer, layer + width)) for layer in first if layer + width <= count]
    if not found:
        raise LensError(f"no window of {width} layers begins at {first[0]} in a model of {count} layers.")
    return found


def measured(outcome: torch.Tensor, rows: int) -> Floats:
    """An outcome as float64 (rows,); raises LensError if it is not one finite number a prompt."""
    if outcome.shape != (rows,) or not bool(torch.isfinite(outcome).all()):
        raise LensError(f"the outcome gives no finite number for each of {rows} prompts; return a tensor ({rows},).")
    return np.asarray(outcome.detach().double().cpu().numpy(), dtype=np.float64)
