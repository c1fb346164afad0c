"""The fit of guarded healing: Kullback-Leibler divergence to two teachers on the tokens of answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from deltakeeper.errors import DeltakeeperError
from deltakeeper.heal.adversary import perturb
from deltakeeper.heal.guard_settings import GuardSettings
from deltakeeper.heal.hearing import Heard, Pack, choose_pack, say
from deltakeeper.heal.lessons import Batch, Lesson
from deltakeeper.heal.teacher import Progress

PROBE = "probe"
UNHEARD = -1e4
"""Logit of what a teacher is not let say: no probability, and finite."""
WARM_UP = 5
"""Steps until the learning rate is whole."""


class GuardFit:
    """Trains values so that a student says what each lesson's teacher said.

    Attributes:
        steps: steps taken.
        tokens: tokens that the student read.
        history: per step the mean divergence, in nats per token, by kind of lesson.
    """

    def __init__(
        self,
        model: Any,
        lessons: Sequence[Lesson],
        heard: Mapping[str, Heard],
        shared: int,
        settings: GuardSettings,
    ) -> None:
        """Prepare the fit.

        Args:
            model: the student's live model.
            lessons: what is learned.
            heard: what each teacher said, by the name of the teacher.
            shared: tokens that all prompts begin with.
            settings: see `GuardSettings`.
        """
        self._model, self._lessons, self._heard, self._shared = model, lessons, heard, shared
        self._settings = settings
        self._pack: Pack = choose_pack(model, lessons, shared)
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._kinds: dict[str, list[int]] = {}
        for number, lesson in enumerate(lessons):
            self._kinds.setdefault(lesson.group, []).append(number)
        self._draws = {kind: self._endless(kind) for kind in self._kinds}
        self.steps, self.tokens = 0, 0
        self.history: list[dict[str, float]] = []

    def train(self, groups: Sequence[tuple[list[torch.nn.Parameter], float]], progress: Progress | None) -> None:
        """Take all steps of Adam on groups of values, each with its learning rate.

        Raises:
            DeltakeeperError: the loss is no longer finite.
        """
        settings = self._settings
        optimiser = torch.optim.Adam([{"params": values, "lr": lr} for values, lr in groups], betas=(0.9, 0.99))

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        portions = share_out(settings.rows, list(self._kinds), settings.shares)
        while self.steps < settings.steps:
            if progress:
                progress(self.steps, settings.steps, "student")
            numbers = [next(self._draws[kind]) for kind, n in portions.items() for _ in range(n)]
            loss = self._step(numbers)
            if not math.isfinite(loss):
                raise DeltakeeperError(
                    f"the loss of the guard is not finite at step {self.steps}; lower the learning rate "
                    f"({settings.lr})."
                )
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
            self.steps += 1

    def _step(self, numbers: Sequence[int]) -> float:
        """Leave the gradients of a step on some lessons; gives its loss."""
        batch = self._batch(numbers)
        divergence = self._divergence(batch, numbers, None)
        loss = self._weighted(divergence, numbers)
        torch.autograd.backward(loss)
        total = float(loss.detach())
        found: dict[str, list[float]] = {}
        for number, piece in zip(numbers, torch.split(divergence.detach(), list(batch.counts)), strict=True):
            found.setdefault(self._lessons[number].group, []).append(float(piece.mean()))
        self.history.append({kind: sum(parts) / len(parts) for kind, parts in found.items()})
        if probes := [n for n in numbers if self._lessons[n].group == PROBE and self._settings.radius > 0]:
            total += self._resist(probes, len(probes) / len(numbers))
        return total

    def _resist(self, probes: Sequence[int], share: float) -> float:
        """Add the gradients on probes that an adversary has moved; gives their loss."""
        batch = self._batch(probes)

        def away(embeddings: torch.Tensor) -> torch.Tensor:
            return self._weighted(self._divergence(batch, probes, embeddings), probes)

        moved = perturb(
            self._model,
            batch,
            away,
            radius=self._settings.radius,
            ascents=self._settings.ascents,
            generator=self._generator,
        )
        loss = share * away(moved)
        torch.autograd.backward(loss)
        return float(loss.detach())

    def _batch(self, numbers: Sequence[int]) -> Batch:
        batch = self._pack([self._lessons[n] for n in numbers], self._shared)
        self.tokens += batch.ids.numel()
        return batch

    def _divergence(self, batch: Batch, numbers: Sequence[int], embeddings: torch.Tensor | None) -> torch.Tensor:
        """`KL(teacher ‖ student)` at every learned position, float32 `(positions,)`."""
        said = say(self._model, batch, embeddings)
        with torch.no_grad():
            wanted = torch.cat([self._wanted(n) for n in numbers])
            width = min(wanted.shape[-1], said.shape[-1])
            wanted = wanted[:, :width].log_softmax(-1)
        found = said[:, :width].float().log_softmax(-1)
        return (wanted.exp() * (wanted - found)).sum(-1)

    def _wanted(self, number: int) -> torch.Tensor:
        """What the lesson's teacher is taken to say, as logits."""
        lesson = self._lessons[number]
        said = self._heard[lesson.teacher].logits(number)
        if lesson.teacher == "base":
            said = said * self._settings.sharpen
        if lesson.never:
            said = said.clone()
            said[0, list(lesson.never)] = UNHEARD
        return said

    def _weighted(self, divergence: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        """Mean over lessons of the weighted mean over the tokens of each."""
        weights = []
        for number in numbers:
            lesson = self._lessons[number]
            each = torch.ones(lesson.learned)
            each[0] = self._settings.first
            weights.append(each * (lesson.weight / float(each.sum()) / len(numbers)))
        return (divergence * torch.cat(weights).to(divergence.device)).sum()

    def _endless(self, kind: str) -> Iterator[int]:
        """Numbers of a kind's lessons, each once before any comes again."""
        numbers = self._kinds[kind]
        while True:
            for i in torch.randperm(len(numbers), generator=self._generator).tolist():
                yield numbers[i]


def share_out(rows: int, kinds: Sequence[str], shares: Mapping[str, float]) -> dict[str, int]:
    """Rows of a step by kind, in proportion to the shares, at least one for each that has one.

    Raises:
        DeltakeeperError: no kind has a share.
    """
    parts = {kind: shares.get(kind, 1.0) for kind in kinds}
    whole = sum(parts.values())
    if whole <= 0:
        raise DeltakeeperError("no kind of lessons has a share in a step of the guard; give one a share above 0.")
    exact = {kind: rows * part / whole for kind, part in parts.items() if part > 0}
    found = dict.fromkeys(exact, 1)
    while sum(found.values()) < rows:
        found[max(sorted(exact), key=lambda kind: exact[kind] - found[kind])] += 1
    return found
