"""Quantisation or pruning column by column, each error paid back by the columns that are still free.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023,
https://arxiv.org/abs/2210.17323, and "SparseGPT", ICML 2023, https://arxiv.org/abs/2301.00774.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

from deltakeeper.devices import working_device
from deltakeeper.errors import CodecError

DOUBLE_UP_TO = 4096
"""Largest gram that is factored in float64; larger ones in float32, for memory."""

_ATTEMPTS = 12


class ColumnRule(Protocol):
    """What a column becomes: rounding, pruning, or both. Keeps its own scales, masks and codes.

    Attributes:
        span: how many neighbouring columns are decided on together (the group of a scale, the 4 of a 2:4 mask).
    """

    @property
    def span(self) -> int:
        """See the class."""

    def look(self, columns: torch.Tensor, diagonal: torch.Tensor, start: int) -> None:
        """See the next span before its first column is quantised, with all earlier errors paid into it.

        Args:
            columns: float32 `(out, k)`, `k <= span`; the matrix's columns `start` to `start + k`. Not to be modified.
            diagonal: float32 `(k,)`, `U_jj` of the upper Cholesky factor of the inverse gram: the loss of removing
                entry `w` is `w² / U_jj²`. All ones where there is no gram.
            start: index of the first of them, a multiple of `span`.
        """

    def quantise(self, column: torch.Tensor, index: int) -> torch.Tensor:
        """What is stored for a column: float32 `(out,)` in, the same out (a new tensor), as it will be decoded."""


def quantise_columns(
    matrix: torch.Tensor,
    gram: torch.Tensor | None,
    rule: ColumnRule,
    *,
    damp: float = 0.01,
    block: int = 128,
    act_order: bool = False,
    zero_dead: bool = False,
    upper: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantise a matrix so that `‖x (W - Ŵ)ᵀ‖` is small on inputs with this gram.

    For each column `j`, `e = (W_j - Ŵ_j) / U_jj` and `W_k -= e U_jk` for `k > j`, where `Uᵀ U` is the inverse of the
    damped gram.

    Args:
        matrix: float32 `(out, in)`, finite; not modified.
        gram: `xᵀx` of the inputs up to a factor, `(in, in)`, symmetric; None (or all zero) for equal weights, which
            leaves plain rounding.
        rule: decides what a column becomes.
        damp: share of the gram's mean diagonal that is added to its diagonal; raised tenfold until it can be factored.
        block: columns whose errors are paid to the rest of the matrix at once, for speed; does not change the result
            but for the order of sums.
        act_order: take columns by falling diagonal of the gram. The rule then looks at every span before the first
            column is quantised, because the columns of a span no longer follow each other.
        zero_dead: take columns whose input was always zero as zero, as GPTQ does; else they are plainly rounded.
        upper: what `upper_factor` gives for this gram, where it is at hand; not with `act_order`.

    Returns:
        The matrix as it will be decoded, float32 `(out, in)`.

    Raises:
        CodecError: the gram does not fit the matrix or is not finite.
    """
    columns = matrix.shape[1]
    work = matrix.T.contiguous().clone()  # (in, out): a column is contiguous
    if gram is not None and tuple(gram.shape) != (columns, columns):
        raise CodecError(f"a gram of shape {tuple(gram.shape)} does not fit a matrix of {columns} columns.")
    live = gram if gram is not None and bool(gram.diagonal().any()) else None
    order = torch.arange(columns)
    if live is None:
        upper = None
    else:
        if zero_dead:
            work[live.diagonal() == 0] = 0.0
        if act_order:
            order = torch.argsort(live.diagonal(), descending=True, stable=True)
            live = live[order][:, order]
        upper = upper_factor(live, damp) if upper is None or act_order else upper
    diagonal = torch.ones(columns) if upper is None else upper.diagonal().contiguous()
    span = max(1, rule.span)
    if act_order:
        by_column = torch.empty_like(diagonal).index_copy_(0, order, diagonal)
        for start in range(0, columns, span):
            rule.look(work[start : start + span].T, by_column[start : start + span], start)
        work = work[order]
    done = torch.empty_like(work)
    errors = torch.empty(min(max(block, span), columns), work.shape[1])
    for start, stop in _blocks(columns, block, span):
        for j in range(start, stop):
            if not act_order and j % span == 0:
                rule.look(work[j : j + span].T, diagonal[j : j + span], j)
            done[j] = rule.quantise(work[j], int(order[j]))
            if upper is not None:
                error = torch.sub(work[j], done[j], out=errors[j - start]).div_(diagonal[j])
                work[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
        if upper is not None and stop < columns:
            work[stop:].addmm_(upper[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return torch.empty_like(done).index_copy_(0, order, done).T.contiguous() if act_order else done.T.contiguous()


def upper_factor(gram: torch.Tensor, damp: float) -> torch.Tensor:
    """Upper triangular `U` with `Uᵀ U = (gram + λ I)⁻¹`, float32 `(in, in)`.

    `λ` is `damp` times the mean diagonal, raised tenfold until the sum is positive definite in floating point.

    Raises:
        CodecError: the gram is not finite.
    """
    return roots(gram, damp)[1]


def roots(gram: torch.Tensor, damp: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper triangular `R` with `R Rᵀ = gram + λ I`, and its inverse, which is `upper_factor`; float32 `(in, in)`.

    Raises:
        CodecError: the gram is not finite.
    """
    size = gram.shape[0]
    dtype = torch.float64 if size <= DOUBLE_UP_TO else torch.float32
    mean = float(gram.diagonal().double().mean())
    if not 0.0 < mean < math.inf:
        raise CodecError("the calibration inputs of a layer are not finite; use another text or precision.")
    half = math.frexp(mean)[1] // 2
    level = math.ldexp(1.0, half)  # it and its square are powers of two, so that scaling by them is exact
    # Reversed, because the lower factor of the reversed gram, reversed again, is the wanted upper one: one
    # factorisation, and the gram itself is never inverted.
    reverse = gram.to(working_device(), dtype).div(level).div_(level).flip(0, 1)
    share = max(damp, 1e-8) * mean / level / level
    reverse.diagonal().add_(share)
    for _ in range(_ATTEMPTS):
        lower, failed = torch.linalg.cholesky_ex(reverse)
        if not bool(failed) and bool(torch.isfinite(lower.diagonal()).all()):
            unit = torch.eye(size, dtype=dtype, device=lower.device)
            inverse = torch.linalg.solve_triangular(lower, unit, upper=False)
            return (
                lower.flip(0, 1).mul_(level).float().contiguous().cpu(),
                inverse.flip(0, 1).div_(level).float().contiguous().cpu(),
            )
        reverse.diagonal().add_(9 * share)
        share *= 10
    raise CodecError("the calibration inputs of a layer are not finite; use another text or precision.")


def _blocks(columns: int, block: int, span: int) -> list[tuple[int, int]]:
    """Blocks such that a span never starts inside one block and ends in another one."""
    if span <= block:
        step = block // span * span
        return [(start, min(start + step, columns)) for start in range(0, columns, step)]
    return [
        (start, min(start + block, first + span, columns))
        for first in range(0, columns, span)
        for start in range(first, min(first + span, columns), block)
    ]
