"""Bring a packed term into the form that the compiled products read, and register it there."""

from __future__ import annotations

import numpy as np
import torch

from deltakeeper.errors import LayoutError
from deltakeeper.layouts import Dense, GroupedInt, Layout, Lowrank, Signs, Sparse
from deltakeeper.layouts.bits import pack_bits
from deltakeeper.layouts.streams import unpack_stream

AXES = {"tensor": 0, "row": 1, "column": 2}


def prepare(term: Layout) -> int:
    """Register a term with the compiled products; gives its number.

    Raises:
        LayoutError: the products do not know its layout.
    """
    ops = torch.ops.deltakeeper
    if isinstance(term, Signs):
        return int(ops.hold_signs(list(term.packed), list(term.scales), term.nonzero, *term.shape, AXES[term.scale]))
    if isinstance(term, Lowrank):
        return _prepare_lowrank(term)
    if isinstance(term, GroupedInt):
        steps = term.steps.contiguous()
        return int(ops.hold_codes(term.packed, steps, term.zero_point, term.shape[1], term.bits, term.group))
    if isinstance(term, Sparse):
        return _prepare_sparse(term)
    if isinstance(term, Dense):
        return int(ops.hold_dense(term.stored))
    raise LayoutError(f"there is no product for layout '{term.name}'; merge the delta with `deltakeeper apply`.")


def _prepare_lowrank(term: Lowrank) -> int:
    ops = torch.ops.deltakeeper
    if term.packed is None:
        return int(ops.hold_factors(term.left.contiguous(), term.right.contiguous(), term.gain))
    held: list[int] = []
    try:
        for factor in term.packed:
            held.append(prepare(factor))
        return int(ops.hold_packed_factors(*held, term.gain))
    finally:  # the product of both keeps them
        for part in held:
            ops.release(part)


def _prepare_sparse(term: Sparse) -> int:
    """Signs become one plane with a mask, which has a product of its own; codes take a byte each."""
    ops = torch.ops.deltakeeper
    mask = term.mask.contiguous()
    if term.bits == 1:
        plane = pack_bits(term.to_dense() * term.gain.sign() > 0)
        axis = AXES["row" if term.gain.dim() > 1 else "tensor"]
        return int(ops.hold_signs([plane], [term.gain], mask, *term.shape, axis))
    if term.bits is None:
        values, zero = term.values, 0.0
    else:
        codes = unpack_stream(term.values, term.bits, 0, term.nnz)
        values, zero = torch.from_numpy(codes.astype(np.uint8)), float(term.zero_point)
    return int(ops.hold_sparse(mask, values, _row_starts(mask), term.gain, term.shape[1], zero))


def _row_starts(mask: torch.Tensor) -> torch.Tensor:
    """Index of the first kept value of each row and, at the end, their number: int64 `(out + 1,)`."""
    counts = _BITS_OF_BYTE[mask.view(torch.uint8).int()].sum(1)  # (out, bytes) -> (out,)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


_BITS_OF_BYTE = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int64)
