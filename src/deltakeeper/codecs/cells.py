"""Boxes of intervals: every entry of a delta in a cell of its own, and perhaps mean magnitudes that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from deltakeeper.codecs.box import Box, to_grid

Over = Literal["tensor", "row", "column"]

MEAN_TOLERANCE = 1e-6
"""Relative change of a mean magnitude that counts as none."""

_SHIFTS = 40  # halvings of a search for the shift that restores a mean on a grid


@dataclass(frozen=True, eq=False)
class Means:
    """Magnitudes that must stay the same on average.

    Attributes:
        signs: int8 `(out, in)`: the sign of each entry, 0 for entries that do not count.
        over: whether the mean is one of the tensor, or of each row or column.
        classes: uint8 `(out, in)`: entries of one number keep a mean of their own; None where all are of one class.
    """

    signs: torch.Tensor
    over: Over
    classes: torch.Tensor | None = None

    def members(self) -> list[torch.Tensor]:
        """The signs of each class, int8 `(out, in)`, 0 outside of it."""
        if self.classes is None:
            return [self.signs]
        return [self.signs * (self.classes == label) for label in torch.unique(self.classes).tolist()]

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sums of float32 `(out, in)` over tensor, rows or columns, float64, of a shape that broadcasts."""
        if self.over == "tensor":
            return values.sum(dtype=torch.float64).reshape(1, 1)
        return values.sum(dim=1 if self.over == "row" else 0, keepdim=True, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Cells(Box):
    """An interval for every entry, and perhaps mean magnitudes that stay.

    Attributes:
        delta: the centre, float32 `(out, in)`.
        low: float32 `(out, in)`, least value of each entry; `-inf` where there is none.
        high: float32 `(out, in)`, likewise.
        means: what stays on average.
    """

    delta: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    means: Means | None = None

    @classmethod
    def around(cls, delta: torch.Tensor, low: torch.Tensor, high: torch.Tensor, means: Means | None = None) -> Cells:
        """Intervals, each widened to hold its entry of the centre."""
        return cls(delta, torch.minimum(low, delta), torch.maximum(high, delta), means)

    @classmethod
    def holding(cls, delta: torch.Tensor, fixed: torch.Tensor, limit: float) -> Cells:
        """Entries of the mask `fixed` as they are, all others of at most the magnitude `limit`."""
        free = torch.full_like(delta, limit)
        return cls.around(delta, torch.where(fixed, delta, -free), torch.where(fixed, delta, free))

    def project(self, candidate: torch.Tensor) -> torch.Tensor:
        """See `Box.project`; the nearest point but for the means, which are restored by small shifts."""
        found = candidate.clamp(self.low, self.high)
        if self.means is not None:
            for signs in self.means.members():
                _restore(self, self.means, signs, found)
        return found

    def share_inside(self, candidate: torch.Tensor) -> float:
        """See `Box.share_inside`: the share of the entries that are in their interval."""
        inside = (candidate >= self.low) & (candidate <= self.high)
        return float(inside.sum()) / inside.numel()

    def on_grid(self, base: torch.Tensor, dtype: torch.dtype) -> Cells:
        """See `Box.on_grid`: the intervals shrink to the outermost numbers of the grid within them."""
        wide = base.double()
        low = _least_at_or_above(wide + self.low.double(), dtype).float() - base.float()
        high = -_least_at_or_above(-wide - self.high.double(), dtype).float() - base.float()
        return Cells.around(self.delta, low, high, self.means)

    def round(self, candidate: torch.Tensor, base: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `Box.round`; means are restored on the grid as well as it allows."""
        box = self.on_grid(base, dtype)
        inside = box.project(candidate)
        found = to_grid(base, inside, dtype) - base.float()
        if self.means is None:
            return found
        for signs in self.means.members():
            found = torch.where(signs != 0, _shifted(box, self.means, signs, inside, base, dtype), found)
        return found

    def meet(self, other: Cells, offset: torch.Tensor) -> Cells | None:
        """The entries that are in both boxes, `other` moved by `offset`; None where both have means."""
        if self.means is not None and other.means is not None:
            return None
        low, high = torch.maximum(self.low, other.low + offset), torch.minimum(self.high, other.high + offset)
        return Cells.around(self.delta, low, high, self.means or other.means)


def _least_at_or_above(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The least number of `dtype` that is not below each float64 value."""
    near = values.to(dtype)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near.double() < values, above, near)


def _restore(box: Cells, means: Means, signs: torch.Tensor, found: torch.Tensor) -> None:
    """Bring the sums of `signs * found` back to the centre's, in place, within the intervals."""
    wanted, have = means.total(box.delta * signs), means.total(found * signs)
    missing = wanted - have
    off = missing.abs() > MEAN_TOLERANCE * wanted.abs()
    if not bool(off.any()):
        return
    missing = torch.where(off, missing, 0.0)
    size = found * signs
    inner, outer = torch.where(signs > 0, box.low, -box.high), torch.where(signs > 0, box.high, -box.low)
    counted = signs != 0
    below = torch.where(counted, size - inner, 0.0)
    above = torch.where(counted, torch.where(torch.isinf(outer), 1.0, outer - size), 0.0)
    room = torch.where(missing > 0, means.total(above), means.total(below))
    share = torch.where(room > 0, missing / room, 0.0).float()
    found.addcmul_(signs.float(), share * torch.where(missing > 0, above, below))
    torch.clamp(found, box.low, box.high, out=found)


def _shifted(
    box: Cells, means: Means, signs: torch.Tensor, inside: torch.Tensor, base: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Entries of one class, all moved by one shift so that their sums are right after they are rounded to the grid."""
    wanted = means.total(box.delta * signs)
    room = float((inside * signs).abs().max()) or 1.0
    low, high = torch.full_like(wanted, -room), torch.full_like(wanted, room)
    best, least = inside, torch.full_like(wanted, torch.inf)
    for step in range(_SHIFTS):
        shift = (low + high) / 2 if step else torch.zeros_like(wanted)
        moved = (inside + signs * shift.float()).clamp_(box.low, box.high)
        tried = to_grid(base, moved, dtype) - base.float()
        error = means.total(tried * signs) - wanted
        better = error.abs() < least
        if bool(better.any()):
            best = torch.where(better, tried, best)
            least = torch.where(better, error.abs(), least)
        if bool((least <= 1e-4 * wanted.abs()).all()):
            break
        low, high = torch.where(error < 0, shift, low), torch.where(error < 0, high, shift)
    return best
