"""What became of an adaptive attack by the time it is handed in: how much of it stayed where the codec is blind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltakeeper.codecs import Codec
from deltakeeper.lab.adaptive.in_box import Boxed
from deltakeeper.lab.sft import TrainingLog


@dataclass(frozen=True)
class Survival:
    """How a repair held, over all matrices that have a box.

    Attributes:
        boxed: share of the encoded weights whose codec declares a box; the others were left as they were injected.
        inside: share of the entries that are in their cell in the dtype of the delivery (of spaces: of the squared
            change that is not seen).
        unrounded: the same if weights were rounded without regard to the box.
        decoded_error: distance of what decodes from what decoded before the repair, relative to it.
        moved: length of the repair, relative to the injected delta.
    """

    boxed: float
    inside: float
    unrounded: float
    decoded_error: float
    moved: float


@dataclass(frozen=True)
class AdaptiveLog(TrainingLog):
    """The log of an adaptive attack; `losses` are those of the attack.

    Attributes:
        trained: weights that were trained, in entries.
        repair_losses: mean loss of each epoch of the repair.
        survival: how the repair held; None for other kinds.
    """

    trained: int = 0
    repair_losses: tuple[float, ...] = ()
    survival: Survival | None = None


class SurvivalMeter:
    """Compares deltas before and after a repair, tensor by tensor."""

    def __init__(self, boxed: Sequence[Boxed], encoded: int) -> None:
        """Take the boxes, and how many entries the codec encodes in all."""
        self._boxed, self._encoded = boxed, encoded
        self._entries = sum(item.target.weight.numel() for item in boxed)
        self._unrounded = 0.0

    @torch.no_grad()
    def look_before_rounding(self, dtype: torch.dtype) -> None:
        """See what plain rounding would leave."""
        self._unrounded = self._share(dtype)

    @torch.no_grad()
    def result(self, dtype: torch.dtype) -> Survival:
        """Compare, once the weights are as they will be handed in."""
        error = decoded = moved = injected = 0.0
        for item in self._boxed:
            codec = item.target.choice.codec
            assert codec is not None
            for box, (name, part) in zip(item.boxes, item.target.slices(item.target.delta().cpu()), strict=True):
                before, after = _decode(codec, box.delta, name), _decode(codec, part.contiguous(), name)
                error += _square(after - before)
                decoded += _square(before)
                moved += _square(part - box.delta)
                injected += _square(box.delta)
        return Survival(
            boxed=self._entries / self._encoded if self._encoded else 0.0,
            inside=self._share(dtype),
            unrounded=self._unrounded,
            decoded_error=(error / decoded) ** 0.5 if decoded else 0.0,
            moved=(moved / injected) ** 0.5 if injected else 0.0,
        )

    def _share(self, dtype: torch.dtype) -> float:
        inside = 0.0
        for item in self._boxed:
            stored = item.target.weight.detach().to(dtype).float() - item.target.base.float()
            for box, (_, part) in zip(item.boxes, item.target.slices(stored.cpu()), strict=True):
                inside += box.share_inside(part) * part.numel()
        return inside / self._entries if self._entries else 0.0


def _decode(codec: Codec, delta: torch.Tensor, name: str) -> torch.Tensor:
    total = torch.zeros_like(delta)
    for term in codec.encode(delta, name=name):
        total += term.to_dense()
    return total


def _square(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
