"""Half-precision storage of numbers of any magnitude: normalised values times one float32 factor.

Deltas have a standard deviation between 1e-8 and 1e-2; float16 underflows below 6e-8.
"""

from __future__ import annotations

import math

import torch


def split_gain(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """Store `values` as `stored * gain`, `|stored| <= 2` and the gain a power of two, so that scaling is exact.

    Args:
        values: float32, any shape, finite.
        dtype: dtype of what is stored; float32 needs no gain and gets 1.

    Returns:
        The stored tensor in `dtype` and the gain.
    """
    peak = float(values.abs().max()) if values.numel() else 0.0
    if dtype == torch.float32 or peak == 0.0:
        return values.to(dtype, copy=True).contiguous(), 1.0
    gain = math.ldexp(1.0, math.frexp(peak)[1] - 1)
    return (values / gain).to(dtype).contiguous(), gain
