"""The `signs` layout: planes of one bit per weight with a scale, coarse to fine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch

from deltakeeper.errors import LayoutError
from deltakeeper.layouts.base import Layout, Settings, TensorSpec, register_layout
from deltakeeper.layouts.bits import (
    byte_view,
    is_subset,
    padding_is_clear,
    row_blocks,
    unpack_bits,
    unpack_rows,
    words_per_row,
)
from deltakeeper.layouts.settings import SettingsReader, check_finite, check_matrix_shape
from deltakeeper.native import KINDS, merge_signs

MAX_PLANES = 16
SCALES = ("tensor", "row", "column")
ZERO_RULES = ("plus", "minus", "zero")


def scale_shape(shape: tuple[int, int], scale: str) -> tuple[int, ...]:
    """Shape of one plane's scale: `(1,)` per tensor, `(out, 1)` per row, `(1, in)` per column."""
    return {"tensor": (1,), "row": (shape[0], 1), "column": (1, shape[1])}[scale]


@register_layout()
@dataclass(frozen=True, eq=False)
class Signs(Layout):
    """Sum of planes `scale * sign`, bit 1 = plus and bit 0 = minus (arXiv 2402.10193 for the first plane).

    Attributes:
        scale: `tensor`, `row` (one scale per output) or `column` (one per input).
        zero: which sign exact zeros of the delta were given; `zero` means that they stay zero in every plane.
        packed: per plane int32 `(out, ceil(in/32))`.
        scales: per plane float32 in `scale_shape`.
        nonzero: int32 `(out, ceil(in/32))` with `zero="zero"`: bit 1 where the delta is not zero; shared by
            all planes, whose sign bits are 0 wherever its bit is 0.
    """

    name: ClassVar[str] = "signs"
    summary: ClassVar[str] = "one bit per weight and plane, with a scale per tensor, row or column"

    scale: str
    zero: str
    packed: tuple[torch.Tensor, ...]
    scales: tuple[torch.Tensor, ...]
    nonzero: torch.Tensor | None = None

    @property
    def planes(self) -> int:
        """Number of planes."""
        return len(self.packed)

    def with_planes(self, planes: int) -> Self:
        """The coarser term made of the first `planes` planes (shares memory).

        Raises:
            LayoutError: fewer than 1 or more than are stored.
        """
        if not 1 <= planes <= self.planes:
            raise LayoutError(f"{planes} planes were asked for but 1 to {self.planes} are stored; choose one of them.")
        return replace(self, packed=self.packed[:planes], scales=self.scales[:planes])

    def tensors(self) -> dict[str, torch.Tensor]:
        """`delta_packed.k` and `delta_scale.k` per plane, and `delta_nonzero` where zeros stay zero."""
        payload = {f"delta_packed.{k}": words for k, words in enumerate(self.packed)}
        payload |= {f"delta_scale.{k}": scale for k, scale in enumerate(self.scales)}
        return payload if self.nonzero is None else payload | {"delta_nonzero": self.nonzero}

    def settings(self) -> Settings:
        """`planes`, `scale`, `zero`."""
        return {"planes": self.planes, "scale": self.scale, "zero": self.zero}

    @classmethod
    def expect(cls, shape: tuple[int, ...], settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """See `Layout.expect`."""
        out, columns = check_matrix_shape(cls.name, shape)
        read = SettingsReader(cls.name, settings)
        planes = read.integer("planes", 1, MAX_PLANES)
        scale = read.choice("scale", SCALES)
        bits = TensorSpec(torch.int32, (out, words_per_row(columns)))
        payload = {f"delta_packed.{k}": bits for k in range(planes)}
        one_scale = TensorSpec(torch.float32, scale_shape((out, columns), scale))
        payload |= {f"delta_scale.{k}": one_scale for k in range(planes)}
        return payload | ({"delta_nonzero": bits} if read.choice("zero", ZERO_RULES) == "zero" else {})

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, ...], settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> Self:
        """See `Layout.from_tensors`."""
        cls.check_payload(shape, settings, tensors)
        check_finite(cls.name, tensors)
        nonzero = tensors.get("delta_nonzero")
        masks = {suffix: words for suffix, words in tensors.items() if words.dtype == torch.int32}
        for suffix, words in masks.items():
            if not padding_is_clear(words, shape[1]):
                raise LayoutError(
                    f"payload '{suffix}' of layout 'signs' has padding bits set; the artifact is damaged."
                )
        for suffix, words in masks.items():
            if nonzero is not None and not is_subset(words, nonzero):
                raise LayoutError(f"payload '{suffix}' of layout 'signs' gives zeros a sign; the artifact is damaged.")
        planes = range(settings["planes"])
        return cls(
            shape=tuple(shape),
            scale=settings["scale"],
            zero=settings["zero"],
            packed=tuple(tensors[f"delta_packed.{k}"] for k in planes),
            scales=tuple(tensors[f"delta_scale.{k}"] for k in planes),
            nonzero=nonzero,
        )

    def to_dense(self) -> torch.Tensor:
        """The planes summed in float32 in their stored order, so that every run gives the same bits."""
        out, columns = self.shape
        dense = torch.zeros(out, columns)
        if self.merge_rows(None, slice(0, out), dense):
            return dense
        total = dense.numpy()
        for words, scale in zip(self.packed, self.scales, strict=True):
            factors = scale.numpy()
            for rows in row_blocks(out, columns):
                plane = unpack_rows(byte_view(words)[rows], columns).astype(np.float32)
                plane *= np.float32(2)
                plane -= np.float32(1)
                plane *= factors[rows] if self.scale == "row" else factors
                if self.nonzero is not None:
                    plane *= unpack_rows(byte_view(self.nonzero)[rows], columns)
                total[rows] += plane
        return dense

    def merge_rows(self, base: torch.Tensor | None, rows: slice, into: torch.Tensor) -> bool:
        """See `Layout.merge_rows`."""
        if (base is not None and base.dtype not in KINDS) or into.dtype not in KINDS:
            return False
        words = [plane[rows] for plane in self.packed]
        scales = [scale[rows] if self.scale == "row" else scale for scale in self.scales]
        present = None if self.nonzero is None else self.nonzero[rows]
        return merge_signs(words, scales, self.scale, present, base, into)

    def continuous(self) -> dict[str, torch.Tensor]:
        """The scales, `delta_scale.k`."""
        return {f"delta_scale.{k}": scale for k, scale in enumerate(self.scales)}

    def dense_from(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Layout.dense_from`."""
        columns = self.shape[1]
        present = None if self.nonzero is None else unpack_bits(self.nonzero, columns).float()
        total = torch.zeros(self.shape)
        for k, words in enumerate(self.packed):
            signs = unpack_bits(words, columns).float().mul_(2).sub_(1)
            total = total + (signs if present is None else signs.mul_(present)) * values[f"delta_scale.{k}"]
        return total

    def replace_continuous(self, values: Mapping[str, torch.Tensor]) -> Self:
        """See `Layout.replace_continuous`."""
        scales = {suffix: values[suffix].detach().float().contiguous() for suffix in self.continuous()}
        check_finite(self.name, scales)
        return replace(self, scales=tuple(scales.values()))
