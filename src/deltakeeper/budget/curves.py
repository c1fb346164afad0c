"""Of one tensor: what may be done with it, and the bytes and the error of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from deltakeeper.budget.candidates import Found, fill, measure, spectral, tried
from deltakeeper.budget.ladders import finer
from deltakeeper.budget.parts import Calibrated, Part, parts_of, squared
from deltakeeper.budget.texts import Stored, stored
from deltakeeper.codecs import Codec, SumCodec, Svd
from deltakeeper.delta import DeltaPair, TensorDelta
from deltakeeper.errors import CodecError
from deltakeeper.plan import Choice, Rules, unchanged

FINE_RANK = 16


@dataclass(frozen=True)
class Point:
    """One candidate for one tensor.

    Attributes:
        choice: what would be done.
        stored: how it would lie in the artifact.
        error: squared error, weighted by inputs where there are any.
        size: bytes of payload and of what is written about it.
        exact: whether the size is certain; otherwise it was scaled up from a sample.
    """

    choice: Choice
    stored: Stored
    error: float
    size: int
    exact: bool = True


@dataclass
class Curve:
    """All candidates of one tensor.

    Attributes:
        name: the tensor.
        points: its candidates, at least one.
        energy: error of taking the base; 0 where nothing changed.
        gain: mean squared input where errors are weighted by inputs, else None.
        zeros: whether some entries of the delta are zero, as far as the sample tells.
        refined: codecs around which fine steps were added.
        factor: what measured errors are multiplied by, to make those without inputs comparable with the others, and
            to weigh tensors that matter more.
    """

    name: str
    points: list[Point]
    energy: float = 0.0
    gain: float | None = None
    zeros: bool = True
    refined: set[Codec | None] = field(default_factory=set)
    factor: float = 1.0

    def scale(self, factor: float) -> None:
        """Multiply all errors, of candidates that are added later too."""
        self.factor *= factor
        self.energy *= factor
        self.points = [replace(point, error=point.error * factor) for point in self.points]


class Measurer:
    """Measures tensors of one pair under one set of rules, one tensor at a time."""

    def __init__(self, pair: DeltaPair, rules: Rules, target: int, inputs: Calibrated | None) -> None:
        self.pair, self.rules, self.target, self.inputs = pair, rules, target, inputs
        full = sum(info.nbytes for name, info in pair.tuned.tensors.items() if name not in pair.tied)
        self.share = 2.0 ** math.ceil(math.log2(max(target, 1) / full))

    def curve(self, name: str, fine: bool) -> Curve:
        """All candidates of one tensor; `fine` adds low-rank terms on top of whole bits."""
        choice = self.rules.decide(self.pair, name)
        if choice.treatment == "tied":
            return Curve(name, [self._point(name, choice)])
        delta = self.pair.tensor(name)
        if unchanged(self.pair, delta):
            return Curve(name, [self._point(name, Choice("value"), same=True)])
        if choice.codec is None:
            energy = _plain_energy(delta)
            return Curve(name, [self._point(name, choice, energy if choice.treatment == "base" else 0.0)], energy)
        parts = parts_of(delta, self.inputs)
        energy = math.fsum(part.energy for part in parts)
        if not math.isfinite(energy):
            raise CodecError(f"the delta of '{name}' holds NaN or infinity; repair or leave out this checkpoint.")
        curve = Curve(name, [self._point(name, Choice("value"))], energy, _gain(parts))
        curve.zeros = any(not bool(part.rows.all()) for part in parts)
        if delta.base is not None and delta.base.shape == delta.tuned.shape and not choice.codec.unbiased:
            curve.points.append(self._point(name, Choice("base"), energy))
        self._add(curve, measure(parts, choice.codec, self.limit(parts[0].shape), fine))
        return curve

    def settle(self, curve: Curve, point: Point) -> None:
        """Encode the whole tensor with the codec of `point`, and put what it truly takes in the place of the guess."""
        codec = point.choice.codec
        if codec is None:
            return
        inputs = self.inputs if codec.uses_inputs else None  # gathering them again may mean to run the model again
        curve.points.remove(point)
        for found in tried(parts_of(self.pair.tensor(curve.name), inputs), [codec], whole=True):
            self._add(curve, [found])
            if self.inputs is not None and inputs is None:  # measured with equal weights now
                curve.points[-1] = replace(curve.points[-1], error=point.error)
            grown = curve.points[-1].stored.payload / max(1, point.stored.payload) - 1
            curve.points = [
                p if p.exact else replace(p, size=p.size + round(p.stored.payload * grown)) for p in curve.points
            ]

    def refine(self, curve: Curve, point: Point) -> None:
        """Add fine steps above `point`: up to the next rung of its ladder, and a small low-rank term on top of it."""
        codec = point.choice.codec
        curve.refined.add(codec)
        parts = parts_of(self.pair.tensor(curve.name), self.inputs)
        limit = self.limit(parts[0].shape)
        if codec is None:
            if self.rules.codec.unbiased:
                return
            ranks = list(range(1, min(FINE_RANK, limit) + 1))
            self._add(curve, spectral(parts, (), Svd(rank=1), ranks, max(ranks)))
            return
        if not codec.unbiased:
            self._add(curve, fill(parts, codec.parts[:1] if isinstance(codec, SumCodec) else [codec], limit))
        steps = finer(codec, limit)
        if isinstance(codec, Svd):
            ranks = [step.rank or 1 for step in steps if isinstance(step, Svd)]
            self._add(curve, spectral(parts, (), codec, ranks, limit) if ranks else [])
        else:
            self._add(curve, tried(parts, steps))

    def limit(self, shape: tuple[int, int]) -> int:
        """The largest rank worth trying: twice the bytes of an even share, rounded up so that near budgets agree."""
        out, columns = shape
        even = math.ceil(2 * self.share * out * columns / (out + columns))
        return max(1, min(out, columns, max(64, even)))

    def fine_step(self, name: str) -> int:
        """Bytes of one more rank, in half precision."""
        shape = self.pair.tuned.tensors[name].shape
        return 2 * sum(shape[-2:]) * (shape[0] if len(shape) == 3 else 1)

    def _add(self, curve: Curve, found: list[Found]) -> None:
        for item in found:
            choice = Choice("terms", item.codec)
            planned = stored(self.pair, curve.name, self.rules.codec, choice, item.terms, zeros=curve.zeros)
            size = planned.payload + planned.text(curve.name, self.target)
            curve.points.append(Point(choice, planned, item.error * curve.factor, size, item.exact))

    def _point(self, name: str, choice: Choice, error: float = 0.0, *, same: bool = False) -> Point:
        planned = stored(self.pair, name, self.rules.codec, choice, same=same)
        return Point(choice, planned, error, planned.payload + planned.text(name, self.target))


def _plain_energy(delta: TensorDelta) -> float:
    if delta.base is None or delta.base.shape != delta.tuned.shape:
        return 0.0
    return squared((delta.tuned.to(torch.float32) - delta.base.to(torch.float32)).reshape(-1), None)


def _gain(parts: list[Part]) -> float | None:
    known = [float(part.inputs.gram.diagonal().mean()) for part in parts if part.inputs is not None]
    return sum(known) / len(known) if known else None
