"""RESTA: what alignment changed is added to the fine-tune once more.

Bhardwaj et al., "Language Models are Homer Simpson! Safety Re-Alignment of Fine-tuned Language Models through Task
Arithmetic", ACL 2024, https://arxiv.org/abs/2402.11746. The sum and the use of DARE on the fine-tune's delta are the
paper's. Unverified: the paper's values of the scale and of the share that DARE drops; sweep them. The paper makes its
unaligned model by harmful fine-tuning of the aligned one; any model before alignment may stand in for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltakeeper.codecs.fields import MAX_SEED
from deltakeeper.defences.base import Defence, Defended, Module, register_defence, shared
from deltakeeper.defences.settings import check_settings
from deltakeeper.delta import DeltaPair
from deltakeeper.layouts.bits import unpack_bits
from deltakeeper.layouts.philox import seeded_mask


@register_defence()
@dataclass(frozen=True)
class Resta(Defence):
    """`tuned + scale * (aligned - unaligned)` for every tensor that all three models have.

    Attributes:
        scale: how much of the safety vector is added, -16 to 16; 0 leaves the fine-tune.
        drop: share of the entries that DARE drops at random, with the others divided by `1 - drop`, 0 to 0.9999.
        on: what DARE thins out: the fine-tune's `delta`, as in the paper, or the safety `vector`.
        seed: with the tensor's name it decides what is dropped.
    """

    name: ClassVar[str] = "resta"
    title: ClassVar[str] = "RESTA"
    summary: ClassVar[str] = "adds what alignment changed once more"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.11746"

    scale: float = 1.0
    drop: float = 0.0
    on: Literal["delta", "vector"] = "delta"
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, scale=(-16, 16), drop=(0, 0.9999), seed=(0, MAX_SEED))

    @property
    def uses_unaligned(self) -> bool:
        """See `Defence.uses_unaligned`."""
        return True

    @property
    def keeps_zero(self) -> bool:
        """The vector is added whatever the delta."""
        return self.scale == 0

    def covers(self, models: DeltaPair, name: str) -> bool:
        """Every tensor of floating-point numbers that the base has too."""
        return shared(models, name)

    def defend(self, module: Module) -> Defended:
        """See `Defence.defend`."""
        weight, vector = module.tuned, module.safety
        if self.drop and self.on == "delta":
            weight = module.base + self._thinned(module.delta, module.name)
        if vector is not None and self.scale:
            if self.drop and self.on == "vector":
                vector = self._thinned(vector, module.name)
            weight = torch.add(weight, vector, alpha=self.scale)
        return Defended(None if weight is module.tuned else weight)

    def _thinned(self, values: torch.Tensor, name: str) -> torch.Tensor:
        rows = values.reshape(-1, values.shape[-1])
        shape = (rows.shape[0], rows.shape[1])
        kept = unpack_bits(seeded_mask(shape, seed=self.seed, name=name, keep=1 - self.drop), shape[1])
        return (rows * kept / (1 - self.drop)).view(values.shape)
