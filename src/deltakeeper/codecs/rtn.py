"""Round to nearest: every entry becomes a whole number of a few bits, with a scale for each group of neighbours.

The usual baseline of weight quantisation, with the grid of GPTQ and compressed-tensors; Frantar et al., "GPTQ: Accurate
Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023, https://arxiv.org/abs/2210.17323.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltakeeper.codecs.base import Codec, Inputs, register_codec
from deltakeeper.codecs.fields import check_range, check_types
from deltakeeper.codecs.matrices import checked
from deltakeeper.errors import CodecError, LayoutError
from deltakeeper.layouts.base import Layout
from deltakeeper.layouts.grouped_int import MAX_GROUP, GroupedInt


@register_codec()
@dataclass(frozen=True)
class Rtn(Codec):
    """`s * clamp(round(delta / s))` for each group, with `s = max|delta| / (2^(bits-1) - 1/2)`.

    Exact zeros stay zero. One bit is `bitdelta`'s.

    Attributes:
        bits: 2 to 8.
        group: neighbours along a row that share a scale, 0 for whole rows; a scale costs `16 / group` bits per weight.
        symmetric: codes from `-2^(bits-1)` to `2^(bits-1) - 1`. Else the codes span the group's own range, stretched to
            contain zero, and a zero point of 8 bits is stored with each scale.
        scale: dtype of the scales; float16 ones are relative to one float32 number of the tensor.
    """

    name: ClassVar[str] = "rtn"
    title: ClassVar[str] = "Round to nearest"
    summary: ClassVar[str] = "every entry as a whole number of a few bits, with a scale per group"
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.17323"

    bits: int = 4
    group: int = 128
    symmetric: bool = True
    scale: Literal["float16", "float32"] = "float16"

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "bits", 2, 8)
        check_range(self, "group", 0, MAX_GROUP)

    @property
    def row_by_row(self) -> bool:
        """See `Codec.row_by_row`."""
        return True

    def payload_bytes(self, shape: tuple[int, int]) -> int:
        """See `Codec.payload_bytes`."""
        return GroupedInt.payload_bytes(shape, self.bits, self.group, symmetric=self.symmetric, scale_dtype=self.scale)

    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """See `Codec.encode`; one `grouped_int` term."""
        matrix = checked(delta, name)
        try:
            term = GroupedInt.from_matrix(
                matrix, self.bits, self.group, symmetric=self.symmetric, scale_dtype=self.scale
            )
        except LayoutError as error:
            raise CodecError(f"the scales of '{name}' leave float32; leave this tensor dense.") from error
        if not bool(term.scale.any()) and bool(matrix.any()):
            raise CodecError(f"the scales of '{name}' underflow to zero; leave this tensor dense.")
        return [term]
