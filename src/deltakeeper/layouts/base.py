"""The contract of a layout: how one term of a compressed delta lies in memory and becomes a matrix again.

A layout knows nothing of the codec that made it. The artifact, the merge and the kernels know layouts only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import torch

from deltakeeper.errors import LayoutError

Settings = dict[str, Any]


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape that a payload tensor must have, known before a byte of it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Layout(ABC):
    """One term of a delta, packed. Terms of one tensor add up to the delta.

    Attributes:
        shape: shape of the dense term; `(out, in)` for every layout but `dense`, which takes any shape.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    shape: tuple[int, ...]

    @property
    def exact(self) -> bool:
        """Whether every machine decodes it to the same bytes; the order of summation of matrix products differs."""
        return True

    @property
    def replaces(self) -> bool:
        """Whether `to_dense` gives the fine-tuned value itself instead of an addend (only `dense` may)."""
        return False

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """Payload tensors by suffix, as they are written to disk (contiguous, on the CPU)."""

    @abstractmethod
    def settings(self) -> Settings:
        """JSON settings needed beside `shape` to read the payload back."""

    @classmethod
    @abstractmethod
    def expect(cls, shape: tuple[int, ...], settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """Payload that `shape` and `settings` demand, so that a reader can refuse before it allocates.

        Raises:
            LayoutError: a setting is missing, of the wrong type or out of range.
        """

    @classmethod
    @abstractmethod
    def from_tensors(
        cls, shape: tuple[int, ...], settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> Self:
        """Rebuild a term from its payload.

        Raises:
            LayoutError: a tensor is missing or unexpected, of wrong dtype or shape, not finite, or its
                padding bits are not zero.
        """

    @abstractmethod
    def to_dense(self) -> torch.Tensor:
        """The term as a dense tensor of `shape`, float32 (or the stored dtype where it `replaces`)."""

    def merge_rows(self, base: torch.Tensor | None, rows: slice, into: torch.Tensor) -> bool:
        """Write the rows `base + term` into a block, summed in float32 and rounded once, without a dense matrix.

        Args:
            base: `(rows, in)`, or None for zero.
            rows: which rows of the term.
            into: `(rows, in)`, contiguous, overwritten.

        Returns:
            False where this layout has no such pass for these dtypes, and nothing was written.
        """
        return False

    def continuous(self) -> dict[str, torch.Tensor]:
        """Values that may be trained, float32, by suffix: scales, factors, kept entries. None of them by default."""
        return {}

    def dense_from(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`to_dense` with other values in the place of `continuous`, float32, and differentiable in them.

        Raises:
            LayoutError: the layout has no continuous values.
        """
        raise LayoutError(f"layout '{self.name}' has nothing that can be trained.")

    def replace_continuous(self, values: Mapping[str, torch.Tensor]) -> Self:
        """The same term with other values, rounded to the dtypes that it stores.

        Raises:
            LayoutError: the layout has no continuous values, or one does not fit its dtype.
        """
        raise LayoutError(f"layout '{self.name}' has nothing that can be trained.")

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ termᵀ` in float32: `(..., in) -> (..., out)`."""
        return x.float() @ self.to_dense().float().T

    @property
    def nbytes(self) -> int:
        """Payload bytes, counted from the packed tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @classmethod
    def check_payload(
        cls, shape: tuple[int, ...], settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Compare `tensors` with `expect`; raises LayoutError naming the first difference."""
        expected = cls.expect(shape, settings)
        for suffix in sorted(set(expected) ^ set(tensors)):
            state = "missing" if suffix in expected else "unexpected"
            raise LayoutError(f"payload '{suffix}' of layout '{cls.name}' is {state}; the artifact is damaged.")
        for suffix, spec in expected.items():
            got = tensors[suffix]
            if got.dtype != spec.dtype or tuple(got.shape) != spec.shape:
                raise LayoutError(
                    f"payload '{suffix}' of layout '{cls.name}' is {got.dtype} {tuple(got.shape)} but must "
                    f"be {spec.dtype} {spec.shape}; the artifact is damaged."
                )


LAYOUTS: dict[str, type[Layout]] = {}
L = TypeVar("L", bound=type[Layout])


def register_layout() -> Callable[[L], L]:
    """Class decorator: make a layout known by its `name`."""

    def add(cls: L) -> L:
        if cls.name in LAYOUTS:
            raise ValueError(f"layout '{cls.name}' is registered twice")
        LAYOUTS[cls.name] = cls
        return cls

    return add
