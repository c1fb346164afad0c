"""Settings of guarded healing, checked where they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from deltakeeper.errors import DataError


@dataclass(frozen=True)
class GuardSettings:
    """How the continuous values of a delta are fitted to two teachers.

    Attributes:
        steps: steps of Adam.
        rows: exchanges in a step, shared out over the kinds of lessons.
        shares: part of a step by kind of lesson, 1 for a kind that is not named.
        lr: learning rate in units of each value tensor, after a short warm-up falling to zero along a cosine.
        rank: rank of a low-rank term that is added to the matrices inside the model and starts at zero; 0 for none.
        rank_lr: learning rate of that term, relative to `lr`.
        own: whether the values of the delta itself are trained; without it the added term alone is.
        widen: give sign planes with one scale a matrix one for each row, which costs four bytes a row.
        start: factor on every scale before the first step; below 1 the delta is built up again from a smaller one.
        first: weight of the first token of an answer beside the later ones: whether to refuse is decided there.
        sharpen: factor on the base's logits; above 1 it speaks more decidedly than it is, on either side of a refusal.
        radius: how far an adversary moves the embeddings of probes, in usual embeddings; 0 for no adversary.
        ascents: steps of the adversary for each step of the guard.
        seed: decides the order of the lessons, the added term and where the adversary begins.
    """

    steps: int = 48
    rows: int = 16
    shares: Mapping[str, float] = field(default_factory=dict)
    lr: float = 5e-2
    rank: int = 4
    rank_lr: float = 1.0
    own: bool = True
    widen: bool = True
    start: float = 1.0
    first: float = 1.0
    sharpen: float = 1.0
    radius: float = 0.0
    ascents: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("rows", 1), ("rank", 0), ("ascents", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise DataError(f"guarding with {name} = {value} makes no sense; give a whole number from {least}.")
        for name in ("lr", "rank_lr", "start", "first", "sharpen"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise DataError(f"guarding with {name} = {value} makes no sense; give a number above 0.")
        if not (math.isfinite(self.radius) and self.radius >= 0):
            raise DataError(f"guarding with radius = {self.radius} makes no sense; give 0 or more.")
        if any(not (math.isfinite(share) and share >= 0) for share in self.shares.values()):
            raise DataError("a share of a kind of lessons is below 0; give 0 or more.")

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON."""
        return {**asdict(self), "shares": dict(sorted(self.shares.items()))}
