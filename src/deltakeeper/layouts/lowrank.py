"""The `lowrank` layout: a product of two thin factors, as floats or as packed terms of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from deltakeeper.errors import LayoutError
from deltakeeper.layouts.base import Layout, Settings, TensorSpec, register_layout
from deltakeeper.layouts.gain import split_gain
from deltakeeper.layouts.nested import NESTABLE, expect_nested, nested_from_tensors, nested_settings, put_under, under
from deltakeeper.layouts.settings import (
    FLOAT_DTYPES,
    SettingsReader,
    check_finite,
    check_matrix_shape,
    dtype_name,
)

PACKED = "packed"


@register_layout()
@dataclass(frozen=True, eq=False)
class Lowrank(Layout):
    """`gain * U @ V`, computed in float32 whatever the factors' dtype.

    Attributes:
        stored_left: U `(out, rank)`, float16, bfloat16 or float32; or a packed term of its transpose `(rank, out)`.
        stored_right: V `(rank, in)`, same dtype; or a packed term of it.
        gain: float32 `(1,)`, so that half-precision factors hold deltas of any magnitude.
    """

    name: ClassVar[str] = "lowrank"
    summary: ClassVar[str] = "two thin factors whose product is the term"

    stored_left: torch.Tensor | Layout
    stored_right: torch.Tensor | Layout
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

    @classmethod
    def from_terms(cls, left: Layout, right: Layout, gain: float = 1.0) -> Self:
        """Put two packed factors together.

        Args:
            left: term of Uᵀ `(rank, out)`, layout grouped_int, sparse or dense: one row for each rank, as `right`.
            right: term of V `(rank, in)`.
            gain: multiplies the product.

        Raises:
            LayoutError: the ranks differ or are too large, a layout cannot be nested, or the gain leaves float32.
        """
        if left.name not in NESTABLE or right.name not in NESTABLE or left.replaces or right.replaces:
            raise LayoutError(f"factors are terms of the layouts {', '.join(NESTABLE)}; pack them as one of these.")
        if len(left.shape) != 2 or len(right.shape) != 2 or left.shape[0] != right.shape[0]:
            raise LayoutError(f"factors of shapes {left.shape} and {right.shape} have no common rank; both store rows.")
        term = cls((left.shape[1], right.shape[1]), left, right, torch.tensor([gain], dtype=torch.float64).float())
        cls.expect(term.shape, term.settings())
        check_finite(cls.name, {"delta_gain": term.gain})
        if gain != 0.0 and term.gain.item() == 0.0:
            raise LayoutError("the gain of a low-rank term underflows to zero; leave this tensor dense.")
        return term

    @property
    def left(self) -> torch.Tensor:
        """U `(out, rank)`: as it is stored, or unpacked to float32."""
        return self.stored_left if isinstance(self.stored_left, torch.Tensor) else self.stored_left.to_dense().T

    @property
    def right(self) -> torch.Tensor:
        """V `(rank, in)`: as it is stored, or unpacked to float32."""
        return self.stored_right if isinstance(self.stored_right, torch.Tensor) else self.stored_right.to_dense()

    @property
    def packed(self) -> tuple[Layout, Layout] | None:
        """The terms of Uᵀ and V, or None where the factors are floats."""
        left, right = self.stored_left, self.stored_right
        return (left, right) if isinstance(left, Layout) and isinstance(right, Layout) else None

    @property
    def exact(self) -> bool:
        """False: the product of the factors is summed as the machine likes."""
        return False

    @property
    def rank(self) -> int:
        """Number of columns of U."""
        return self.stored_right.shape[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """`delta_U`, `delta_V`, `delta_gain`; of packed factors `delta_U.<suffix>` and `delta_V.<suffix>`."""
        if self.packed is None:
            return {"delta_U": self.left, "delta_V": self.right, "delta_gain": self.gain}
        left, right = self.packed
        factors = put_under("delta_U.", left.tensors()) | put_under("delta_V.", right.tensors())
        return factors | {"delta_gain": self.gain}

    def settings(self) -> Settings:
        """`rank` and the dtype of the `factors`, or `packed` with layout and settings of `left` and `right`."""
        if self.packed is None:
            return {"rank": self.rank, "factors": dtype_name(self.left.dtype)}
        left, right = self.packed
        nested = {"left": nested_settings(left), "right": nested_settings(right)}
        return {"rank": self.rank, "factors": PACKED, **nested}

    @classmethod
    def expect(cls, shape: tuple[int, ...], settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """See `Layout.expect`."""
        out, columns = check_matrix_shape(cls.name, shape)
        read = SettingsReader(cls.name, settings)
        rank = read.integer("rank", 1, min(out, columns))
        factors = read.choice("factors", (*FLOAT_DTYPES, PACKED))
        payload = {"delta_gain": TensorSpec(torch.float32, (1,))}
        if factors == PACKED:
            left = expect_nested(cls.name, "left", settings, (rank, out))
            right = expect_nested(cls.name, "right", settings, (rank, columns))
            return put_under("delta_U.", left) | put_under("delta_V.", right) | payload
        dtype = FLOAT_DTYPES[factors]
        return {"delta_U": TensorSpec(dtype, (out, rank)), "delta_V": TensorSpec(dtype, (rank, columns)), **payload}

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, ...], settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> Self:
        """See `Layout.from_tensors`."""
        cls.check_payload(shape, settings, tensors)
        check_finite(cls.name, tensors)
        gain = tensors["delta_gain"]
        if settings["factors"] != PACKED:
            return cls(tuple(shape), tensors["delta_U"], tensors["delta_V"], gain)
        rank = settings["rank"]
        left = nested_from_tensors("left", settings, (rank, shape[0]), "delta_U.", tensors)
        right = nested_from_tensors("right", settings, (rank, shape[1]), "delta_V.", tensors)
        return cls(tuple(shape), left, right, gain)

    def to_dense(self) -> torch.Tensor:
        """`gain * U @ V` in float32; the summation order is the matrix product's own."""
        return (self.left.float() @ self.right.float()).mul_(self.gain)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ termᵀ` through the factors: `(..., in) -> (..., rank) -> (..., out)`."""
        return (x.float() @ self.right.float().T) @ self.left.float().T * self.gain

    def continuous(self) -> dict[str, torch.Tensor]:
        """The factors `delta_U` and `delta_V`, before their gain; of packed ones what their terms can train."""
        if self.packed is None:
            return {"delta_U": self.left.float(), "delta_V": self.right.float()}
        left, right = self.packed
        return put_under("delta_U.", left.continuous()) | put_under("delta_V.", right.continuous())

    def dense_from(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Layout.dense_from`."""
        if self.packed is None:
            return values["delta_U"] @ values["delta_V"] * self.gain.to(values["delta_V"].device)
        left, right = self.packed
        u, v = left.dense_from(under("delta_U.", values)), right.dense_from(under("delta_V.", values))
        return u.T @ v * self.gain.to(v.device)

    def replace_continuous(self, values: Mapping[str, torch.Tensor]) -> Self:
        """See `Layout.replace_continuous`."""
        if self.packed is None:
            factors = {suffix: values[suffix].detach().to(self.left.dtype) for suffix in ("delta_U", "delta_V")}
            check_finite(self.name, factors)
            return replace(self, stored_left=factors["delta_U"], stored_right=factors["delta_V"])
        left, right = self.packed
        return replace(
            self,
            stored_left=left.replace_continuous(under("delta_U.", values)),
            stored_right=right.replace_continuous(under("delta_V.", values)),
        )
