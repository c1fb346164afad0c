"""A lane: what slots hold for one matrix of the base, a module's own or one of several that vLLM has packed into it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from deltakeeper.kernels.products import add_rows_, add_terms_
from deltakeeper.overlay.site import Stack
from deltakeeper.vllm_plugin.rows import SlotRows


class Lane:
    """Terms, whole matrices and biases of one matrix `(out, in)`, by slot.

    Attributes:
        columns: which outputs of the module are its.
        width: its inputs.
        bias: the base's bias, float32 `(out,)`, None where it has none.
    """

    def __init__(self, columns: slice, width: int, slots: int, bias: torch.Tensor | None = None) -> None:
        self.columns, self.width, self.bias = columns, width, bias
        self.table = torch.zeros(slots, 1, dtype=torch.int64)
        self.matrices: dict[int, torch.Tensor] = {}
        self.termed: set[int] = set()
        self.biased: set[int] = set()
        self._biases: Stack | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.columns.stop - self.columns.start, self.width

    def put(self, slot: int, numbers: Sequence[int]) -> None:
        """Let a slot have these terms, by their numbers."""
        depth = self.table.shape[1]
        if len(numbers) > depth:
            self.table = F.pad(self.table, (0, len(numbers) - depth))
        self.table[slot] = 0
        self.table[slot, : len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        self.termed.add(slot)

    def put_matrix(self, slot: int, matrix: torch.Tensor) -> None:
        """Let a slot have a matrix of its own in the base's place."""
        self.matrices[slot] = matrix

    def put_bias(self, slot: int, bias: torch.Tensor) -> None:
        """Let a slot have another bias, float32 `(out,)`; how it differs from the base's is kept."""
        if self._biases is None:
            self._biases = Stack(torch.zeros(self.shape[0]), len(self.table))
        self._biases.put(slot, bias if self.bias is None else bias - self.bias)
        self.biased.add(slot)

    def clear(self, slot: int) -> None:
        """Let a slot be the base again."""
        self.table[slot] = 0
        self.matrices.pop(slot, None)
        self.termed.discard(slot)
        self.biased.discard(slot)
        if self._biases is not None and not self._biases.put(slot, None):
            self._biases = None

    def holds_any(self, slots: frozenset[int]) -> bool:
        """Whether one of these slots holds something here."""
        return not slots.isdisjoint(self.termed | self.biased | self.matrices.keys())

    def add_product_(self, y: torch.Tensor, x: torch.Tensor, rows: SlotRows) -> None:
        """`y[:, columns] += Δ x` of each row's slot, in place: `(rows, ≥ out)`, `(rows, in)`."""
        whole = y.shape[1] == self.shape[0] and y.is_contiguous()
        part = y if whole else y[:, self.columns].contiguous()
        for slot, run in _runs(rows):
            if (matrix := self.matrices.get(slot)) is not None:
                wide = F.linear(x[run], matrix).float()
                part[run] = (wide if self.bias is None else wide + self.bias).to(part.dtype)
        if not rows.slots.isdisjoint(self.termed):
            add_terms_(part, x, self.table, rows.groups)
        if self._biases is not None and not rows.slots.isdisjoint(self.biased):
            part += self._biases.vectors.index_select(0, rows.groups.row_slots)
        if not whole:
            y[:, self.columns] = part

    def add_rows_(self, y: torch.Tensor, ids: torch.Tensor, rows: SlotRows) -> None:
        """`y[row] += Δ[ids[row]]` of each row's slot, in place, for embeddings: `(rows, in)`, int64 `(rows,)`."""
        for slot, run in _runs(rows):
            if (matrix := self.matrices.get(slot)) is not None:
                y[run] = F.embedding(ids[run], matrix).to(y.dtype)
        if not rows.slots.isdisjoint(self.termed):
            add_rows_(y, ids, self.table, rows.groups)


def _runs(rows: SlotRows) -> list[tuple[int, slice]]:
    bounds = rows.groups.starts.tolist()
    return [(slot, slice(bounds[i], bounds[i + 1])) for i, slot in enumerate(rows.groups.slots.tolist())]
