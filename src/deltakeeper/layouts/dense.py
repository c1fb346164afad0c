"""The `dense` layout: every entry, either of the difference or of the fine-tuned tensor itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from deltakeeper.layouts.base import Layout, Settings, TensorSpec, register_layout
from deltakeeper.layouts.settings import (
    FLOAT_DTYPES,
    VALUE_DTYPES,
    SettingsReader,
    check_finite,
    check_shape,
    dtype_name,
)


@register_layout()
@dataclass(frozen=True, eq=False)
class Dense(Layout):
    """An uncompressed term of any shape.

    Attributes:
        encoding: `delta` (an addend) or `value` (the fine-tuned tensor, which replaces the base's).
        stored: the entries; a delta is float16, bfloat16 or float32, a value has the checkpoint's own dtype.
    """

    name: ClassVar[str] = "dense"
    summary: ClassVar[str] = "every entry, uncompressed"

    encoding: str
    stored: torch.Tensor

    @property
    def replaces(self) -> bool:
        """Whether the term is the fine-tuned value itself."""
        return self.encoding == "value"

    def tensors(self) -> dict[str, torch.Tensor]:
        """`delta`."""
        return {"delta": self.stored}

    def settings(self) -> Settings:
        """`encoding` and `dtype`."""
        return {"encoding": self.encoding, "dtype": dtype_name(self.stored.dtype)}

    @classmethod
    def expect(cls, shape: tuple[int, ...], settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """See `Layout.expect`."""
        check_shape(cls.name, shape)
        read = SettingsReader(cls.name, settings)
        dtypes = FLOAT_DTYPES if read.choice("encoding", ("delta", "value")) == "delta" else VALUE_DTYPES
        return {"delta": TensorSpec(dtypes[read.choice("dtype", tuple(dtypes))], tuple(shape))}

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, ...], settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> Self:
        """See `Layout.from_tensors`."""
        cls.check_payload(shape, settings, tensors)
        check_finite(cls.name, tensors)
        return cls(tuple(shape), settings["encoding"], tensors["delta"])

    def to_dense(self) -> torch.Tensor:
        """A copy: float32 of a delta, the stored dtype of a value."""
        return self.stored.to(self.stored.dtype if self.replaces else torch.float32, copy=True)

    def continuous(self) -> dict[str, torch.Tensor]:
        """Every entry, `delta`, where they are floating-point numbers."""
        return {"delta": self.stored.float()} if self.stored.is_floating_point() else {}

    def dense_from(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Layout.dense_from`."""
        return values["delta"]

    def replace_continuous(self, values: Mapping[str, torch.Tensor]) -> Self:
        """See `Layout.replace_continuous`."""
        stored = values["delta"].detach().to(self.stored.dtype).contiguous()
        check_finite(self.name, {"delta": stored})
        return replace(self, stored=stored)
