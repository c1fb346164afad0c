"""Training: steps of Adam on the continuous values of a student, with a look at held-out text now and then."""

from __future__ import annotations

import math

import torch

from deltakeeper.errors import LayoutError
from deltakeeper.heal.losses import LOSSES, Loss
from deltakeeper.heal.student import Student
from deltakeeper.heal.teacher import Progress, Spool
from deltakeeper.layouts import Layout

HELD_OUT = 8
"""One batch in so many is held out to see whether healing helped."""
CHECKS = 4
"""How often, at most, the held-out text is looked at while training; the best of these is kept."""


class Fit:
    """Trains a student on what a teacher said, and keeps the best of the values seen.

    Attributes:
        before: loss on held-out text before any step.
        best: the same of the values that are kept, rounded as they are stored.
        steps: steps taken.
        tokens: tokens of text learned from.
    """

    def __init__(self, student: Student, spool: Spool, loss: Loss) -> None:
        self._student, self._spool, self._loss = student, spool, LOSSES[loss]
        self._held = list(range(0, len(spool.batches), HELD_OUT))
        self.before, _ = self._look()
        self.best, self.steps, self.tokens = self.before, 0, 0

    def train(self, steps: int, lr: float, seed: int, progress: Progress | None) -> dict[str, list[Layout]]:
        """Take steps of Adam; gives the best terms by tensor, none where no look was better than the first."""
        learned = [n for n in range(len(self._spool.batches)) if n not in self._held]
        kept: dict[str, list[Layout]] = {}
        optimiser = torch.optim.Adam(self._student.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps)))
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        check = -(-steps // CHECKS)
        while self.steps < steps:
            if progress:
                progress(self.steps, steps, "student")
            if not order:
                order = [learned[i] for i in torch.randperm(len(learned), generator=generator).tolist()]
            number = order.pop()
            found = self._on(number)
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(found)
            if not math.isfinite(found.item()):
                break  # the values have left every sensible range, and no step brings them back
            optimiser.step()
            schedule.step()
            self.tokens += self._spool.batches[number].numel() if self.steps < len(learned) else 0
            self.steps += 1
            if self.steps % check == 0 or self.steps == steps:
                there, terms = self._look()
                if there < self.best:
                    self.best, kept = there, terms
        return kept

    def _on(self, number: int) -> torch.Tensor:
        """The loss on one batch, over the tokens that both vocabularies have."""
        wanted = self._spool.logits(number)
        said: torch.Tensor = self._student.model(
            input_ids=self._spool.batches[number].to(wanted.device), use_cache=False
        ).logits
        width = min(said.shape[-1], wanted.shape[-1])
        return self._loss(said[..., :width].float(), wanted[..., :width])

    @torch.no_grad()
    def _look(self) -> tuple[float, dict[str, list[Layout]]]:
        """Loss on held-out text of what would be written now, and that; infinite where it cannot be stored."""
        sizes = {n: self._spool.batches[n].numel() for n in self._held}
        try:
            with self._student.as_stored() as terms:
                total = sum(float(self._on(n)) * size for n, size in sizes.items())
        except LayoutError:
            return math.inf, {}
        return total / sum(sizes.values()), terms
