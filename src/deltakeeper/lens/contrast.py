"""Two sets of prompts along the base's direction between them, in every variant: numbers, told with their controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltakeeper.lens.comparison import Bands
from deltakeeper.lens.controls import COUNT, ControlledSeparation
from deltakeeper.lens.separation import LEVEL
from deltakeeper.lens.trace_json import plain_number
from deltakeeper.lens.trace_statistics import Floats

if TYPE_CHECKING:
    from deltakeeper.lens.figures import LensFigure

FORMAT = "deltakeeper.lens.contrast"
VERSION = 1
DEFINITIONS = {
    "direction": "difference of the base's means over both sets at the last token of the prompt, layer by layer, of "
    "the first, third, … prompt of each set; all other numbers are of the second, fourth, … ones",
    "apart": "difference of the sets' mean projections on it in pooled standard deviations, with its 95 % interval",
    "AUC": "how often a prompt of the first set lies above one of the second, by chance 0.5",
    "kept": "difference of the sets' mean projections in shares of the base's, with 95 % over resamples of the "
    "prompts; none where the base does not hold the sets apart",
    "controls": f"{COUNT} directions of each kind that mean nothing, on the same prompts: isotropic, of the streams' "
    "covariance, of shuffled labels, and between halves of the second set; the nearest is the kind of which one in "
    "twenty reaches farthest: that size, and the share that come as far as the base's direction, itself counted in",
    "layer": "where the base's direction holds the sets farthest apart among the prompts that it is fitted on, each "
    "left out in turn",
}
"""To be printed beside the numbers."""


@dataclass(frozen=True, eq=False)
class VariantContrast:
    """One variant on the prompts that judge; arrays float64 (L,).

    Attributes:
        found: how far the base's direction sets them apart, beside controls.
        kept: of the base's difference of mean projections; NaN where the base shows none.
        kept_low: lower end of its 95 % interval.
        kept_high: upper end.
        asked: projections of the first set, in the base's pooled standard deviations from its mean of the second.
        against: of the second set.
    """

    found: ControlledSeparation
    kept: Floats
    kept_low: Floats
    kept_high: Floats
    asked: Bands
    against: Bands


@dataclass(frozen=True, eq=False)
class Contrast:
    """All variants on one direction.

    Attributes:
        layers: numbers of the layers.
        place: of the layer that is told first, in `layers`.
        fitted: how many prompts of each set the direction is fitted on.
        judged: how many of each judge it.
        variants: by name, the base first.
    """

    layers: tuple[int, ...]
    place: int
    fitted: tuple[int, int]
    judged: tuple[int, int]
    variants: Mapping[str, VariantContrast]

    @property
    def layer(self) -> int:
        """The layer that is told first."""
        return self.layers[self.place]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the definitions of the numbers."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "definitions": DEFINITIONS,
            "layers": list(self.layers),
            "layer": self.layer,
            "fitted": list(self.fitted),
            "judged": list(self.judged),
            "variants": {name: _to_json(one) for name, one in self.variants.items()},
        }


def reach_of(effects: Floats) -> Floats:
    """The size that one in twenty of some controls `(draws, L)` reaches: (L,)."""
    return np.asarray(np.quantile(np.abs(effects), LEVEL, axis=0))


def draw_contrast(found: Contrast) -> LensFigure:
    """How far apart each variant holds the sets, by layer, and in grey what controls do in the base.

    Raises:
        LensError: matplotlib is not installed.
    """
    from deltakeeper.lens.figures import bands

    x, count = np.array(found.layers, dtype=np.float64), sum(found.judged)
    times = np.full(len(x), count, dtype=np.int64)
    series, controls = {}, {}
    for name, one in found.variants.items():
        own = one.found.separation
        series[name] = Bands(x, own.effect, own.low, own.high, "", name, times)
    for name, effects in next(iter(found.variants.values())).found.controls.items():
        low, middle, high = np.quantile(effects, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2], axis=0)
        controls[name] = Bands(x, middle, low, high, "", name, times)
    return bands(
        series,
        controls=controls,
        title="How far apart the base's direction holds the two sets",
        y_name="pooled standard deviations",
        note=f"line: of {found.judged[0]} and {found.judged[1]} prompts that it was not fitted on   band: 95 %   "
        "grey: 95 % of controls in the base",
    )


def _to_json(one: VariantContrast) -> dict[str, Any]:
    own = one.found.separation
    numbers = {"apart": own.effect, "low": own.low, "high": own.high, "auc": own.auc}
    numbers |= {"kept": one.kept, "kept_low": one.kept_low, "kept_high": one.kept_high}
    return {
        **{name: _numbers(values) for name, values in numbers.items()},
        "controls": {
            name: {"reach": _numbers(reach_of(effects)), "share": _numbers(one.found.reached[name])}
            for name, effects in one.found.controls.items()
        },
        "projections": {
            name: {part: _numbers(getattr(line, part)) for part in ("median", "low", "high")}
            for name, line in (("prompts", one.asked), ("against", one.against))
        },
    }


def _numbers(values: Floats) -> list[float | None]:
    return [plain_number(value) for value in values.tolist()]
