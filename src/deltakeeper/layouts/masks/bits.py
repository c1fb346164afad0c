"""Masks of one bit per entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from deltakeeper.errors import LayoutError
from deltakeeper.layouts.base import Settings, TensorSpec
from deltakeeper.layouts.bits import count_bits, padding_is_clear, words_per_row
from deltakeeper.layouts.masks.base import Mask, check_count


@dataclass(frozen=True, eq=False)
class BitMask(Mask):
    """One bit per entry: int32 `(out, ceil(in/32))`."""

    kind: ClassVar[str] = "bits"

    packed: torch.Tensor

    def words(self, shape: tuple[int, int]) -> torch.Tensor:
        """The packed bits as they are."""
        return self.packed

    def tensors(self) -> dict[str, torch.Tensor]:
        """`delta_bitmask`."""
        return {"delta_bitmask": self.packed}

    def settings(self) -> Settings:
        """None."""
        return {}

    @classmethod
    def expect(cls, shape: tuple[int, int], nnz: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """See `Mask.expect`."""
        return {"delta_bitmask": TensorSpec(torch.int32, (shape[0], words_per_row(shape[1])))}

    @classmethod
    def from_tensors(cls, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        """See `Mask.from_tensors`."""
        return cls(tensors["delta_bitmask"])

    def check(self, shape: tuple[int, int], nnz: int) -> None:
        """See `Mask.check`."""
        if not padding_is_clear(self.packed, shape[1]):
            raise LayoutError(
                "payload 'delta_bitmask' of layout 'sparse' has padding bits set; the artifact is damaged."
            )
        check_count(nnz, count_bits(self.packed))
