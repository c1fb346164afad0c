"""Which rows of a pass belong to which tenant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from deltakeeper.errors import KernelError


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Runs of rows of one slot; slot 0 is the base.

    Attributes:
        slots: int64 `(groups,)`, the slot of each group.
        starts: int64 `(groups + 1,)`: rows `starts[g]:starts[g + 1]` belong to group `g`; from 0 to the number of rows.
        row_slots: int64 `(rows,)`, the slot of each row, for gathers.
    """

    slots: torch.Tensor
    starts: torch.Tensor
    row_slots: torch.Tensor

    @classmethod
    def of(cls, row_slots: Sequence[int] | torch.Tensor) -> RowGroups:
        """Group runs of equal slots; rows of one slot should be adjacent, for speed alone.

        Raises:
            KernelError: a slot is negative.
        """
        rows = torch.as_tensor(row_slots, dtype=torch.int64)
        if rows.numel() and int(rows.min()) < 0:
            raise KernelError("a row has a negative slot; give 0 for the base and positive slots for tenants.")
        slots, lengths = torch.unique_consecutive(rows, return_counts=True)
        starts = torch.zeros(len(slots) + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=starts[1:])
        return cls(slots, starts, rows)

    @classmethod
    def of_runs(cls, slots: Sequence[int], counts: Sequence[int]) -> RowGroups:
        """The same from the slot and the number of rows of each run, which may be none; adjacent ones are joined."""
        names: list[int] = []
        starts = [0]
        rows: list[int] = []
        for slot, count in zip(slots, counts, strict=True):
            if not count:
                continue
            rows += [slot] * count
            if names and names[-1] == slot:
                starts[-1] = len(rows)
            else:
                names.append(slot)
                starts.append(len(rows))
        return cls(torch.tensor(names, dtype=torch.int64), torch.tensor(starts), torch.tensor(rows, dtype=torch.int64))

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_slots)

    @cached_property
    def base_slots(self) -> torch.Tensor:
        """The base's slot for each row, int64 `(rows,)`."""
        return torch.zeros_like(self.row_slots)

    @cached_property
    def base_only(self) -> bool:
        """Whether no row belongs to a tenant."""
        return not bool(self.slots.any())
