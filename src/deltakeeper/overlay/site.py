"""A site: one module of the live model that knows tenants, and the places in it that a delta can change."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deltakeeper.errors import OverlayError
from deltakeeper.overlay.current import CurrentPass


@dataclass(frozen=True)
class Place:
    """Where one matrix or vector of a checkpoint lives.

    Attributes:
        site: the module.
        key: which of its parameters (and which expert's).
        live: the base's values there, a view of the live parameter; None where it is not kept under this name.
        shape: its shape as the checkpoint has it.
        lane: its row of the overlay's table, counted from the site's first; None where only values can be held.
        precise: whether a value is held in float32 whatever the dtype of `live`.
        transposed: whether the shape is `(in, out)`.
        resizable: whether a tenant may have more rows, or fewer.
    """

    site: Site
    key: Hashable
    live: torch.Tensor | None
    shape: tuple[int, ...]
    lane: int | None = None
    precise: bool = False
    transposed: bool = False
    resizable: bool = False


@dataclass(frozen=True)
class Part:
    """What a tenant changes of one site beside packed terms.

    Attributes:
        values: what stands in the place of the base's parameters, by `Place.key`; matrices are `(out, in)`.
        added: rows behind the last one of an embedding or a head, `(rows, width)`.
        vocabulary: rows of an embedding or a head in all, None where it is the base's number.
    """

    values: dict[Hashable, torch.Tensor] = field(default_factory=dict)
    added: torch.Tensor | None = None
    vocabulary: int | None = None


class Site(ABC):
    """One module whose `forward` knows tenants. The module itself, its parameters and their names stay as they are.

    Attributes:
        name: path of the module.
        lanes: rows of the overlay's table that are its.
        first_lane: the first of them.
    """

    lanes = 0

    def __init__(self, name: str, module: nn.Module, current: CurrentPass) -> None:
        self.name, self.module, self.current = name, module, current
        self.inner: Any = module.forward
        self.parameters: dict[str, Any] = module._parameters
        self.first_lane = -1
        self.slots = 1
        self._before = module.__dict__.get("forward")

    def open(self) -> None:
        """Let the module's calls run through this site."""
        self.module.__dict__["forward"] = self.forward

    def close(self) -> None:
        """Give the module its own `forward` back."""
        if self._before is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.__dict__["forward"] = self._before

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes, row by row for the tenants of the pass."""

    @abstractmethod
    def place(self, leaf: str, expert: int | None = None, half: int | None = None) -> Place | None:
        """Where a parameter lives, or None if the site cannot hold another one for a tenant.

        Args:
            leaf: name of the parameter in the module.
            expert: index along its first dimension, of three.
            half: 0 or 1 where the checkpoint has two matrices that the parameter holds one below the other.
        """

    def grow(self, lanes: torch.Tensor, slots: int) -> None:
        """Take the table's rows of this site, int64 `(lanes, slots, depth)`, after it grew."""
        self.slots = slots

    @abstractmethod
    def put(self, slot: int, part: Part | None) -> None:
        """Take what a slot changes beside packed terms, or forget it."""

    def misfit(self, rows: int) -> OverlayError:
        """The error for a call with other rows than the pass was told of."""
        return OverlayError(
            f"module '{self.name}' is given {rows} rows but the pass was told of {self.current.rows}; "
            "make the groups cover every token of the batch, padding included."
        )


class Stack:
    """Vectors of one parameter by slot, gathered row by row; a slot that changes nothing has the base's.

    Attributes:
        vectors: `(slots, width)`.
    """

    def __init__(self, base: torch.Tensor, slots: int) -> None:
        self.base = base
        self.vectors = base.expand(slots, -1).contiguous()
        self._changed: set[int] = set()

    def grow(self, slots: int) -> None:
        """Make room for more slots."""
        new = self.base.expand(slots, -1).contiguous()
        new[: len(self.vectors)] = self.vectors
        self.vectors = new

    def put(self, slot: int, vector: torch.Tensor | None) -> bool:
        """Set or forget one slot's vector; gives whether any slot still changes it."""
        self.vectors[slot] = self.base if vector is None else vector
        if vector is None:
            self._changed.discard(slot)
        else:
            self._changed.add(slot)
        return bool(self._changed)

    @property
    def changed(self) -> torch.Tensor:
        """Bool `(slots,)`: which slots have a vector of their own."""
        mask = torch.zeros(len(self.vectors), dtype=torch.bool)
        mask[sorted(self._changed)] = True
        return mask
