"""Controls: what is not compression but must stand beside it, so that a claim names its cause."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch

from deltakeeper.codecs.base import Codec, Inputs, register_codec
from deltakeeper.codecs.bitdelta import BitDelta
from deltakeeper.codecs.fields import MAX_SEED, check_range, check_types
from deltakeeper.codecs.matrices import checked, peak
from deltakeeper.errors import CodecError
from deltakeeper.layouts.base import Layout
from deltakeeper.layouts.dense import Dense
from deltakeeper.layouts.philox import seeded_mask
from deltakeeper.layouts.signs import Signs


@register_codec()
@dataclass(frozen=True)
class Shrink(Codec):
    """`factor * delta`: rules out that a codec only took a smaller step (arXiv 2412.19512 merges like this).

    Attributes:
        factor: length of the step, 0 to 16.
    """

    name: ClassVar[str] = "shrink"
    title: ClassVar[str] = "Plain shrinking"
    summary: ClassVar[str] = "the whole delta times one factor"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.19512"
    control: ClassVar[bool] = True
    boxless: ClassVar[str] = "every entry is stored, so no two deltas are alike to it"

    factor: float = 0.5

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "factor", 0, 16)

    def payload_bytes(self, shape: tuple[int, int]) -> int:
        """See `Codec.payload_bytes`."""
        return 4 * math.prod(shape)

    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """See `Codec.encode`; one dense float32 term."""
        scaled = checked(delta, name) * self.factor
        if not np.isfinite(peak(scaled)):
            raise CodecError(f"'{name}' times {self.factor:g} overflows float32; choose a smaller 'factor'.")
        return [Dense(tuple(scaled.shape), "delta", scaled)]


@register_codec()
@dataclass(frozen=True)
class RandomSign(Codec):
    """Independent random signs with BitDelta's scale: rules out that any noise of that size has the effect.

    Attributes:
        scale: one mean absolute delta per tensor, per row (output) or per column (input).
        zero: as in `bitdelta`, for the same reason: exact zeros stay zero where its plane leaves them so.
        norm: length relative to the delta's, which makes it a control for any codec whose `norm_ratio` is known; none
            for the length of the BitDelta plane.
        seed: with the tensor's name it decides the signs.
    """

    name: ClassVar[str] = "random_sign"
    title: ClassVar[str] = "Random signs"
    summary: ClassVar[str] = "random signs times the mean absolute delta, as large as one BitDelta plane"
    paper: ClassVar[str] = ""
    control: ClassVar[bool] = True
    boxless: ClassVar[str] = "a control: nothing of an attack but its size survives it"

    scale: Literal["tensor", "row", "column"] = "tensor"
    zero: Literal["auto", "plus", "minus", "zero"] = "auto"
    norm: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "norm", 0, 16, above=True)
        check_range(self, "seed", 0, MAX_SEED)

    def payload_bytes(self, shape: tuple[int, int]) -> int | None:
        """See `Codec.payload_bytes`."""
        return self._plane.payload_bytes(shape)

    def expected_bytes(self, shape: tuple[int, int]) -> int:
        """See `Codec.expected_bytes`."""
        return self._plane.expected_bytes(shape)

    @property
    def _plane(self) -> BitDelta:
        return BitDelta(bits=1, scale=self.scale, zero=self.zero)

    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """See `Codec.encode`; one `signs` term."""
        values = checked(delta, name)
        (plane,) = self._plane.encode(values, name=name)
        assert isinstance(plane, Signs)
        signs = seeded_mask((values.shape[0], values.shape[1]), seed=self.seed, name=name, keep=0.5)
        if plane.nonzero is not None:
            signs &= plane.nonzero
        found = replace(plane, packed=(signs,))
        if self.norm is not None and bool(values.any()):
            longer = self.norm * _length(values) / _length(found.to_dense())
            found = replace(found, scales=(found.scales[0] * longer,))
        if not bool(torch.isfinite(found.scales[0]).all()):
            raise CodecError(f"the scale of '{name}' overflows float32; choose a smaller 'norm'.")
        return [found]


def _length(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
