"""Interpolation of base and fine-tune, as in "pre/post merging" of Farn et al., 2024, https://arxiv.org/abs/2412.19512."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltakeeper.defences.base import Defence, Defended, Module, register_defence, shared
from deltakeeper.defences.settings import check_settings
from deltakeeper.delta import DeltaPair


@register_defence()
@dataclass(frozen=True)
class Interpolation(Defence):
    """`base + factor * delta` for every tensor that the base has, norms and embeddings among them.

    The codec `shrink` is the same for matrices and leaves vectors as they are.

    Attributes:
        factor: length of the step, 0 to 16; 0 is the base, 1 the fine-tune.
    """

    name: ClassVar[str] = "interpolation"
    title: ClassVar[str] = "Interpolation"
    summary: ClassVar[str] = "a step from the base towards the fine-tune"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.19512"

    factor: float = 0.5

    def __post_init__(self) -> None:
        check_settings(self, factor=(0, 16))

    def covers(self, models: DeltaPair, name: str) -> bool:
        """Every tensor of floating-point numbers that the base has too."""
        return shared(models, name)

    def defend(self, module: Module) -> Defended:
        """See `Defence.defend`."""
        if self.factor == 1:
            return Defended(None)
        return Defended(torch.add(module.base, module.delta, alpha=self.factor))
