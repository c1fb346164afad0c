"""The head: logits over vocabularies of several sizes, on whatever rows the model asks for."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from deltakeeper.overlay.current import CurrentPass
from deltakeeper.overlay.linears import LinearSite, OtherLinearSite
from deltakeeper.overlay.site import Part


class HeadSite(LinearSite):
    """A head of plain weights; tenants may have more tokens than the base, or fewer."""

    resizable = True

    def __init__(self, name: str, module: nn.Module, current: CurrentPass) -> None:
        super().__init__(name, module, current)
        self.own: dict[int, Part] = {}
        self.columns = self.out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states `(..., in)` to logits `(..., columns)`; minus infinity for tokens that a tenant has not."""
        current = self.current
        if current.groups is None:
            return self.inner(x)  # type: ignore[no-any-return]
        flat = x.reshape(-1, self.width).contiguous()  # (rows, in)
        groups, spans = current.at_head(flat.shape[0])
        y = self.product(flat, groups)
        if self.biases is not None:
            y.add_(self.biases.vectors.index_select(0, groups.row_slots))
        if not self.own:
            return y.view(*x.shape[:-1], self.out)
        logits = y.new_full((len(y), self.columns), -math.inf)
        logits[:, : self.out] = y
        for slot, start, end in spans:
            part = self.own.get(slot)
            if part is None:
                continue
            rows, bias = flat[start:end], part.values.get("bias")
            bias = None if bias is None else bias.to(x.dtype)
            matrix = part.values.get("weight")
            if matrix is not None:
                logits[start:end] = -math.inf
                own_bias = self.parameters.get("bias") if bias is None else bias
                logits[start:end, : len(matrix)] = F.linear(rows, matrix.to(x.dtype), own_bias)
            elif part.added is not None:
                extra = None if bias is None else bias[self.out :]
                logits[start:end, self.out : self.out + len(part.added)] = F.linear(rows, part.added, extra)
        return logits.view(*x.shape[:-1], self.columns)

    def put(self, slot: int, part: Part | None) -> None:
        """See `Site.put`."""
        bias = None if part is None else part.values.get("bias")
        if part is not None and (part.added is not None or "weight" in part.values):
            self.own[slot] = part
        else:
            self.own.pop(slot, None)
        self.columns = max([self.out, *(part.vocabulary or 0 for part in self.own.values())])
        if bias is not None and len(bias) != self.out:
            known = self.parameters["bias"].detach().float().clone()
            shared = min(len(bias), self.out)
            known[:shared] = bias[:shared]
            bias = known
        self.put_bias(slot, bias)

    def mask(self, logits: torch.Tensor) -> None:
        """Set the tokens that a row's tenant has not to minus infinity once more, in place, `(..., columns)`.

        For models that squash their logits behind the head, which makes a finite number of minus infinity.
        """
        if not self.own or self.current.groups is None:
            return
        flat = logits.view(-1, logits.shape[-1])
        for slot, start, end in self.current.head_spans:
            part = self.own.get(slot)
            known = self.out if part is None or part.vocabulary is None else part.vocabulary
            flat[start:end, known:] = -math.inf


class OtherHeadSite(HeadSite, OtherLinearSite):
    """A head that multiplies in its own way."""
