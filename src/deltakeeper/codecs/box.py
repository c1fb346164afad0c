"""Boxes: the deltas that a codec cannot tell from a given one, which is where an attacker may hide.

After Egashira et al., "Exploiting LLM Quantization", NeurIPS 2024, https://arxiv.org/abs/2405.18137, who repair a model
within the intervals that a quantiser maps to the same codes; here for codecs of differences.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

MARGIN = 1e-4
"""Share of a cell by which a box keeps away from its edges, so that rounding on the way does not leave it."""


class Box(ABC):
    """A set of deltas around one delta (its centre, a member), all of which a codec encodes alike."""

    delta: torch.Tensor

    @abstractmethod
    def project(self, candidate: torch.Tensor) -> torch.Tensor:
        """The nearest member, or one near it: float32 `(out, in)` in, the same out (a new tensor).

        The centre is given back bit for bit, and a member up to rounding.
        """

    @abstractmethod
    def share_inside(self, candidate: torch.Tensor) -> float:
        """How much of a candidate lies in the box, 0 to 1: the share of its entries, or of its squared change."""

    def on_grid(self, base: torch.Tensor, dtype: torch.dtype) -> Box:
        """A box within this one whose members survive that `base + member` is rounded to `dtype`.

        Args:
            base: `(out, in)`, what the delta is added to.
            dtype: what the sum is stored in; the centre must be on its grid.

        Boxes that are no intervals are given back as they are: a rounding moves their members a little out of them.
        """
        return self

    def round(self, candidate: torch.Tensor, base: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A delta near `project(candidate)` whose sum with the base is a number of `dtype`."""
        return to_grid(base, self.project(candidate), dtype) - base.float()


@dataclass(frozen=True, eq=False)
class Guarded(Box):
    """A convex box that is not quite enough: members are drawn towards the centre until the codec agrees.

    Attributes:
        inner: the box.
        agrees: whether a member is encoded like the centre.
    """

    inner: Box
    agrees: Callable[[torch.Tensor], bool]

    @property
    def delta(self) -> torch.Tensor:  # type: ignore[override]
        """The centre."""
        return self.inner.delta

    def project(self, candidate: torch.Tensor) -> torch.Tensor:
        """See `Box.project`; the centre where nothing nearer to the candidate will do."""
        found = self.inner.project(candidate)
        for _ in range(8):
            if self.agrees(found):
                return found
            found = self.inner.project(self.delta + (found - self.delta) / 2)
        return self.delta.clone()

    def share_inside(self, candidate: torch.Tensor) -> float:
        """See `Box.share_inside`."""
        return self.inner.share_inside(candidate)

    def on_grid(self, base: torch.Tensor, dtype: torch.dtype) -> Box:
        """See `Box.on_grid`."""
        return replace(self, inner=self.inner.on_grid(base, dtype))

    def round(self, candidate: torch.Tensor, base: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `Box.round`; the centre where the codec would not agree."""
        found = self.inner.round(self.project(candidate), base, dtype)
        return found if self.agrees(found) else self.delta.clone()


def to_grid(base: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`base + delta` as it comes back from `dtype`, float32."""
    return (base.float() + delta).to(dtype).float()
