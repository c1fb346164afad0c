"""Bring a packed term into the form that the compiled products read, and register it there."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from deltakeeper.errors import LayoutError
from deltakeeper.layouts import Dense, GroupedInt, Layout, Lowrank, Signs, Sparse
from deltakeeper.layouts.bits import pack_bits
from deltakeeper.layouts.streams import unpack_stream

AXES = {"tensor": 0, "row": 1, "column": 2}


def prepare(term: Layout) -> tuple[int, int]:
    """Register a term with the compiled products.

    Returns:
        Its number, and the bytes that are held for it.

    Raises:
        LayoutError: the products do not know its layout.
    """
    ops = torch.ops.deltakeeper
    if isinstance(term, Signs):
        tensors = [*term.packed, *term.scales, *([] if term.nonzero is None else [term.nonzero])]
        number = ops.hold_signs(list(term.packed), list(term.scales), term.nonzero, *term.shape, AXES[term.scale])
        return int(number), _bytes(tensors)
    if isinstance(term, Lowrank):
        return _prepare_lowrank(term)
    if isinstance(term, GroupedInt):
        steps = term.steps.contiguous()
        number = ops.hold_codes(term.packed, steps, term.zero_point, term.shape[1], term.bits, term.group)
        zeros = [] if term.zero_point is None else [term.zero_point]
        return int(number), _bytes([term.packed, steps, *zeros])
    if isinstance(term, Sparse):
        return _prepare_sparse(term)
    if isinstance(term, Dense):
        return int(ops.hold_dense(term.stored)), _bytes([term.stored])
    raise LayoutError(
        f"there is no product for layout '{term.name}'; merge the delta with `deltakeeper apply` instead."
    )


def _prepare_lowrank(term: Lowrank) -> tuple[int, int]:
    ops = torch.ops.deltakeeper
    if term.packed is None:
        factors = (term.left.contiguous(), term.right.contiguous())
        return int(ops.hold_factors(*factors, term.gain)), _bytes([*factors, term.gain])
    left, right = (prepare(factor) for factor in term.packed)
    number = int(ops.hold_packed_factors(left[0], right[0], term.gain))
    for part in (left, right):  # the product of both keeps them
        ops.release(part[0])
    return number, left[1] + right[1] + 4


def _prepare_sparse(term: Sparse) -> tuple[int, int]:
    """Signs become one plane with a mask, which has a product of its own; codes take a byte each."""
    ops = torch.ops.deltakeeper
    mask = term.mask.contiguous()
    if term.bits == 1:
        plane = pack_bits(term.to_dense() * term.gain.sign() > 0)
        by_row = term.gain.dim() > 1
        number = ops.hold_signs([plane], [term.gain], mask, *term.shape, AXES["row" if by_row else "tensor"])
        return int(number), _bytes([plane, mask, term.gain])
    first = _row_starts(mask)
    if term.bits is None:
        values, zero = term.values, 0.0
    else:
        values = torch.from_numpy(unpack_stream(term.values, term.bits, 0, term.nnz).astype("uint8"))
        zero = float(term.zero_point)
    number = ops.hold_sparse(mask, values, first, term.gain, term.shape[1], zero)
    return int(number), _bytes([mask, values, first, term.gain])


def _row_starts(mask: torch.Tensor) -> torch.Tensor:
    """Index of the first kept value of each row and, at the end, their number: int64 `(out + 1,)`."""
    bytes_of_rows = mask.view(torch.uint8)  # (out, 4 words)
    counts = _BITS_OF_BYTE[bytes_of_rows.int()].sum(1)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


_BITS_OF_BYTE = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int64)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
