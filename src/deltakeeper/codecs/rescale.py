"""By what to divide the entries that a random drop has kept: the free rescale `1/q` of DAREx-q.

Deng et al., "DARE the Extreme", ICLR 2025, https://arxiv.org/abs/2410.09344.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from deltakeeper.codecs.base import Inputs
from deltakeeper.codecs.matrices import peak
from deltakeeper.layouts.bits import row_blocks

_GRID = 1000  # the paper's code tries q in steps of 0.001, below 0.999
_SURE = math.log(2 / (1 - 0.95))  # the bound holds with probability 0.95
_ENOUGH = 0.8  # of the rows, whose minimum ends the search: a few outlier rows would pull q towards 1


def least_error_q(delta: torch.Tensor, p: float, inputs: Inputs | None) -> float:
    """The q with the least expected squared error of the layer's outputs, over masks and inputs.

    With `c_ij = D_ij x_j` the error of an output is `sum_j c_ij (1 - m_ij / q)`, whose mean square is
    `(1 - (1-p)/q)^2 (sum_j c_ij)^2 + p (1-p)/q^2 sum_j c_ij^2`. Summed over rows and averaged over inputs it is
    least at `q = (1 - p) + p * E sum c_ij^2 / E sum_i (sum_j c_ij)^2`, here kept within `[1 - p, 1]`.

    Args:
        delta: float32 `(out, in)`.
        p: share of the entries to drop.
        inputs: moments of the layer's input; None for independent inputs of equal size, for which the expression is the
            squared error `(1-p)(1/q - 1)^2 + p` of the weights themselves, and so `q = 1`.
    """
    size = peak(delta)
    if inputs is None or size == 0.0:
        return 1.0
    apart = together = 0.0
    moments = inputs.gram.diagonal()
    for rows in row_blocks(delta.shape[0], delta.shape[1]):
        block = delta[rows] / size
        apart += float((block.square() * moments).sum(dtype=torch.float64))
        together += float(((block @ inputs.gram) * block).sum(dtype=torch.float64))
    if together <= 0.0:
        return 1.0
    return min(1.0, 1.0 - p + p * apart / together)


def bound_q(delta: torch.Tensor, p: float, mean: torch.Tensor, eta: float) -> float:
    """DAREx-q's analytic q: per row the minimum of a bound on the output change, then the mean over rows.

    Minimises `|eta (1 - (1-p)/q) sum_j c_ij + eta^2 phi(p) sum_j c_ij^2 / (4 q^2) + ln(2 / 0.05)|` with
    `c_ij = D_ij x_j` and `phi(p) = (1 - 2p) / ln((1-p)/p)`, on a grid from `1 - p` up, until four of five rows have
    passed a minimum. The terms have the unit of an output, so unlike any other setting it depends on the delta's size.

    Args:
        delta: float32 `(out, in)`.
        p: share of the entries to drop.
        mean: mean input x, float32 `(in,)`.
        eta: the paper's balance of the two terms.
    """
    if p == 0.0:
        return 1.0
    x = mean.double()
    sums = torch.cat([delta[rows].double() @ x for rows in row_blocks(delta.shape[0], delta.shape[1])]).numpy()
    squares = torch.cat(
        [delta[rows].double().square() @ x.square() for rows in row_blocks(delta.shape[0], delta.shape[1])]
    ).numpy()
    phi = 0.5 if p == 0.5 else (1 - 2 * p) / math.log((1 - p) / p)
    found = np.full(sums.shape, 1.0 - p)
    best = np.full(sums.shape, np.inf)
    passed = np.zeros(sums.shape, dtype=np.bool_)
    for step in range(math.ceil(round((1 - p) * _GRID, 6)), _GRID - 1):
        q = step / _GRID
        bound = np.abs(eta * (1 - (1 - p) / q) * sums + eta**2 * phi * squares / (4 * q**2) + _SURE)
        passed |= bound >= best
        better = bound <= best
        best[better], found[better] = bound[better], q
        if passed.mean() >= _ENOUGH:
            break
    return float(found.mean())
