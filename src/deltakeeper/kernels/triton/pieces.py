"""The rows of a pass cut into pieces of one slot and of at most one block, as the kernels' grids need them."""

from __future__ import annotations

import torch

from deltakeeper.errors import KernelError
from deltakeeper.kernels.rows import RowGroups
from deltakeeper.kernels.triton.blocks import Blocks


class RowPieces:
    """Made once a pass and used by all its products.

    Attributes:
        rows: rows of the pass.
        blocks: block sizes of the launches.
        table: int64 `(capacity, 3)` on the device: slot, first row, number of rows; slot 0 where there is no piece.
        highest_slot: largest slot of a row.
    """

    def __init__(self, blocks: Blocks, table: torch.Tensor) -> None:
        self.blocks = blocks
        self.table = table
        self.rows = 0
        self.highest_slot = 0

    @classmethod
    def of(
        cls,
        groups: RowGroups,
        device: torch.device | str,
        *,
        blocks: Blocks | None = None,
        capacity: int | None = None,
    ) -> RowPieces:
        """Cut the groups of a pass; rows of the base take no piece.

        Args:
            groups: slots and starts, on the CPU.
            device: where the products run.
            blocks: block sizes; None chooses by the longest group of a tenant.
            capacity: pieces to make room for, for a launch that is captured once and refilled; None for as many as
                there are. A captured launch also needs the same `blocks` and shapes.

        Raises:
            KernelError: there are more pieces than `capacity`.
        """
        if blocks is None:
            lengths = groups.starts.diff()[groups.slots > 0]
            blocks = Blocks.choose(int(lengths.max()) if lengths.numel() else 1)
        cut = _cut(groups, blocks.rows)
        made = cls(blocks, torch.zeros(len(cut) if capacity is None else capacity, 3, dtype=torch.int64, device=device))
        made._fill(cut, groups)
        return made

    def refill(self, groups: RowGroups) -> None:
        """Put the rows of another pass into the same memory, in stream order.

        Raises:
            KernelError: there are more pieces than fit.
        """
        self._fill(_cut(groups, self.blocks.rows), groups)

    def _fill(self, cut: list[tuple[int, int, int]], groups: RowGroups) -> None:
        capacity = len(self.table)
        if len(cut) > capacity:
            raise KernelError(
                f"a pass has {len(cut)} pieces of rows but room is for {capacity}; make a larger capacity."
            )
        padded = cut + [(0, 0, 0)] * (capacity - len(cut))
        self.table.copy_(torch.tensor(padded, dtype=torch.int64).reshape(capacity, 3))
        self.rows = groups.rows
        self.highest_slot = max((slot for slot, _, _ in cut), default=0)


def _cut(groups: RowGroups, block: int) -> list[tuple[int, int, int]]:
    starts = groups.starts.tolist()
    return [
        (slot, first, min(block, end - first))
        for slot, start, end in zip(groups.slots.tolist(), starts, starts[1:], strict=False)
        if slot > 0
        for first in range(start, end, block)
    ]
