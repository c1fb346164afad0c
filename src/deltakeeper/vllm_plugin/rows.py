"""Which rows of vLLM's current pass belong to which slot; slot 0 is the base, and vLLM's slot `i` is `i + 1` here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from deltakeeper.errors import OverlayError
from deltakeeper.kernels.rows import RowGroups


@dataclass(frozen=True, eq=False)
class SlotRows:
    """Rows of one pass by slot.

    Attributes:
        groups: runs of rows of one slot.
        slots: the slots that have rows.
    """

    groups: RowGroups
    slots: frozenset[int]

    @classmethod
    def of(cls, row_slots: torch.Tensor) -> SlotRows:
        """From the slot of each row, int64 `(rows,)`."""
        groups = RowGroups.of(row_slots)
        return cls(groups, frozenset(groups.slots.tolist()))


NO_ROWS = SlotRows.of(torch.zeros(0, dtype=torch.int64))


class CurrentRows:
    """The rows of the pass that runs: those of tokens, and those that logits are asked for.

    Attributes:
        tokens: a row for each token.
        sampled: a row for each token that is sampled from.
    """

    def __init__(self) -> None:
        self.tokens = self.sampled = NO_ROWS
        self._hidden: torch.Tensor | None = None

    def begin(self, tokens: torch.Tensor, sampled: torch.Tensor) -> None:
        """Take vLLM's slot of each row of the pass that comes, -1 for the base; its buffers are used again."""
        self.tokens, self.sampled = SlotRows.of(tokens + 1), SlotRows.of(sampled + 1)

    @property
    def rating(self) -> bool:
        """Whether prompts are rated at this moment."""
        return self._hidden is not None

    @contextmanager
    def rating_prompts(self, hidden: torch.Tensor) -> Iterator[None]:
        """While prompts are rated, logits are asked for runs of rows of `hidden`, `(tokens, width)`."""
        self._hidden = hidden
        try:
            yield
        finally:
            self._hidden = None

    def of_logits(self, hidden: torch.Tensor) -> SlotRows:
        """The slots behind the rows `(rows, width)` that logits are asked for.

        Raises:
            OverlayError: they are neither the sampled rows nor a run of the rated ones.
        """
        if self._hidden is None:
            rows = self.sampled
            if len(hidden) == rows.groups.rows or rows.slots <= {0}:
                return rows
        else:
            step = self._hidden.stride(0) * self._hidden.element_size()
            first, rest = divmod(hidden.data_ptr() - self._hidden.data_ptr(), step)
            if not rest and first >= 0 and first + len(hidden) <= len(self._hidden):
                return SlotRows.of(self.tokens.groups.row_slots[first : first + len(hidden)])
        raise OverlayError(
            f"vLLM asks for the logits of {len(hidden)} rows, and whose they are cannot be told; serve without "
            "speculative decoding."
        )
