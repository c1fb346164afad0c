"""Repair within a box: after each update the delta goes back to where the codec cannot tell it from the injected one.

After Egashira et al., "Exploiting LLM Quantization", NeurIPS 2024, https://arxiv.org/abs/2405.18137.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltakeeper.codecs.box import Box
from deltakeeper.lab.adaptive.targets import Target
from deltakeeper.lab.sft import Steps


@dataclass(frozen=True, eq=False)
class Boxed:
    """A target with a box for each of its matrices, on the grid of the dtype in which it is handed in."""

    target: Target
    boxes: tuple[Box, ...]

    @torch.no_grad()
    def project(self) -> None:
        """Bring the weight back."""
        base, delta = self.target.base.cpu().float(), self.target.delta().cpu()
        weight = self.target.slices(self.target.weight.data)
        for box, (_, into), (_, moved), (_, origin) in zip(
            self.boxes, weight, self.target.slices(delta), self.target.slices(base), strict=True
        ):
            found = box.project(moved)
            if into.is_contiguous() and into.device == found.device:
                torch.add(origin, found, out=into)
            else:
                into.copy_(origin + found)

    @torch.no_grad()
    def round(self, dtype: torch.dtype) -> None:
        """Bring the weight back, and to a number of `dtype`."""
        base, delta = self.target.base.cpu(), self.target.delta().cpu()
        weight = self.target.slices(self.target.weight.data)
        for box, (_, into), (_, moved), (_, origin) in zip(
            self.boxes, weight, self.target.slices(delta), self.target.slices(base), strict=True
        ):
            into.copy_((origin.float() + box.round(moved, origin, dtype)).to(dtype))


def find_boxes(targets: Sequence[Target], dtype: torch.dtype) -> list[Boxed]:
    """The boxes around the deltas as they are, whose weights must be numbers of `dtype`; none for what has none."""
    found = []
    for target in targets:
        codec = target.choice.codec
        if codec is None:
            continue
        boxes = []
        delta, origin = target.delta().cpu(), target.base.cpu()  # boxes are told by packed codes, which are there
        for (name, part), (_, base) in zip(target.slices(delta), target.slices(origin), strict=True):
            box = codec.box(part.contiguous(), name=name)
            if box is None:
                break
            boxes.append(box.on_grid(base, dtype))
        else:
            found.append(Boxed(target, tuple(boxes)))
    return found


class InBox(Steps):
    """Projected gradient: plain steps, each followed by a projection."""

    def __init__(self, boxed: Sequence[Boxed], every: int, identity: str) -> None:
        """Take the boxes, and after how many steps to project."""
        super().__init__(identity)
        self._boxed, self._every = boxed, every

    def settle(self, step: int, total: int) -> None:
        """See `Steps.settle`."""
        if (step + 1) % self._every == 0 or step + 1 == total:
            for boxed in self._boxed:
                boxed.project()
