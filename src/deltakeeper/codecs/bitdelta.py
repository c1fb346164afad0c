"""BitDelta: the sign of every weight times the mean absolute delta, repeated on what is left over.

Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit", NeurIPS 2024, https://arxiv.org/abs/2402.10193.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltakeeper.codecs.base import Codec, Inputs, RowEncoder, register_codec
from deltakeeper.codecs.box import Box
from deltakeeper.codecs.fields import check_range, check_types
from deltakeeper.codecs.matrices import checked
from deltakeeper.codecs.planes import PlaneRows, Scale, Zero, choose_zero_rule, fit_planes, sample_step
from deltakeeper.codecs.sign_box import sign_box
from deltakeeper.errors import CodecError
from deltakeeper.layouts.base import Layout
from deltakeeper.layouts.bits import words_per_row
from deltakeeper.layouts.signs import Signs, scale_shape


@register_codec()
@dataclass(frozen=True)
class BitDelta(Codec):
    """Sign planes: `W_k = W_{k-1} + a_k sign(W_tuned - W_{k-1})` with `a_k = mean |W_tuned - W_{k-1}|`, in float32.

    Attributes:
        bits: number of planes, 1 to 8.
        scale: one mean per tensor, per row (output) or per column (input).
        zero: the sign of an exact zero: `plus` (as in the released code), `minus` (as in the paper), `zero` (it
            stays zero, which costs one mask bit per weight, and means are over non-zeros), or `auto`: `zero` for
            the tensors whose error the mask lowers more than a second plane, which costs as much, and `plus` for
            the others. The choice does not depend on `bits`.
    """

    name: ClassVar[str] = "bitdelta"
    title: ClassVar[str] = "BitDelta"
    summary: ClassVar[str] = "one sign bit per weight and plane, times the mean absolute delta"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.10193"

    bits: int = 1
    scale: Scale = "tensor"
    zero: Literal["auto", "plus", "minus", "zero"] = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "bits", 1, 8)

    def payload_bytes(self, shape: tuple[int, int]) -> int | None:
        """See `Codec.payload_bytes`; with the zero rule `auto` the data decide on a mask."""
        return None if self.zero == "auto" else self.expected_bytes(shape)

    def expected_bytes(self, shape: tuple[int, int]) -> int:
        """See `Codec.expected_bytes`; without a mask where the rule is `auto`."""
        plane = 4 * shape[0] * words_per_row(shape[1])
        scale = 4 * math.prod(scale_shape(shape, self.scale))
        return self.bits * (plane + scale) + (plane if self.zero == "zero" else 0)

    @property
    def row_by_row(self) -> bool:
        """See `Codec.row_by_row`."""
        return True

    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """See `Codec.encode`; one `signs` term."""
        values = checked(delta, name)
        zero: Zero
        if self.zero == "auto":
            zero = choose_zero_rule(values[:: sample_step(*values.shape)], self.scale, bool(values.any()))
        else:
            zero = self.zero
        term = fit_planes(values, self.bits, self.scale, zero)
        if not any(bool(scale.any()) for scale in term.scales) and bool(values.any()):
            raise CodecError(f"the scale of '{name}' underflows to zero; leave this tensor dense.")
        return [term]

    def box(self, delta: torch.Tensor, *, name: str) -> Box:
        """Every entry keeps its signs and every scale its mean magnitude; with the zero rule `auto` zeros stay zero."""
        values = checked(delta, name)
        (term,) = self.encode(values, name=name)
        assert isinstance(term, Signs)
        return sign_box(values, term, auto=self.zero == "auto")

    def encode_rows(self, shape: tuple[int, int], *, name: str) -> RowEncoder | None:
        """See `Codec.encode_rows`; for one plane with a scale per tensor or row."""
        if self.bits > 1 or self.scale == "column":
            return None
        return PlaneRows(shape, self.scale, None if self.zero == "auto" else self.zero, name)
