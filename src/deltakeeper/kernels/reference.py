"""The products in plain torch, tiled: the fallback where there are no compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from deltakeeper.kernels.terms import plain_term
from deltakeeper.layouts import Layout, Lowrank

TILE = 256
"""Rows of a weight that are unpacked at a time: never a whole matrix."""


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    merge_from: int,
) -> torch.Tensor:
    """`x Wᵀ + bias` plus the terms of each row's slot, summed in float32 and rounded once; `merge_from` is not needed.

    Rows of a group with terms take one float32 product with `W + Δ`, tile by tile; the others torch's own.
    """
    y = x.new_empty(len(x), len(weight))  # (rows, out)
    for rows, terms in _groups(table, slots, starts):
        if not terms:
            y[rows] = F.linear(x[rows], weight, bias)
            continue
        wide = x[rows].float()
        for tile in _tiles(len(weight)):
            part = wide @ (weight[tile].float() + _unpack(terms, tile)).T
            y[rows, tile] = (part if bias is None else part + bias[tile].float()).to(y.dtype)
    return y


def linears(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    tables: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    merge_from: int,
) -> list[torch.Tensor]:
    """One `linear` after another."""
    return [linear(x, w, None, table, slots, starts, merge_from) for w, table in zip(weights, tables, strict=True)]


def add_terms(y: torch.Tensor, x: torch.Tensor, table: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor) -> None:
    """`y += x Δᵀ` for each row's slot, in place: all terms summed in float32 and rounded once."""
    for rows, terms in _groups(table, slots, starts):
        wide = [term for term in terms if not isinstance(term, Lowrank)]
        x_wide, total = x[rows].float(), y[rows].float()
        for term in terms:
            if isinstance(term, Lowrank):
                total += term.matmul(x_wide)
        for tile in _tiles(y.shape[1]) if wide else ():
            total[:, tile] += x_wide @ _unpack(wide, tile).T
        if terms:
            y[rows] = total.to(y.dtype)


def add_rows(y: torch.Tensor, ids: torch.Tensor, table: torch.Tensor, row_slots: torch.Tensor) -> None:
    """`y[row] += Δ[ids[row]]` for each row's slot, in place."""
    for row, (id, slot) in enumerate(zip(ids.tolist(), row_slots.tolist(), strict=True)):
        if terms := [plain_term(number) for number in table[slot].tolist() if number]:
            y[row] = (y[row].float() + _unpack(terms, slice(id, id + 1))[0]).to(y.dtype)


def _groups(table: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor) -> Iterator[tuple[slice, list[Layout]]]:
    bounds = starts.tolist()
    for group, slot in enumerate(slots.tolist()):
        if bounds[group] < bounds[group + 1]:
            terms = [plain_term(number) for number in table[slot].tolist() if number] if slot else []
            yield slice(bounds[group], bounds[group + 1]), terms


def _tiles(out: int) -> Iterator[slice]:
    return (slice(start, min(start + TILE, out)) for start in range(0, out, TILE))


def _unpack(terms: list[Layout], rows: slice) -> torch.Tensor:
    """The sum of some rows of the terms, float32 `(rows, in)`."""
    total = torch.zeros(rows.stop - rows.start, terms[0].shape[1])
    room = torch.empty_like(total)
    for term in terms:
        if isinstance(term, Lowrank):
            total += (term.left[rows].float() @ term.right.float()) * term.gain
        elif term.merge_rows(None, rows, room):
            total += room
        else:
            total += term.to_dense()[rows]
    return total
