"""The error of every rank from one decomposition (Eckart and Young): what is left is the sum of the squares cut off."""

from __future__ import annotations

from dataclasses import replace

import torch

from deltakeeper.budget.parts import Part, squared
from deltakeeper.codecs import Svd
from deltakeeper.layouts.lowrank import Lowrank

ROUNDING = {"float16": 1.6e-7, "bfloat16": 1.0e-5, "float32": 1e-13}
"""Relative squared error of a product of two factors that were rounded to these dtypes."""


def rank_errors(part: Part, matrix: torch.Tensor, codec: Svd, limit: int) -> list[float]:
    """Squared error (weighted by the part's inputs where it has any) of the ranks 0, 1, … `limit`.

    The right singular vectors weigh each rank: with `E = Σ_{i>r} s_i u_i v_iᵀ`, `tr(E G Eᵀ) = Σ_{i>r} s_i² v_iᵀ G v_i`.

    Args:
        part: the matrix's part, for its inputs.
        matrix: what is decomposed, float32 `(out, in)`: the delta, or what another codec left of it.
        codec: gives the method of decomposition and the dtype of the factors.
        limit: the largest rank.
    """
    whole = _weighted_square(part, matrix)
    if whole == 0.0:
        return [0.0] * (limit + 1)
    exact = replace(codec, rank=limit, energy=None, factors="float32", niter=min(codec.niter, 2))
    (term,) = exact.encode(matrix, name=part.label)
    if not isinstance(term, Lowrank):
        raise TypeError("svd gives one low-rank term")
    lengths = term.left.double().norm(dim=0) * float(term.gain)
    if part.inputs is None:
        weights = term.right.double().norm(dim=1) ** 2
    else:
        weights = ((term.right @ part.inputs.gram) * term.right).double().sum(dim=1)
    kept = torch.cumsum(lengths**2 * weights, dim=0).tolist()
    floor = ROUNDING[codec.factors]
    errors = [whole, *(max(0.0, whole - found) + floor * min(found, whole) for found in kept)]
    return errors + errors[-1:] * (limit + 1 - len(errors))


def _weighted_square(part: Part, matrix: torch.Tensor) -> float:
    if part.inputs is None or matrix.numel() <= 1 << 22:
        return squared(matrix, part.inputs)
    step = -(-matrix.numel() // (1 << 22))  # the product with the Gram matrix would take longer than all else
    rows = matrix[::step]
    return squared(rows, part.inputs) * len(matrix) / len(rows)
