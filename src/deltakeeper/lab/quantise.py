"""Whole-model round-to-nearest quantisation of a fine-tune: what delta compression is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch


@dataclass
class FullModelRTN:
    """Symmetric group-wise round-to-nearest of every matrix (methods: `s = max|w| / (2^(b-1) - 1/2)`).

    Here the quantiser's step is fixed by the whole weight, not by the delta, so what happens to the delta is another
    question than with a delta codec. `nbytes` counts codes, float16 scales and the tensors left as they are.
    """

    bits: int = 4
    group: int = 64
    nbytes: int = field(default=0, init=False)

    def quantise(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Quantise and dequantise tensor by tensor; tensors of one dimension pass unchanged."""
        self.nbytes = 0
        for name, tensor in tensors:
            if tensor.ndim < 2:
                self.nbytes += tensor.numel() * tensor.element_size()
                yield name, tensor
            else:
                yield name, self._round(tensor)

    def _round(self, weight: torch.Tensor) -> torch.Tensor:
        rows, columns = weight.flatten(0, -2).shape
        padded = torch.nn.functional.pad(weight.flatten(0, -2).float(), (0, -columns % self.group))
        groups = padded.view(rows, -1, self.group)  # (out, groups, group)
        top = 2 ** (self.bits - 1)
        scale = (groups.abs().amax(-1, keepdim=True) / (top - 0.5)).to(torch.float16).float()
        scale = scale.clamp(min=torch.finfo(torch.float16).tiny)
        codes = (groups / scale).round_().clamp_(-top, top - 1)
        self.nbytes += -(-rows * columns * self.bits // 8) + scale.numel() * 2
        rounded: torch.Tensor = (codes * scale).view(rows, -1)[:, :columns].reshape(weight.shape).to(weight.dtype)
        return rounded
