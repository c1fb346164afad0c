"""`y += x · Δᵀ` for the rows of many tenants: checks, block sizes and launches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch

from deltakeeper.errors import KernelError
from deltakeeper.kernels.rows import RowGroups
from deltakeeper.kernels.triton.availability import check_runnable
from deltakeeper.kernels.triton.blocks import Blocks
from deltakeeper.kernels.triton.pack import FIELDS
from deltakeeper.kernels.triton.pieces import RowPieces
from deltakeeper.kernels.triton.table import TermTable

NARROWEST = 8  # rows of x in a product of the matrix units
SHRINK_STEP = 256  # inputs at a time; shorter steps wait longer for memory
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def add_terms_(y: torch.Tensor, x: torch.Tensor, table: TermTable, groups: RowGroups | RowPieces) -> None:
    """Add the terms of each row's slot, in place: `y += Σ x · Δᵀ`.

    Sums are float32; y is rounded once for each layout that a slot uses. Rows of the base, and of slots without terms
    here, keep their bits. Signs, and codes in groups of a multiple of 128, are exact factors in every dtype; with half
    precision x other weights are rounded to TF32 (ten bits), with float32 nothing is rounded but the sums.

    Args:
        y: `(rows, sum of the table's widths)`, float16, bfloat16 or float32, entries of a row adjacent.
        x: `(rows, in)`, same dtype and device, entries of a row adjacent.
        table: terms by slot.
        groups: which rows belong to which slot; pieces are made once a pass, groups are cut in every call.

    Raises:
        KernelError: the kernels cannot run here, or shapes, dtypes, devices or slots do not fit.
    """
    check_runnable(x.dtype, x.device)
    pieces = groups if isinstance(groups, RowPieces) else RowPieces.of(groups, table.device)
    _check(y, x, table, pieces)
    if not table.launches or not len(pieces.table):
        return
    guard: AbstractContextManager[Any] = torch.cuda.device(x.device) if x.is_cuda else nullcontext()
    with guard:
        for kind, ranks, plain in table.launches:
            _LAUNCHERS[kind](_Call(y, x, table, pieces, kind, ranks, plain))


@dataclass(frozen=True)
class _Call:
    y: torch.Tensor
    x: torch.Tensor
    table: TermTable
    pieces: RowPieces
    kind: str
    ranks: int
    plain: bool

    @property
    def blocks(self) -> Blocks:
        return self.pieces.blocks

    @property
    def tiles(self) -> torch.Tensor:
        return self.table.tiles(self.blocks.columns)

    @property
    def grid(self) -> tuple[int, int]:
        return len(self.tiles), len(self.pieces.table)

    @property
    def x_arguments(self) -> tuple[Any, ...]:
        return self.x, self.x.stride(0), self.table.inputs

    @property
    def places(self) -> tuple[Any, ...]:
        """Pieces, tiles, counts, fields, projections, depth."""
        table = self.table
        return self.pieces.table, self.tiles, table.counts[self.kind], table.fields[self.kind], *self.sizes

    @property
    def sizes(self) -> tuple[int, int]:
        return len(self.table.widths), self.table.depth

    def options(self, *, floats: bool = True) -> dict[str, Any]:
        """Constants of every kernel; `floats`: the factors of the products are float32 whatever x is."""
        half = self.x.dtype != torch.float32 and floats and torch.version.hip is None
        precision = "tf32" if half else "ieee"
        blocks = self.blocks
        return {
            "FIELDS": FIELDS,
            "ROWS": blocks.rows,
            "DOT": blocks.dot,
            "PRECISION": precision,
            "num_warps": 8 if blocks.rows * blocks.columns >= 4096 else 4,
        }

    def partials(self, splits: int, width: int) -> torch.Tensor:
        return torch.empty(splits, len(self.x), width, dtype=torch.float32, device=self.x.device)


def _add_signs(call: _Call) -> None:
    _add_woven(call, _kernels("signs").add_signs, SCALED=not call.plain, PRECISION="ieee")


def _add_codes(call: _Call) -> None:
    precision = call.options(floats=not call.plain)["PRECISION"]
    _add_woven(call, _kernels("codes").add_codes, BITS=call.ranks, PLAIN=call.plain, PRECISION=precision)


def _add_woven(call: _Call, kernel: Any, **constants: Any) -> None:
    """Products of woven words, whose tiles are shared by several programs where there are few."""
    blocks, grid = call.blocks, call.grid
    splits = blocks.splits_for(grid[0] * grid[1], call.table.inputs)
    partial = call.partials(splits if splits > 1 else 0, sum(call.table.widths))
    kernel[(*grid, splits)](
        call.y,
        call.y.stride(0),
        *call.x_arguments,
        *call.places,
        _lanes(call.x.dtype, call.x.device),
        partial,
        partial.stride(0),
        partial.stride(1),
        FIELDS=FIELDS,
        ROWS=max(NARROWEST, blocks.rows),
        COLUMNS=blocks.columns,
        SPLITS=splits,
        EVEN=call.table.inputs % 128 == 0,
        **constants,
        num_warps=4,
        num_stages=3 if blocks.dot else 4,
    )
    if splits > 1:
        pieces, tiles, counts, _, projections, _ = call.places
        _kernels("partials").add_partials[grid](
            call.y,
            call.y.stride(0),
            pieces,
            tiles,
            counts,
            projections,
            partial,
            partial.stride(0),
            partial.stride(1),
            ROWS=blocks.rows,
            COLUMNS=blocks.columns,
            SPLITS=splits,
        )


@cache
def _lanes(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """For each of 16 pairs of a word: the power of two that shifts it to the signs, -1 twice, the pair's number."""
    minus_ones = 0xBF80BF80 if dtype == torch.bfloat16 else 0xBC00BC00
    lanes = [1 << 15 - pair for pair in range(16)] + [minus_ones - 2**32] * 16 + list(range(16))
    return torch.tensor(lanes, dtype=torch.int32, device=device)


def _add_sparse(call: _Call) -> None:
    _kernels("sparse").add_sparse[call.grid](
        call.y, call.y.stride(0), *call.x_arguments, *call.places, COLUMNS=call.blocks.columns, **call.options()
    )


def _add_floats(call: _Call) -> None:
    _kernels("floats").add_floats[call.grid](
        call.y,
        call.y.stride(0),
        *call.x_arguments,
        *call.places,
        COLUMNS=call.blocks.columns,
        STEP=32 * call.blocks.words,
        **call.options(),
    )


def _add_lowrank(call: _Call) -> None:
    kernels, blocks = _kernels("floats"), call.blocks
    projections, depth = call.sizes
    rank_tiles = projections * depth * -(-call.ranks // blocks.ranks)
    splits = blocks.splits_for(rank_tiles * call.grid[1], call.table.inputs)
    partial = call.partials(splits, projections * depth * call.ranks)
    pieces, tiles, counts, fields, _, _ = call.places
    kernels.shrink[(rank_tiles, call.grid[1], splits)](
        partial,
        partial.stride(0),
        partial.stride(1),
        *call.x_arguments,
        pieces,
        counts,
        fields,
        projections,
        depth,
        call.ranks,
        RANKS=blocks.ranks,
        STEP=SHRINK_STEP,
        SPLITS=splits,
        **call.options(),
    )
    kernels.expand_ranks[call.grid](
        call.y,
        call.y.stride(0),
        partial,
        partial.stride(0),
        partial.stride(1),
        pieces,
        tiles,
        counts,
        fields,
        projections,
        depth,
        call.ranks,
        COLUMNS=blocks.columns,
        RANKS=blocks.ranks,
        SPLITS=splits,
        **call.options(),
    )


_LAUNCHERS: dict[str, Callable[[_Call], None]] = {
    "signs": _add_signs,
    "grouped_int": _add_codes,
    "sparse": _add_sparse,
    "dense": _add_floats,
    "lowrank": _add_lowrank,
}


@cache
def _kernels(name: str) -> Any:
    """The module of some kernels, which imports Triton."""
    return import_module(f"deltakeeper.kernels.triton.{name}_kernel")


def _check(y: torch.Tensor, x: torch.Tensor, table: TermTable, pieces: RowPieces) -> None:
    rows, width = pieces.rows, sum(table.widths)
    if tuple(y.shape) != (rows, width) or tuple(x.shape) != (rows, table.inputs):
        raise KernelError(
            f"y {tuple(y.shape)} and x {tuple(x.shape)} do not fit {rows} rows of {table.inputs} inputs and {width} "
            "outputs; give matrices of these shapes."
        )
    if x.dtype not in DTYPES or y.dtype != x.dtype:
        raise KernelError(f"y is {y.dtype} and x {x.dtype}; both must be float16, bfloat16 or float32 alike.")
    if not x.device == y.device == pieces.table.device or x.device.type != table.device.type:
        raise KernelError("y, x, the rows and the table are not on one device; move them to one.")
    if any(matrix.stride(1) != 1 and matrix.numel() > 1 for matrix in (y, x)):
        raise KernelError("the entries of a row of y or x are not adjacent; call contiguous() first.")
    if pieces.highest_slot >= table.slots:
        raise KernelError(f"slot {pieces.highest_slot} is outside a table of {table.slots} slots; register it first.")
