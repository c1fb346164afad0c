"""The contract of a mask: one way to store which entries of a matrix are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch

from deltakeeper.errors import LayoutError
from deltakeeper.layouts.base import Settings, TensorSpec


class Mask(ABC):
    """One way to store which entries of an `(out, in)` matrix are kept."""

    kind: ClassVar[str]

    @abstractmethod
    def words(self, shape: tuple[int, int]) -> torch.Tensor:
        """Packed bits, int32 `(out, ceil(in/32))`, padding bits zero."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """Payload by suffix."""

    @abstractmethod
    def settings(self) -> Settings:
        """What a reader needs beside the payload."""

    @classmethod
    @abstractmethod
    def expect(cls, shape: tuple[int, int], nnz: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """Payload of a mask with `nnz` kept entries; raises LayoutError as `Layout.expect` does."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        """The mask of a payload that `expect` has passed."""

    @abstractmethod
    def check(self, shape: tuple[int, int], nnz: int) -> None:
        """Refuse what breaks the rules of this kind, before anything of the matrix's size is allocated.

        Raises:
            LayoutError: says which rule.
        """

    @property
    def nbytes(self) -> int:
        """Payload bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def check_count(stated: int, found: int) -> None:
    """Refuse a stated number of kept entries that is not the mask's."""
    if stated != found:
        raise LayoutError(
            f"layout 'sparse' states {stated} kept entries but its mask has {found}; the artifact is damaged."
        )
