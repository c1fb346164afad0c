"""Safe Delta: the fine-tune's entries are admitted while their cost in safety stays within a budget, then made up for.

Lu et al., "Safe Delta: Consistently Preserving Safety when Fine-Tuning LLMs on Diverse Datasets", ICML 2025,
https://arxiv.org/abs/2505.12038. Formulas from the authors' code: the cost of entry `d` in column `j` is
`d² / U_jj²` with `Uᵀ U` the inverse of the damped gram of the layer's inputs on safe answers, as seen by the aligned
base; entries come in by falling ratio of gain `d²` to cost, which is by rising `1 / U_jj²`.

Unverified in the paper itself (its text could not be read here): the share `skip` of the dearest entries that never
come in, and the budget's factor `out / 4096`, both of which are in the code alone. Two differences from the code: it
leaves out the compensation among four neighbouring columns, for speed, which is paid here; and entries of equal cost
factor come in row by row here, in no defined order there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltakeeper.codecs.gptq import quantise_columns
from deltakeeper.defences.base import Defence, Defended, Module, Rows, Side, register_defence
from deltakeeper.defences.settings import check_settings

_WIDTH = 4096
"""Hidden size of the model for which the authors' budgets hold."""


@register_defence()
@dataclass(frozen=True)
class SafeDelta(Defence):
    """Entries of the fine-tune that cost little safety, on top of the base; the base's other entries make up for them.

    Layers whose inputs are not known (fused experts) are treated with equal weights, which makes up for nothing.

    Attributes:
        s: the budget, as in the authors' code: 0 admits what costs nothing, larger values more. It is absolute in the
            size of the delta, so it has to be found for each model; 0.1 and 0.11 are published for Llama-2-7b-chat.
        skip: share of the entries, those of the dearest columns, that never come in, 0 to 1.
        block: columns that share a budget, 1 to 65536.
        damp: share of the gram's mean diagonal that is added to its diagonal.
        rest: tensors that are no linear layer's matrix: the base's, as published, or the fine-tune's.
    """

    name: ClassVar[str] = "safe_delta"
    title: ClassVar[str] = "Safe Delta"
    summary: ClassVar[str] = "admits entries within a budget of safety loss and compensates for them"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.12038"
    runs: ClassVar[Side] = "base"

    s: float = 0.1
    skip: float = 0.15
    block: int = 2048
    damp: float = 0.01
    rest: Literal["base", "tuned"] = "base"

    def __post_init__(self) -> None:
        check_settings(self, s=(0, 1e9), skip=(0, 1), block=(1, 1 << 16), damp=(1e-8, 1e3))

    @property
    def uses_rows(self) -> Rows:
        """See `Defence.uses_rows`."""
        return "safe"

    @property
    def others(self) -> Side:
        """See `Defence.others`."""
        return self.rest

    def defend(self, module: Module) -> Defended:
        """See `Defence.defend`."""
        admission = _Admission(module.tuned, self)
        gram = None if module.inputs is None else module.inputs.gram
        weight = quantise_columns(module.base, gram, admission, damp=self.damp)
        return Defended(weight, {"admitted": admission.admitted / module.tuned.numel()})


class _Admission:
    """Which entries of a block come in: the `ColumnRule` that pays every admitted entry's error to later columns."""

    def __init__(self, tuned: torch.Tensor, settings: SafeDelta) -> None:
        self.span = settings.block
        self.admitted = 0
        self._tuned, self._settings = tuned, settings
        self._mask = torch.zeros(0, 0, dtype=torch.bool)
        self._start = 0

    def look(self, columns: torch.Tensor, diagonal: torch.Tensor, start: int) -> None:
        """See `ColumnRule.look`."""
        rows, width = columns.shape
        step = self._tuned[:, start : start + width] - columns
        price = diagonal.double().pow(-2)  # (width,)
        order = torch.argsort(price, stable=True)
        spent = (step.T.double().square_() * price[:, None])[order].flatten().cumsum(0)
        budget = self._settings.s / 2 * rows / _WIDTH * float(price.mean())
        allowed = rows * width - int(self._settings.skip * rows * width)
        count = min(allowed, int(torch.searchsorted(spent, budget, right=True)))
        taken = torch.arange(rows * width) < count
        self._mask = torch.empty(width, rows, dtype=torch.bool).index_copy_(0, order, taken.view(width, rows))
        self._start = start
        self.admitted += count

    def quantise(self, column: torch.Tensor, index: int) -> torch.Tensor:
        """See `ColumnRule.quantise`."""
        return torch.where(self._mask[index - self._start], self._tuned[:, index], column)
