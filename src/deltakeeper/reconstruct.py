"""Turn packed terms back into a tensor: terms are summed in float32 in their order, and rounded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltakeeper.layouts import Layout
from deltakeeper.manifest import TensorRecord


def dense_delta(record: TensorRecord, terms: Sequence[Layout]) -> torch.Tensor:
    """The delta over the shared rows, float32, oriented as in the checkpoint; not for a record that stores a value."""
    if record.terms and record.terms[0].slice is not None:
        slices: dict[int, torch.Tensor] = {}
        for described, term in zip(record.terms, terms, strict=True):
            index = described.slice or 0
            slices[index] = slices[index] + term.to_dense() if index in slices else term.to_dense()
        return torch.stack([slices[i] for i in range(record.shape[0])])
    total = terms[0].to_dense()
    for term in terms[1:]:
        total = total + term.to_dense()
    return total.T if record.transposed else total


def reconstruct(
    record: TensorRecord,
    terms: Sequence[Layout],
    base: torch.Tensor | None,
    added_rows: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The fine-tuned tensor as the artifact gives it back.

    Args:
        record: how the tensor is stored.
        terms: its packed terms.
        base: the base's tensor in its own dtype, None for a tensor without one.
        added_rows: rows that the fine-tune added.
        dtype: dtype of the result; the one rounding is to nearest even.
    """
    if terms and terms[0].replaces:
        return terms[0].to_dense().view(record.shape).to(dtype)
    if base is None:
        raise ValueError("a delta needs its base")
    if not terms:
        return base.to(dtype)
    delta = dense_delta(record, terms)
    merged = torch.add(delta, _narrow(base[: len(delta)])).to(dtype)  # half precision is widened on the fly
    return merged if added_rows is None else torch.cat([merged, added_rows.to(dtype)])


def merge_block(
    terms: Sequence[Layout], base: torch.Tensor, rows: slice, dtype: torch.dtype, room: torch.Tensor | None = None
) -> torch.Tensor:
    """Some rows of the fine-tuned tensor, `(rows, in)`: what `reconstruct` gives for them, without the whole matrix.

    For terms in the orientation of the checkpoint that are no values. `room` is as many rows or more that may be
    overwritten and given back: fresh memory for every block costs as much as the work.
    """
    into = torch.empty(base.shape, dtype=dtype) if room is None else room[: len(base)]
    if len(terms) == 1 and terms[0].merge_rows(base, rows, into):
        return into
    total = terms[0].to_dense()[rows]
    for term in terms[1:]:
        total = total + term.to_dense()[rows]
    return torch.add(total, _narrow(base)).to(dtype)


def _narrow(base: torch.Tensor) -> torch.Tensor:
    """The base in at most float32, in which sums are made."""
    return base.float() if base.dtype == torch.float64 else base
