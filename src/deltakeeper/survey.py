"""One pass over a delta for methods that treat tensors by comparison with each other."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from deltakeeper.codecs import Statistics
from deltakeeper.delta import DeltaPair
from deltakeeper.workers import map_in_order

BLOCK_BYTES = 4 << 20


def survey_delta(models: DeltaPair, names: Iterable[str], workers: int = 2) -> dict[str, Statistics]:
    """Statistics of the delta of each named matrix, over the rows that base and fine-tune share."""
    chosen = list(names)
    found = map_in_order(lambda name: _survey(models, name), chosen, cost=lambda _: 4 * BLOCK_BYTES, workers=workers)
    return dict(zip(chosen, found, strict=True))


def _survey(models: DeltaPair, name: str) -> Statistics:
    shape = models.tuned.tensors[name].shape
    total = absolute = square = 0.0
    zeros = entries = 0
    for part in _delta_blocks(models, name):
        total += float(part.sum(dtype=torch.float64))
        absolute += float(part.abs().sum(dtype=torch.float64))
        square += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
        zeros += part.numel() - int(torch.count_nonzero(part))
        entries += part.numel()
    mean = total / entries
    spread = math.sqrt(max(0.0, square / entries - mean * mean))
    return Statistics((math.prod(shape[:-1]), shape[-1]), spread, absolute / entries, zeros / entries)


def _delta_blocks(models: DeltaPair, name: str) -> Iterable[torch.Tensor]:
    origin = models.base_name(name)
    if origin is None:
        raise ValueError(f"'{name}' has no base")
    same = models.tuned.tensors[name].shape == models.base.tensors[origin].shape
    if not same or not (models.tuned.stored(name) and models.base.stored(origin)):
        yield models.tensor(name).matrix()
        return
    ours, theirs = models.tuned.blocks(name, BLOCK_BYTES), models.base.blocks(origin, BLOCK_BYTES)
    for (_, tuned_rows), (_, base_rows) in zip(ours, theirs, strict=True):
        yield tuned_rows.float() - base_rows.float()
