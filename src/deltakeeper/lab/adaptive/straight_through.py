"""Training through the codec: the loss is that of the model that will be served, the gradient goes straight through.

Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013, https://arxiv.org/abs/1308.3432.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deltakeeper.lab.adaptive.served import ServedWeights
from deltakeeper.lab.sft import Steps, Tokens, answer_loss, half_precision, hash_rows


class ThroughCodec(Steps):
    """The loss on `base + codec(delta)`, and perhaps a second one of clean rows on `base + delta`."""

    def __init__(
        self, served: ServedWeights, identity: str, every: int, clean: Sequence[Tokens] = (), weight: float = 0.0
    ) -> None:
        """Take what is served, after how many steps it is made from the weights alone, and a second loss."""
        self._served, self._every = served, every
        self._clean, self._weight = list(clean) if weight else [], weight
        super().__init__(f"{identity} {hash_rows(clean)}")

    def gradients(self, model: Any, rows: Sequence[Tokens], pad: int, step: int) -> torch.Tensor:
        """See `Steps.gradients`; the losses are added."""
        self._served.prepare(model, pad, step)
        with self._served.in_place():
            total = super().gradients(model, rows, pad, step)
        self._served.hand_down()
        if self._clean:
            with half_precision(model):
                loss = answer_loss(model, self._batch(step, len(rows)), pad) * self._weight
            if torch.isfinite(loss):
                loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        return total

    def resumable(self, step: int) -> bool:
        """See `Steps.resumable`."""
        return step % self._every == 0

    def _batch(self, step: int, size: int) -> list[Tokens]:
        """The clean rows of a step, in turn, so that a run that goes on sees the same ones."""
        return [self._clean[(step * size + i) % len(self._clean)] for i in range(min(size, len(self._clean)))]
