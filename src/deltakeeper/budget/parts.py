"""The matrices of one tensor, and a sample of their rows on which the error of a candidate is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from deltakeeper.codecs.base import Inputs
from deltakeeper.delta import TensorDelta
from deltakeeper.layouts.bits import row_blocks
from deltakeeper.layouts.philox import philox, philox_key

Calibrated = Callable[[str], Inputs | None]
"""Gives what the layer of a matrix was fed, by the tensor's name (`name[i]` for the i-th expert)."""

SAMPLE = 1 << 19
"""Entries that a candidate is tried on: rows drawn once per tensor, by its name. On Gaussian deltas the errors of sign
planes, group-wise integers and pruning come out within 1 % of those of the whole tensor."""


BLOCK = 1 << 17
"""Entries summed at once in float32, which loses little over so few."""


@dataclass(frozen=True, eq=False)
class Part:
    """One `(out, in)` matrix of a tensor: the tensor itself, or one expert.

    Attributes:
        label: name that its codec is given.
        index: which expert it is, None for a tensor of two dimensions.
        base: the base's matrix over the shared rows, in its own dtype.
        tuned: the fine-tune's.
        share: entries to sample, at least one row.
        inputs: what its layer was fed, or None.
    """

    label: str
    index: int | None
    base: torch.Tensor
    tuned: torch.Tensor
    share: int
    inputs: Inputs | None

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.tuned.shape[0], self.tuned.shape[1]

    def full(self) -> torch.Tensor:
        """The whole delta, float32 `(out, in)`."""
        return (self.tuned.to(torch.float32, copy=True) - self.base).contiguous()

    @cached_property
    def rows(self) -> torch.Tensor:
        """The sampled rows of the delta, float32; all of them where they are few."""
        count = max(1, self.share // self.shape[1])
        if self.whole:
            return self.full()
        words = philox(philox_key(0, self.label), 0, -(-self.shape[0] // 4)).reshape(-1)[: self.shape[0]]
        chosen = torch.from_numpy(np.sort(np.argsort(words, kind="stable")[:count]))
        return (self.tuned[chosen].to(torch.float32) - self.base[chosen]).contiguous()

    @property
    def whole(self) -> bool:
        """Whether the sample is the matrix itself."""
        return self.share >= math.prod(self.shape)

    @cached_property
    def square(self) -> float:
        """Squared Frobenius norm of the whole delta, from one pass over it."""
        if self.whole:
            return squared(self.rows, None)
        blocks = (self.tuned[r].to(torch.float32) - self.base[r] for r in row_blocks(*self.shape))
        return math.fsum(squared(block, None) for block in blocks)

    @cached_property
    def scale(self) -> float:
        """What an error over the sample is multiplied by to stand for the matrix."""
        sampled = squared(self.rows, None)
        return self.square / sampled if sampled and self.inputs is None else self.shape[0] / len(self.rows)

    @cached_property
    def energy(self) -> float:
        """Error of taking the base: the squared norm, weighted by the inputs where there are any."""
        return self.square if self.inputs is None else self.error(self.rows)

    def error(self, difference: torch.Tensor) -> float:
        """Squared error of the matrix, from the difference over the sampled rows."""
        return self.scale * squared(difference, self.inputs)


def parts_of(delta: TensorDelta, inputs: Calibrated | None) -> list[Part]:
    """The matrices of a tensor that has a base."""
    if delta.base is None:
        raise ValueError(f"'{delta.name}' has no base")
    base, tuned = delta.base[: delta.shared_rows], delta.tuned[: delta.shared_rows]
    views: list[tuple[str, int | None, torch.Tensor, torch.Tensor]]
    if tuned.ndim == 2:
        views = [(delta.name, None, base.T if delta.transposed else base, tuned.T if delta.transposed else tuned)]
    else:
        views = [(f"{delta.name}[{i}]", i, b, t) for i, (b, t) in enumerate(zip(base, tuned, strict=True))]
    share = SAMPLE // len(views)
    return [Part(label, i, b, t, share, inputs(label) if inputs else None) for label, i, b, t in views]


def squared(matrix: torch.Tensor, inputs: Inputs | None) -> float:
    """`|E|²` or, with the inputs' Gram matrix `G`, `tr(E G Eᵀ)`; scaled where squares would leave float32."""
    if not matrix.numel():
        return 0.0
    low, high = torch.aminmax(matrix)
    peak = max(-float(low), float(high))
    if not math.isfinite(peak) or peak == 0.0:
        return peak
    factor = 1.0 if 1e-12 < peak < 1e12 else peak
    unit = (matrix if factor == 1.0 else matrix / factor).reshape(-1)
    other = unit if inputs is None else (unit.view(matrix.shape) @ inputs.gram).view(-1)
    blocks = (slice(start, start + BLOCK) for start in range(0, unit.numel(), BLOCK))
    return max(0.0, math.fsum(float(unit[block].dot(other[block])) for block in blocks)) * factor * factor
