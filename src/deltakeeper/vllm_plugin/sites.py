"""Modules of vLLM's model that know the slot of each row: linear layers, the embedding, the head and RMS norms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from deltakeeper.errors import OverlayError
from deltakeeper.overlay.site import Stack
from deltakeeper.vllm_plugin.lanes import Lane
from deltakeeper.vllm_plugin.rows import CurrentRows, SlotRows


class Site(ABC):
    """A module that knows the slot of each row.

    Attributes:
        name: path of the module.
    """

    def __init__(self, name: str, slots: int, rows: CurrentRows) -> None:
        self.name, self.slots, self.rows = name, slots, rows

    @abstractmethod
    def apply_(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Change `y`, the module's result, for rows of slots that hold something; `x` is what it came from."""

    @abstractmethod
    def clear(self, slot: int) -> None:
        """Let a slot be the base again."""

    def checked(self, rows: SlotRows, count: int) -> SlotRows:
        """The rows themselves, if a module that is given `count` rows can have them.

        Raises:
            OverlayError: it is given others.
        """
        if count != rows.groups.rows:
            raise OverlayError(
                f"'{self.name}' is given {count} rows and vLLM told of {rows.groups.rows}, so whose they are cannot be "
                "told; serve this model without the plugin (VLLM_PLUGINS= names those to load)."
            )
        return rows


class MatrixSite(Site):
    """A module of matrices: a lane for each one that a checkpoint may have there.

    Attributes:
        parts: outputs of the matrices that vLLM has packed into it, in their order; one of them if it has packed none.
        width: its inputs.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[int],
        width: int,
        slots: int,
        rows: CurrentRows,
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__(name, slots, rows)
        self.parts, self.width, self._bias = tuple(parts), width, bias
        self._lanes: dict[tuple[int, int], Lane] = {}

    def lane(self, part: int | None) -> Lane:
        """The lane of one of the packed matrices, or of all of them as one."""
        start = 0 if part is None else sum(self.parts[:part])
        stop = sum(self.parts) if part is None else start + self.parts[part]
        if (start, stop) not in self._lanes:
            bias = None if self._bias is None else self._bias.detach()[start:stop].float()
            self._lanes[start, stop] = Lane(slice(start, stop), self.width, self.slots, bias)
        return self._lanes[start, stop]

    def clear(self, slot: int) -> None:
        """See `Site.clear`."""
        for lane in self._lanes.values():
            lane.clear(slot)

    def live(self, rows: SlotRows) -> list[Lane]:
        """The lanes that a row of the pass has something in."""
        return [lane for lane in self._lanes.values() if lane.holds_any(rows.slots)]


class LinearSite(MatrixSite):
    """A linear layer that vLLM has made ready for LoRA."""

    def apply_(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add each row's product: `(..., out)`, `(..., in)`."""
        lanes = self.live(self.rows.tokens)
        if lanes:
            flat, out = x.reshape(-1, x.shape[-1]).contiguous(), y.view(-1, y.shape[-1])
            rows = self.checked(self.rows.tokens, len(flat))
            for lane in lanes:
                lane.add_product_(out, flat, rows)


class EmbeddingSite(MatrixSite):
    """The input embedding."""

    def apply_(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add each token's row: `(..., width)`, ids `(...)`."""
        lanes = self.live(self.rows.tokens)
        if lanes:
            flat, out = x.reshape(-1).long(), y.view(-1, y.shape[-1])
            rows = self.checked(self.rows.tokens, len(flat))
            for lane in lanes:
                lane.add_rows_(out, flat, rows)


class HeadSite(MatrixSite):
    """The head, whose rows are those that logits are asked for."""

    def apply_(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add each row's product to its logits: `(rows, vocabulary)`, `(rows, width)`."""
        rows = self.rows.of_logits(x)
        for lane in self.live(rows):
            lane.add_product_(y, x.contiguous(), rows)


class NormSite(Site):
    """An RMS norm: rows of slots with a weight of their own are scaled in float32 and rounded once.

    Attributes:
        weight: the base's, float32 `(width,)`.
    """

    def __init__(self, name: str, module: Any, slots: int, rows: CurrentRows) -> None:
        super().__init__(name, slots, rows)
        self.epsilon = float(module.variance_epsilon)
        self.weight: torch.Tensor = module.weight.detach().float()
        self._stack: Stack | None = None
        self._own: set[int] = set()

    def put(self, slot: int, weight: torch.Tensor) -> None:
        """Let a slot have a weight of its own, float32 `(width,)`."""
        if self._stack is None:
            self._stack = Stack(self.weight, self.slots)
        self._stack.put(slot, weight)
        self._own.add(slot)

    def clear(self, slot: int) -> None:
        """See `Site.clear`."""
        self._own.discard(slot)
        if self._stack is not None and not self._stack.put(slot, None):
            self._stack = None

    def apply_(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Compute rows anew from what was normed, a residual already in it: both `(rows, ..., width)`."""
        if self._stack is None or self.rows.tokens.slots.isdisjoint(self._own):
            return
        row_slots = self.checked(self.rows.tokens, len(x)).groups.row_slots
        ones = (1,) * (x.ndim - 2)  # stand for heads
        own = F.rms_norm(x.float(), x.shape[-1:], None, self.epsilon)
        own *= self._stack.vectors.index_select(0, row_slots).view(len(x), *ones, x.shape[-1])
        mask = self._stack.changed.index_select(0, row_slots).view(len(x), *ones, 1)
        y.copy_(torch.where(mask, own.to(y.dtype), y))
