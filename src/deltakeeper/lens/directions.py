"""A direction in the stream that tells two kinds of prompts apart: the difference of their means, layer by layer.

Arditi et al. 2024 (arXiv 2406.11717) for refusal. A direction is fitted on one split of prompts and judged on another;
one named model's direction is used for all variants, since each one's own need not be the same. What it is worth shows
only beside `controls`: in a space of hundreds of dimensions, many directions separate many things.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltakeeper.errors import DataError
from deltakeeper.lens.metrics import cosine
from deltakeeper.lens.trace_statistics import Floats


@dataclass(frozen=True, eq=False)
class Direction:
    """Difference-of-means directions of one model.

    Attributes:
        vectors: float64 (L, D), unit length; zeros where the means do not differ.
        lengths: float64 (L,), length of the difference of means.
        harmful: how many harmful prompts it was fitted on.
        harmless: how many harmless ones.
    """

    vectors: Tensor
    lengths: Tensor
    harmful: int
    harmless: int


def fit_direction(harmful: Tensor, harmless: Tensor) -> Direction:
    """Direction from the mean over harmless prompts to that over harmful ones.

    Args:
        harmful: streams (n, L, D) at one position (the end of the template), any floating dtype.
        harmless: the same (m, L, D).

    Raises:
        DataError: fewer than two prompts of a kind, or layers and widths differ.
    """
    check_streams(harmful, harmless)
    difference = harmful.double().mean(0) - harmless.double().mean(0)
    lengths = difference.norm(dim=-1)
    return Direction(unit(difference), lengths, len(harmful), len(harmless))


def project(vectors: Tensor, streams: Tensor) -> Floats:
    """Scores ⟨h, r⟩ of streams (n, L, D) on directions (L, D) or (…, L, D): float64 (n, L) or (…, n, L)."""
    return np.asarray(torch.einsum("...ld,nld->...nl", vectors.double(), streams.double()).cpu().numpy())


def compare_directions(one: Direction, other: Direction) -> Floats:
    """Cosine of two models' directions, float64 (L,)."""
    return np.asarray(cosine(one.vectors, other.vectors).cpu().numpy())


def unit(vectors: Tensor) -> Tensor:
    """Vectors (…, D) at length one; those of no length stay zero."""
    lengths = vectors.norm(dim=-1, keepdim=True)
    return vectors / torch.where(lengths > 0, lengths, 1)


def check_streams(*groups: Tensor) -> None:
    """Refuse groups of streams that are not (n ≥ 2, L, D) of one L and D; raises DataError."""
    for group in groups:
        if group.ndim != 3 or group.shape[1:] != groups[0].shape[1:]:
            raise DataError("streams of two kinds of prompts differ in layers or width; take both from one model.")
        if len(group) < 2:
            raise DataError(f"a direction needs at least two prompts of a kind, not {len(group)}; give more.")
