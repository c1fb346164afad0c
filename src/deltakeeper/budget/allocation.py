"""Share out a number of bytes over the tensors of a fine-tune so that the error is least."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from deltakeeper.budget.curves import Curve, Measurer, Point
from deltakeeper.budget.parts import Calibrated
from deltakeeper.budget.sizes import parse_ratio, parse_size
from deltakeeper.budget.solve import choose
from deltakeeper.budget.texts import total_bytes
from deltakeeper.codecs import Codec
from deltakeeper.delta import DeltaPair
from deltakeeper.errors import CodecError
from deltakeeper.plan import Choice, Rules, encodable, in_order

Progress = Callable[[int, int, str], None]

SMALL = 1 << 22
"""Pairs of fewer entries get fine steps for every tensor at once, because they are cheap and the steps are few."""

CALIBRATION_NOTE = 512
UNSURE = 0.004
"""Share by which the payload of a calibrated codec may grow, where its size hangs on the data: what a layer is fed
changes once the layers before it are compressed."""

ROUNDS = 24
NEAR = 0.995
"""Below this share of the budget, steps are made finer: half a percent is left for what is written in fewer digits."""


@dataclass(frozen=True)
class TensorPlan:
    """What is foreseen for one tensor.

    Attributes:
        bytes: payload bytes.
        error: squared error `|D - D'|²`, or `tr((D - D') G (D - D')ᵀ)` with inputs.
        energy: the error of taking the base.
    """

    bytes: int
    error: float
    energy: float


@dataclass(frozen=True)
class Allocation:
    """What is to be done with each tensor so that the artifact meets a budget.

    Attributes:
        choices: treatment and codec of every tensor; what is unchanged stands as a value, and costs nothing.
        predicted: bytes and errors of every tensor that is not tied.
        total_bytes: bytes of the artifact, never less than what will be written.
        target_bytes: the budget.
    """

    choices: dict[str, Choice]
    predicted: dict[str, TensorPlan]
    total_bytes: int
    target_bytes: int

    @property
    def codecs(self) -> dict[str, Codec]:
        """The codec of every tensor whose delta is encoded."""
        return {name: choice.codec for name, choice in self.choices.items() if choice.codec is not None}

    @property
    def error(self) -> float:
        """Sum of the predicted errors."""
        return math.fsum(plan.error for plan in self.predicted.values())


def target_bytes(pair: DeltaPair, *, size: str | None = None, ratio: str | None = None) -> int | None:
    """The budget that a size (`400MB`) or a ratio (`16`, of the fine-tune's bytes) asks for; None without either.

    Raises:
        CodecError: both are given, or one cannot be read.
    """
    if size is not None and ratio is not None:
        raise CodecError("a target size and a target ratio are two budgets; give one of them.")
    if ratio is not None:
        return parse_ratio(ratio, sum(i.nbytes for name, i in pair.tuned.tensors.items() if name not in pair.tied))
    return None if size is None else parse_size(size)


def allocate(
    pair: DeltaPair,
    rules: Rules,
    target_bytes: int,
    *,
    inputs: Calibrated | None = None,
    weights: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Allocation:
    """Choose settings of the rules' codec for each tensor, so that the artifact takes at most `target_bytes`.

    Tensors are read one at a time, and each step of the codec is measured (on a sample of the rows of large tensors).
    To take a tensor from the base and to store it as it is are candidates as well.

    Args:
        pair: base and fine-tune.
        rules: the codec whose settings are chosen (`Auto()` for the best of several) and what else holds.
        target_bytes: the most that `DeltaArtifact.nbytes` may be.
        inputs: gives what each layer was fed; errors are then those of the layers' outputs.
        weights: what the error of a tensor is multiplied by, above 0; 1 for those that are not named.
        progress: called before each tensor with (done, in all, name).

    Returns:
        An allocation within 1 % under the budget, unless everything fits whole or no steps are small enough.

    Raises:
        CodecError: the smallest artifact is larger than the budget, the codec has nothing to choose, a weight is not
            above 0, or a delta is not finite.
    """
    if odd := [name for name, weight in (weights or {}).items() if not 0 < weight < math.inf]:
        raise CodecError(
            f"the error of '{odd[0]}' cannot be weighed by {(weights or {})[odd[0]]}; weights are above 0."
        )
    measurer = Measurer(pair, rules, target_bytes, inputs)
    names = in_order(pair.names())  # the order in which inputs are gathered
    fine = sum(pair.tuned.tensors[name].numel for name in names if encodable(pair, name)) <= SMALL
    curves = []
    for i, name in enumerate(names):
        if progress:
            progress(i, len(names), name)
        curves.append(measurer.curve(name, fine))
    if inputs is not None:
        _make_comparable(curves, pair)
    for curve in curves:
        curve.scale(1.0 if weights is None else weights.get(curve.name, 1.0))
    return _Search(measurer, curves).run()


def _make_comparable(curves: list[Curve], pair: DeltaPair) -> None:
    """Bring errors without inputs to the scale of a layer's mean squared output error per token.

    An embedding's row is its output, so its error is the mean over rows; others count as fed what layers are fed on
    average.
    """
    gains = [curve.gain for curve in curves if curve.gain is not None]
    typical = sum(gains) / len(gains) if sum(gains) else 1.0
    for curve in curves:
        if curve.gain is None:
            embedding = pair.role(curve.name) == "embedding"
            rows = pair.tuned.tensors[curve.name].shape[:1]
            curve.scale(1 / rows[0] if embedding and rows else typical)


class _Search:
    """The rounds of one allocation: choose, make guessed sizes certain, fill what is left over."""

    def __init__(self, measurer: Measurer, curves: list[Curve]) -> None:
        self.measurer, self.curves, self.target = measurer, curves, measurer.target
        self.room = 0

    def run(self) -> Allocation:
        least = [self._least(curve) for curve in self.curves]
        smallest = self._total(least)
        if smallest > self.target:
            raise CodecError(
                f"the budget of {self.target} bytes is too small: the smallest artifact of this pair takes {smallest} "
                f"bytes; give that many{self._advice()}."
            )
        # Figures in the report can be a few digits longer than usual, and it names the calibration text.
        spare = max(16, self.target // 4096) + (0 if self.measurer.inputs is None else CALIBRATION_NOTE)
        self.room = self.target - spare - (smallest - sum(point.size for point in least))
        best = least
        for _ in range(ROUNDS):
            points = self._choose()
            if points is None:
                break
            guessed = [(curve, point) for curve, point in zip(self.curves, points, strict=True) if not point.exact]
            if guessed:
                for curve, point in guessed:
                    self.measurer.settle(curve, point)
                continue
            total = self._total(points)
            if total > self.target:
                self.room -= total - self.target
                continue
            if _error(points) <= _error(best):
                best = points
            if total >= NEAR * self.target or not self._refine(points, self.target - total):
                break
        else:
            self._drop_guesses()
            points = self._choose()
            if points and self._total(points) <= self.target and _error(points) < _error(best):
                best = points
        return self._allocation(best)

    def _advice(self) -> str:
        """What else would make room, of what the rules keep whole."""
        rules = self.measurer.rules
        kept = ["embeddings"] if rules.embeddings == "dense" else []
        kept += ["norms"] if rules.norms == "dense" else []
        return f", or do not store {' and '.join(kept)} dense" if kept else ""

    def _least(self, curve: Curve) -> Point:
        """The smallest candidate, of a size that is certain."""
        while not (least := min(curve.points, key=lambda point: point.size)).exact:
            self.measurer.settle(curve, least)
        return least

    def _choose(self) -> list[Point] | None:
        chosen = choose([[(p.size, p.error) for p in curve.points] for curve in self.curves], self.room)
        return None if chosen is None else [curve.points[i] for curve, i in zip(self.curves, chosen, strict=True)]

    def _refine(self, points: list[Point], slack: int) -> bool:
        """Add fine steps to the two smallest tensors that have an error left; small ones are quick and step finely."""
        tensors = self.measurer.pair.tuned.tensors
        open_ones = [
            (curve, point)
            for curve, point in zip(self.curves, points, strict=True)
            if point.error > min(p.error for p in curve.points)
            and point.choice.codec not in curve.refined
            and (point.choice.codec is not None or self.measurer.fine_step(curve.name) < slack)
        ]
        open_ones.sort(key=lambda both: tensors[both[0].name].numel)
        for curve, point in open_ones[:2]:
            self.measurer.refine(curve, point)
        return bool(open_ones)

    def _drop_guesses(self) -> None:
        for curve in self.curves:
            curve.points = [point for point in curve.points if point.exact]

    def _total(self, points: list[Point]) -> int:
        tensors = {curve.name: point.stored for curve, point in zip(self.curves, points, strict=True)}
        unsure = sum(point.stored.payload for point in points if self._hangs_on_inputs(point.choice.codec))
        return total_bytes(self.measurer.pair, self.measurer.rules.codec, tensors) + math.ceil(UNSURE * unsure)

    def _hangs_on_inputs(self, codec: Codec | None) -> bool:
        calibrated = self.measurer.inputs is not None and codec is not None and codec.uses_inputs
        return calibrated and codec is not None and codec.payload_bytes((64, 64)) is None

    def _allocation(self, points: list[Point]) -> Allocation:
        both = list(zip(self.curves, points, strict=True))
        plans = {
            curve.name: TensorPlan(point.stored.payload, point.error, curve.energy)
            for curve, point in both
            if point.choice.treatment != "tied"
        }
        choices = {curve.name: point.choice for curve, point in both}
        return Allocation(choices, plans, self._total(points), self.target)


def _error(points: list[Point]) -> float:
    return math.fsum(point.error for point in points)
