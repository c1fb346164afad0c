"""Layers in the order of what patching them restores, small enough to be kept as JSON: what layer-wise budgets read."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from deltakeeper.errors import DataError
from deltakeeper.lens.restored import MOST_FAILING, PATCHED, Place, Sweep
from deltakeeper.lens.trace_statistics import Floats

VERSION = 2
LEVEL = 0.95
MOST_PLACES = 10_000
Share = Literal["restored", "gained"]
_FIELDS = {"version", "donor", "receiver", "title", "share", "prompts", "places", "origin"}
_ROOT = re.compile(r"[0-9a-f]{64}")
_PLACE_FIELDS = {"patched", "layers", "share", "low", "high"}


@dataclass(frozen=True)
class RankedPlace:
    """What a place restores.

    Attributes:
        place: a layer, a window of layers, or a part of either.
        share: restored or gained share, a ratio of sums; None where donor and receiver do not differ.
        low: lower end of its 95 % interval over resamples of the prompts; None without.
        high: upper end.
    """

    place: Place
    share: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Origin:
    """Fingerprint roots of the checkpoints that a ranking was made of.

    Attributes:
        base: of the base.
        donor: of the fine-tune that the donor is, or that its delta was made of; the base's for the base.
        receiver: the same of the receiver.
    """

    base: str
    donor: str
    receiver: str


@dataclass(frozen=True)
class LayerRanking:
    """Places from the one that restores most to the one that restores least, those without a number last.

    Attributes:
        places: ordered.
        donor: name of the variant that gives.
        receiver: name of the variant that is patched.
        title: what was done, one line.
        share: `restored`, or `gained` over the place before (see `Sweep.gained`).
        prompts: how many were patched.
        origin: which checkpoints these are; None where that is not known, as in files of version 1.
    """

    places: tuple[RankedPlace, ...]
    donor: str
    receiver: str
    title: str
    share: Share
    prompts: int
    origin: Origin | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`."""
        places = [
            {"patched": p.place.patched, "layers": list(p.place.layers), "share": p.share, "low": p.low, "high": p.high}
            for p in self.places
        ]
        names = {"donor": self.donor, "receiver": self.receiver, "title": self.title, "share": self.share}
        origin = None if self.origin is None else asdict(self.origin)
        return {"version": VERSION, **names, "prompts": self.prompts, "places": places, "origin": origin}

    @classmethod
    def from_json(cls, value: Any) -> LayerRanking:
        """What `to_json` gave, now or in version 1, which did not say of which checkpoints a ranking is.

        Raises:
            DataError: it is something else.
        """
        if isinstance(value, dict) and value.get("version") == 1 and "origin" not in value:
            value = {**value, "version": VERSION, "origin": None}
        if not isinstance(value, dict) or set(value) != _FIELDS or value["version"] != VERSION:
            raise _unsound("it does not have the fields of this version")
        texts = {key: value[key] for key in ("donor", "receiver", "title", "share")}
        if not all(isinstance(text, str) for text in texts.values()) or texts["share"] not in ("restored", "gained"):
            raise _unsound("a name is no text")
        prompts, places = value["prompts"], value["places"]
        if not _is_count(prompts) or not isinstance(places, list) or len(places) > MOST_PLACES:
            raise _unsound("'prompts' is no count or 'places' no list")
        return cls(tuple(_place(item) for item in places), prompts=prompts, origin=_origin(value["origin"]), **texts)


def rank_places(sweep: Sweep, counts: Floats | None = None, share: Share | None = None) -> LayerRanking:
    """Order the places of a sweep.

    Args:
        sweep: of streams or of deltas.
        counts: how often each prompt counts, (resamples, prompts), as a bootstrap draws them, for intervals.
        share: `gained` by default for streams, which hold what all layers before did, else `restored`.

    Raises:
        LensError: the counts are of another number of prompts.
    """
    chosen = share or ("gained" if sweep.places and sweep.places[0].patched == "stream" else "restored")
    measure = sweep.gained if chosen == "gained" else sweep.restored
    values = measure()
    low = high = np.full(len(values), np.nan)
    if counts is not None:
        drawn = measure(counts)
        enough = np.isfinite(drawn).mean(0) >= 1 - MOST_FAILING
        for array, level in ((low := low.copy(), (1 - LEVEL) / 2), (high := high.copy(), (1 + LEVEL) / 2)):
            for column in np.flatnonzero(enough):
                array[column] = np.nanquantile(drawn[:, column], level)
    order = np.argsort(-np.where(np.isfinite(values), values, -np.inf), kind="stable")
    places = tuple(RankedPlace(sweep.places[i], *(_or_none(a[i]) for a in (values, low, high))) for i in order)
    return LayerRanking(places, sweep.donor, sweep.receiver, sweep.title, chosen, len(sweep.patched))


def _place(item: Any) -> RankedPlace:
    if not isinstance(item, dict) or set(item) != _PLACE_FIELDS or item["patched"] not in PATCHED:
        raise _unsound("a place does not have the fields of this version")
    layers = item["layers"]
    if not isinstance(layers, list) or len(layers) > MOST_PLACES or not all(_is_count(layer) for layer in layers):
        raise _unsound("the layers of a place are no counts")
    numbers = [item[key] for key in ("share", "low", "high")]
    for number in numbers:
        plain = isinstance(number, int | float) and not isinstance(number, bool)
        if number is not None and not (plain and math.isfinite(number)):
            raise _unsound("a share is no finite number")
    return RankedPlace(Place(item["patched"], tuple(layers)), *numbers)


def _origin(item: Any) -> Origin | None:
    if item is None:
        return None
    if not isinstance(item, dict) or set(item) != {field.name for field in fields(Origin)}:
        raise _unsound("its origin does not have the fields of this version")
    if not all(isinstance(root, str) and _ROOT.fullmatch(root) for root in item.values()):
        raise _unsound("its origin is not made of fingerprints")
    return Origin(**item)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _unsound(why: str) -> DataError:
    return DataError(f"this is no sound ranking of layers: {why}; rank the layers again.")
