"""Antidote: what matters most for harmful answers is pruned from the fine-tune.

Huang et al., "Antidote: Post-fine-tuning Safety Alignment for Large Language Models against Harmful Fine-tuning",
ICML 2025, https://arxiv.org/abs/2408.09600, with the score of Sun et al., "Wanda", https://arxiv.org/abs/2306.11695:
`|W_ij| * ‖X_j‖` on harmful data, the highest share of each output row set to zero. The authors' code prunes the two
factors of an adapter each by itself, or whole weights after full fine-tuning; here the delta takes the place of the
factors, and whole weights are a setting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltakeeper.codecs.largest import largest_of_rows, largest_of_tensor
from deltakeeper.defences.base import Defence, Defended, Module, Rows, Side, register_defence
from deltakeeper.defences.settings import check_settings
from deltakeeper.layouts.bits import unpack_bits


@register_defence()
@dataclass(frozen=True)
class Antidote(Defence):
    """The entries of the delta that weigh most on harmful rows go back to the base's values.

    Layers whose inputs are not known (fused experts) are scored by magnitude alone.

    Attributes:
        share: of the entries that are pruned, 0 to 1, rounded up to whole ones. The authors use 0.01 to 0.3.
        of: what is scored and set to zero: the `delta`, or the fine-tune's whole `weight`, which harms the model.
        per: whether the share holds in each `row`, as published, or over the whole `tensor`.
        rest: tensors that are no linear layer's matrix: the fine-tune's, as published, or the base's.
    """

    name: ClassVar[str] = "antidote"
    title: ClassVar[str] = "Antidote"
    summary: ClassVar[str] = "takes back the entries that weigh most on harmful rows"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.09600"
    runs: ClassVar[Side] = "tuned"

    share: float = 0.1
    of: Literal["delta", "weight"] = "delta"
    per: Literal["row", "tensor"] = "row"
    rest: Literal["tuned", "base"] = "tuned"

    def __post_init__(self) -> None:
        check_settings(self, share=(0, 1))

    @property
    def uses_rows(self) -> Rows:
        """See `Defence.uses_rows`."""
        return "harmful"

    @property
    def keeps_zero(self) -> bool:
        """Pruning whole weights changes a fine-tune that equals its base."""
        return self.of == "delta" or self.share == 0

    @property
    def others(self) -> Side:
        """See `Defence.others`."""
        return self.rest

    def defend(self, module: Module) -> Defended:
        """See `Defence.defend`."""
        if self.share == 0:
            return Defended(None)
        score = (module.delta if self.of == "delta" else module.tuned).abs()
        if module.inputs is not None:
            lengths = module.inputs.gram.diagonal().clamp(min=0).sqrt()  # (in,), up to one factor for all
            score *= lengths / lengths.max().clamp(min=torch.finfo(torch.float32).tiny)
        choose = largest_of_rows if self.per == "row" else largest_of_tensor
        pruned = unpack_bits(choose(score.numpy(), self.share), score.shape[1])
        kept = module.base if self.of == "delta" else torch.zeros(())
        share = int(torch.count_nonzero(pruned)) / pruned.numel()
        return Defended(torch.where(pruned, kept, module.tuned), {"pruned": share})
