"""The `lowrank` layout: a product of two thin factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from deltakeeper.errors import LayoutError
from deltakeeper.layouts.base import Layout, Settings, TensorSpec, register_layout
from deltakeeper.layouts.gain import split_gain
from deltakeeper.layouts.settings import (
    FLOAT_DTYPES,
    SettingsReader,
    check_finite,
    check_matrix_shape,
    dtype_name,
)


@register_layout()
@dataclass(frozen=True, eq=False)
class Lowrank(Layout):
    """`gain * U @ V`, computed in float32 whatever the factors' dtype.

    Attributes:
        left: U `(out, rank)`, float16, bfloat16 or float32.
        right: V `(rank, in)`, same dtype.
        gain: float32 `(1,)`, so that half-precision factors hold deltas of any magnitude.
    """

    name: ClassVar[str] = "lowrank"
    summary: ClassVar[str] = "two thin factors whose product is the term"

    left: torch.Tensor
    right: torch.Tensor
    gain: torch.Tensor

    @classmethod
    def from_factors(cls, left: torch.Tensor, right: torch.Tensor, factors: str) -> Self:
        """Pack `left @ right`.

        Args:
            left: float32 `(out, rank)`.
            right: float32 `(rank, in)`.
            factors: dtype to store, one of float16, bfloat16, float32.

        Raises:
            LayoutError: the product's magnitude does not fit float32.
        """
        dtype = FLOAT_DTYPES[factors]
        stored_left, gain_left = split_gain(left, dtype)
        stored_right, gain_right = split_gain(right, dtype)
        gain = torch.tensor([gain_left * gain_right], dtype=torch.float32)
        term = cls((left.shape[0], right.shape[1]), stored_left, stored_right, gain)
        check_finite(cls.name, term.tensors())
        if gain.item() == 0.0:
            raise LayoutError("the gain of a low-rank term underflows to zero; leave this tensor dense.")
        return term

    @property
    def rank(self) -> int:
        """Number of columns of U."""
        return self.left.shape[1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """`delta_U`, `delta_V`, `delta_gain`."""
        return {"delta_U": self.left, "delta_V": self.right, "delta_gain": self.gain}

    def settings(self) -> Settings:
        """`rank` and the dtype of the `factors`."""
        return {"rank": self.rank, "factors": dtype_name(self.left.dtype)}

    @classmethod
    def expect(cls, shape: tuple[int, ...], settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """See `Layout.expect`."""
        out, columns = check_matrix_shape(cls.name, shape)
        read = SettingsReader(cls.name, settings)
        rank = read.integer("rank", 1, min(out, columns))
        dtype = FLOAT_DTYPES[read.choice("factors", tuple(FLOAT_DTYPES))]
        return {
            "delta_U": TensorSpec(dtype, (out, rank)),
            "delta_V": TensorSpec(dtype, (rank, columns)),
            "delta_gain": TensorSpec(torch.float32, (1,)),
        }

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, ...], settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> Self:
        """See `Layout.from_tensors`."""
        cls.check_payload(shape, settings, tensors)
        check_finite(cls.name, tensors)
        return cls(tuple(shape), tensors["delta_U"], tensors["delta_V"], tensors["delta_gain"])

    def to_dense(self) -> torch.Tensor:
        """`gain * U @ V` in float32; the summation order is the matrix product's own."""
        return (self.left.float() @ self.right.float()).mul_(self.gain)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ termᵀ` through the factors: `(..., in) -> (..., rank) -> (..., out)`."""
        return (x.float() @ self.right.float().T) @ self.left.float().T * self.gain
