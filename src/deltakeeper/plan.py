"""What is done with each tensor of a fine-tune, told from headers and, for tensors that did not change, their bytes."""

from __future__ import annotations

from typing import Literal

import torch

from deltakeeper.delta import DeltaPair, TensorDelta

Treatment = Literal["terms", "value", "unchanged", "tied"]

TINY = 1024
"""Tensors of fewer entries are stored as they are: a packed term would hardly be smaller."""

ENCODED = {torch.float32, torch.float16, torch.bfloat16}
"""Dtypes whose difference float32 can hold: integers, as quantised models pack them, and float64 would be altered."""


def treat(pair: DeltaPair, delta: TensorDelta) -> Treatment:
    """Decide one tensor: every matrix that has a base is encoded, embeddings and heads among them.

    Norms, biases and other vectors, tensors that are new or of another width, tiny ones, integers and float64
    are stored as values.
    """
    if delta.name in pair.tied:
        return "tied"
    if delta.base is None:
        return "value"
    same_type = delta.base.dtype == pair.tuned.tensors[delta.name].dtype
    if same_type and delta.base.shape == delta.tuned.shape and torch.equal(delta.base, delta.tuned):
        return "unchanged"
    dtypes = {pair.tuned.tensors[delta.name].dtype, delta.base.dtype}
    if not dtypes <= ENCODED or delta.tuned.ndim not in (2, 3) or not delta.comparable or delta.tuned.numel() < TINY:
        return "value"
    if delta.tuned.ndim == 3 and delta.base.shape != delta.tuned.shape:
        return "value"
    return "terms"
