"""What every codec checks of the matrix it is given."""

from __future__ import annotations

import math

import torch

from deltakeeper.errors import CodecError


def checked(delta: torch.Tensor, name: str) -> torch.Tensor:
    """The delta as a contiguous CPU tensor (the same memory where it is one already), or a refusal.

    Raises:
        CodecError: not a non-empty float32 matrix, or it holds NaN or infinity.
    """
    if delta.dim() != 2 or 0 in delta.shape or delta.dtype != torch.float32:
        raise CodecError(
            f"the delta of '{name}' is {delta.dtype} {tuple(delta.shape)} but codecs take non-empty float32 "
            "matrices; convert it first."
        )
    matrix = delta.detach().cpu().contiguous()
    if not math.isfinite(peak(matrix)):
        broken = int((~torch.isfinite(matrix)).sum())
        raise CodecError(
            f"the delta of '{name}' holds NaN or infinity in {broken} entries; repair or leave out this checkpoint."
        )
    return matrix


def peak(matrix: torch.Tensor) -> float:
    """Largest absolute entry; NaN if there is one (needs no temporary)."""
    low, high = torch.aminmax(matrix)
    return max(-float(low), float(high)) if low == low else math.nan
