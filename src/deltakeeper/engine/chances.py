"""Random numbers that depend on a request and a position alone, never on what is computed beside it."""

from __future__ import annotations

import hashlib
import os

import torch

_SPAN = 256  # entries whose weights are summed before one of them is looked for


def seed_bytes(seed: int | None) -> bytes:
    """16 bytes that stand for a seed; fresh ones from the operating system for None."""
    if seed is None:
        return os.urandom(16)
    return hashlib.blake2b(str(seed).encode(), digest_size=16).digest()


def chance(seed: bytes, position: int) -> float:
    """A number in `[0, 1)` for one position of one seed: 24 bits of a digest, exact in float32."""
    digest = hashlib.blake2b(position.to_bytes(8, "little"), key=seed, digest_size=3).digest()
    return int.from_bytes(digest, "little") / (1 << 24)


def draw(weights: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    """Pick an index a row with probability proportional to its weight, by inverting the cumulated weights.

    Args:
        weights: `(rows, width)` float32, not negative, each row with a positive finite sum.
        chances: `(rows,)` float32 in `[0, 1)`.

    Returns:
        int64 `(rows,)`; never an index of weight zero.
    """
    rows, width = weights.shape
    spans = -(-width // _SPAN)
    if width % _SPAN:
        weights = torch.nn.functional.pad(weights, (0, spans * _SPAN - width))
    weights = weights.view(rows, spans, _SPAN)
    sums = weights.sum(-1).cumsum(-1)  # (rows, spans)
    target = chances * sums[:, -1]  # (rows,)
    span = _first_above(sums, target)  # (rows,)
    before = torch.where(span > 0, sums.gather(1, (span - 1).clamp(min=0).unsqueeze(1)).squeeze(1), 0.0)
    inside = weights[torch.arange(rows, device=weights.device), span].cumsum(-1)  # (rows, _SPAN)
    return span * _SPAN + _first_above(inside, target - before)


def _first_above(sums: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """First index whose sum is above the target; where rounding left none, the last index that added something."""
    found = torch.searchsorted(sums, target.unsqueeze(1), right=True)
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    return torch.minimum(found, last).squeeze(1)
