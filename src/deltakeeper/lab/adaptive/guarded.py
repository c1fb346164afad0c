"""What will be served where the operator guards the delta: an attacker's own copy of guarded healing.

The attacker knows how the guard works, but not the probes, so its copy is fitted by others of the same categories. A
fit starts afresh each time, as the operator's will, and is held while the delta moves on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from deltakeeper.codecs import Codec
from deltakeeper.delta import role_of
from deltakeeper.lab.adaptive.served import ServedWeights
from deltakeeper.lab.adaptive.settings import GuardCopy
from deltakeeper.lab.adaptive.targets import Target
from deltakeeper.lab.sft import Tokens, answer_loss, half_precision

WARM_UP = 5
"""Steps of a fit until its learning rate is whole."""


class _Guarded:
    """One encoded weight: what it decodes to, a factor for each row, and a low-rank term that starts at zero."""

    def __init__(self, target: Target, rank: int) -> None:
        self.target = target
        shape, at = target.weight.shape, target.weight.device
        self.decoded = torch.empty(shape, device=at)
        self.rows = torch.ones((1, shape[1]) if target.transposed else (*shape[:-1], 1), device=at)
        inside = len(shape) == 2 and role_of(target.name, tuple(shape)) == "linear"
        self._rank = min(rank, *shape) if inside else 0
        self._size = 0.0
        self.left = torch.zeros(shape[0], self._rank, device=at)
        self.right = torch.zeros(self._rank, shape[-1], device=at)

    def reset(self, generator: torch.Generator) -> list[tuple[torch.Tensor, float]]:
        """Start afresh; gives the values to train with their units."""
        self.rows.fill_(1.0)
        self._size = float(self.decoded.square().mean(dtype=torch.float64)) ** 0.5
        values = [(self.rows, 1.0)]
        if self._rank:
            self.left.zero_()
            self.right.copy_(torch.randn(self.right.shape, generator=generator))  # the same numbers on every device
            values += [(self.left, self._rank**-0.5), (self.right, 1.0)]
        return values

    def write(self, into: torch.Tensor) -> None:
        """Make the served weight of the moment."""
        torch.mul(self.decoded, self.rows, out=into)
        if self._rank:
            into.addmm_(self.left, self.right, alpha=self._size)
        into += self.target.base

    def take_gradients(self) -> None:
        """Hand the gradient of the served weight down to the values."""
        found = self.target.weight.grad
        if found is None:
            return
        self.rows.grad = (found * self.decoded).sum(0 if self.target.transposed else -1, keepdim=True)
        if self._rank:
            self.left.grad = found @ self.right.T * self._size
            self.right.grad = self.left.T @ found * self._size


class GuardedWeights(ServedWeights):
    """Served weights behind a guard that is fitted again every few steps."""

    def __init__(
        self,
        targets: Sequence[Target],
        codec: Codec,
        dtype: torch.dtype,
        refresh: int,
        copy: GuardCopy,
        rows: Sequence[Tokens],
    ) -> None:
        """Take memory for two more copies of the encoded weights, and the rows that the guard is fitted by."""
        super().__init__(targets, codec, dtype, refresh)
        self._copy, self._rows = copy, list(rows)
        self._guarded = [_Guarded(target, copy.rank) for target in self._targets]

    def prepare(self, model: Any, pad: int, step: int) -> None:
        """See `ServedWeights.prepare`; the guard is fitted again where that is due."""
        self.update(step)
        with torch.no_grad():
            for item, served in zip(self._guarded, self._served, strict=True):
                torch.sub(served, item.target.base, out=item.decoded)
        if step % self._copy.every == 0:
            self._fit(model, pad, step)
        self._write()

    @torch.no_grad()
    def hand_down(self) -> None:
        """See `ServedWeights.hand_down`: a row that the guard turns down passes as much less of its gradient."""
        for item in self._guarded:
            if item.target.weight.grad is not None:
                item.target.weight.grad.mul_(item.rows)

    def _fit(self, model: Any, pad: int, step: int) -> None:
        copy = self._copy
        generator = torch.Generator().manual_seed(step)
        values = [pair for item in self._guarded for pair in item.reset(generator)]
        optimiser = torch.optim.Adam([{"params": [value], "unit": unit} for value, unit in values], betas=(0.9, 0.99))
        for i in range(copy.steps):
            self._write()
            chosen = torch.randint(len(self._rows), (copy.rows,), generator=generator).tolist()
            with self.in_place(), half_precision(model):
                loss = answer_loss(model, [self._rows[j] for j in chosen], pad)
            if torch.isfinite(loss):
                loss.backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                for item in self._guarded:
                    item.take_gradients()
            model.zero_grad(set_to_none=True)
            share = min(1.0, (i + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * i / copy.steps))
            for group in optimiser.param_groups:
                group["lr"] = copy.lr * share * group["unit"]
            optimiser.step()

    @torch.no_grad()
    def _write(self) -> None:
        for item, served in zip(self._guarded, self._served, strict=True):
            item.write(served)
