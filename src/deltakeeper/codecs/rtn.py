"""Round to nearest: every entry becomes a whole number of a few bits, with a scale for each group of neighbours.

The usual baseline of weight quantisation, with the grid of GPTQ and compressed-tensors; Frantar et al., "GPTQ: Accurate
Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023, https://arxiv.org/abs/2210.17323.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltakeeper.codecs.base import Codec, Inputs, register_codec
from deltakeeper.codecs.box import MARGIN
from deltakeeper.codecs.cells import Cells
from deltakeeper.codecs.fields import check_range, check_types
from deltakeeper.codecs.matrices import checked
from deltakeeper.errors import CodecError, LayoutError
from deltakeeper.layouts.base import Layout
from deltakeeper.layouts.grouped_int import MAX_GROUP, GroupedInt
from deltakeeper.layouts.groups import spread_groups


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

    def box(self, delta: torch.Tensor, *, name: str) -> Cells:
        """Entries stay in the cell of their code, and those that set the scale of their group as they are."""
        matrix = checked(delta, name)
        (term,) = self.encode(matrix, name=name)
        assert isinstance(term, GroupedInt)
        least, largest = group_extremes(matrix, self.group, symmetric=self.symmetric)
        step = torch.from_numpy(spread_groups(term.steps, self.group, matrix.shape[1]))
        code = torch.from_numpy(term.numbers())
        low = torch.maximum((code - (0.5 - MARGIN)) * step, least)
        high = torch.minimum((code + (0.5 - MARGIN)) * step, largest)
        fixed = (matrix == least) | (matrix == largest)
        return Cells.around(matrix, torch.where(fixed, matrix, low), torch.where(fixed, matrix, high))


def group_extremes(matrix: torch.Tensor, group: int, *, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest entry of each entry's group with zero among them, or `∓` the largest magnitude.

    Float32 `(out, in)` each.
    """
    columns = matrix.shape[1]
    width = group or columns
    groups = torch.nn.functional.pad(matrix, (0, -columns % width)).view(len(matrix), -1, width)
    least, largest = (
        end.clamp(**{side: 0.0}) for end, side in zip(torch.aminmax(groups, dim=2), ("max", "min"), strict=True)
    )
    if symmetric:
        largest = torch.maximum(largest, -least)
        least = -largest
    spread = (torch.from_numpy(spread_groups(end, group, columns)).expand(matrix.shape) for end in (least, largest))
    return next(spread), next(spread)
