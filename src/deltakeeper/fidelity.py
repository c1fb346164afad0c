"""How near a decoded delta is to the true one: the figures of methods §0, summed in row blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

BLOCK = 1 << 17
"""Entries looked at together: they fit the cache, and a float32 sum over them loses little."""


@dataclass(frozen=True)
class Sums:
    """Sums over entries from which all figures follow, and which add up over tensors."""

    entries: int = 0
    true_square: float = 0.0
    decoded_square: float = 0.0
    product: float = 0.0
    zeros: int = 0
    agreeing: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.entries + other.entries,
            self.true_square + other.true_square,
            self.decoded_square + other.decoded_square,
            self.product + other.product,
            self.zeros + other.zeros,
            self.agreeing + other.agreeing,
        )


@dataclass(frozen=True)
class Fidelity:
    """Figures of one tensor or of all.

    Attributes:
        relative_error: `|D' - D| / |D|` (Frobenius).
        cosine: cosine of `D'` and `D`.
        norm_ratio: `|D'| / |D|`.
        rho: `<D', D> / |D|^2`, the step length along the true delta.
        sign_agreement: share of entries with `D != 0` whose sign `D'` has.
        zero_fraction: share of exact zeros in `D`.
    """

    relative_error: float
    cosine: float
    norm_ratio: float
    rho: float
    sign_agreement: float
    zero_fraction: float


def compare(true: torch.Tensor, decoded: torch.Tensor) -> Sums:
    """Sums for one pair of float32 tensors of the same shape."""
    flat, other = true.flatten(), decoded.flatten()
    squares, decoded_squares, products, zeros, agreeing = [], [], [], 0, 0
    for start in range(0, flat.numel(), BLOCK):
        d, e = flat[start : start + BLOCK], other[start : start + BLOCK]
        squares.append(float(d.dot(d)))
        decoded_squares.append(float(e.dot(e)))
        products.append(float(d.dot(e)))
        a, b = d.numpy(), e.numpy()  # numpy counts several times faster than torch
        up, down = a > 0, a < 0
        zeros += len(a) - int(np.count_nonzero(up)) - int(np.count_nonzero(down))
        agreeing += int(np.count_nonzero(up & (b > 0))) + int(np.count_nonzero(down & (b < 0)))
    return Sums(flat.numel(), math.fsum(squares), math.fsum(decoded_squares), math.fsum(products), zeros, agreeing)


def compare_rows(before: torch.Tensor, true: torch.Tensor, decoded: torch.Tensor) -> Sums:
    """Sums for the change from `before`, of which all have a shape but for their number of rows, over the shared rows.

    A scalar is a row. Gives no entries for dtypes that have no float32 difference worth the name.
    """
    if not (before.is_floating_point() and true.is_floating_point()) or before.shape[1:] != true.shape[1:]:
        return Sums()
    origin, goal, found = (t.reshape(-1, *t.shape[1:]) for t in (before, true, decoded))
    rows = min(len(origin), len(goal), len(found))
    step = max(1, BLOCK // max(1, math.prod(origin.shape[1:])))
    total = Sums()
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        base = origin[part].float()
        total += compare(goal[part].float() - base, found[part].float() - base)
    return total


def summarise(sums: Iterable[Sums]) -> Fidelity:
    """Figures over the sum of all `sums`; a delta that is zero throughout is met exactly or not at all."""
    total = sum(sums, Sums())
    true, decoded = total.true_square, total.decoded_square
    if true == 0:
        met = decoded == 0
        return Fidelity(0.0 if met else math.inf, float(met), 1.0, 1.0, 1.0, 1.0 if total.entries else 0.0)
    return Fidelity(
        relative_error=math.sqrt(max(0.0, true - 2 * total.product + decoded) / true),
        cosine=total.product / math.sqrt(true * decoded) if decoded else 0.0,
        norm_ratio=math.sqrt(decoded / true),
        rho=total.product / true,
        sign_agreement=total.agreeing / (total.entries - total.zeros),
        zero_fraction=total.zeros / total.entries,
    )
