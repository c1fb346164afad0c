"""ComPEFT: the largest entries of a delta as signs with one magnitude.

Yadav et al., "ComPEFT: Compression for Communicating Parameter Efficient Updates via Sparsification and Quantization",
2023, https://arxiv.org/abs/2311.13171.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from deltakeeper.codecs.base import Codec, Inputs, register_codec
from deltakeeper.codecs.box import MARGIN
from deltakeeper.codecs.cells import Cells, Means
from deltakeeper.codecs.fields import check_range, check_types
from deltakeeper.codecs.largest import box_of_largest, kept_of, largest_of_tensor
from deltakeeper.codecs.matrices import checked
from deltakeeper.errors import CodecError
from deltakeeper.layouts.base import Layout
from deltakeeper.layouts.bits import row_blocks, unpack_bits
from deltakeeper.layouts.codes import code_words
from deltakeeper.layouts.masks import best_mask, expected_mask_bytes, gather
from deltakeeper.layouts.sparse import Sparse


@register_codec()
@dataclass(frozen=True)
class ComPeft(Codec):
    """`magnitude * sign(delta)` at the largest entries, zero elsewhere.

    The mask is stored as bits or as gaps, so a share `keep` costs about `min(1, 8 keep) + keep` bits per weight. The
    paper takes its threshold and its standard deviation over the whole flattened fine-tune; here both are of each
    tensor, so that tensors stay independent of each other.

    Attributes:
        keep: share of the entries to keep, above 0 and at most 1, rounded up to whole entries; exact zeros never are.
        scale: the magnitude: `mean` of the kept entries, which has the least squared error, or `std` of the whole delta
            as in the paper.
        alpha: multiplies the magnitude; the paper chooses it on validation data. Above 0, at most 100.
    """

    name: ClassVar[str] = "compeft"
    title: ClassVar[str] = "ComPEFT"
    summary: ClassVar[str] = "the signs of the entries that changed most, times one magnitude"
    paper: ClassVar[str] = "https://arxiv.org/abs/2311.13171"

    keep: float = 0.1
    scale: Literal["mean", "std"] = "mean"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "keep", 0, 1, above=True)
        check_range(self, "alpha", 0, 100, above=True)

    @property
    def row_by_row(self) -> bool:
        """See `Codec.row_by_row`."""
        return True

    def expected_bytes(self, shape: tuple[int, int]) -> int:
        """See `Codec.expected_bytes`; fewer where the delta has fewer entries that are not zero."""
        kept = kept_of(math.prod(shape), self.keep)
        return 4 + 4 * code_words(kept, 1) + expected_mask_bytes(shape, kept)

    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """See `Codec.encode`; one `sparse` term of signs."""
        matrix = checked(delta, name)
        words = largest_of_tensor(matrix.numpy(), self.keep)
        if self.scale == "mean":
            kept = gather(matrix.numpy(), words)
            magnitude = float(np.abs(kept).mean(dtype=np.float64)) if kept.size else 0.0
        else:
            magnitude = _std(matrix.numpy())
        magnitude *= self.alpha
        if not 0.0 <= magnitude <= float(np.finfo(np.float32).max):
            raise CodecError(f"the magnitude of '{name}' overflows float32; choose a smaller 'alpha'.")
        return [Sparse.from_signs(matrix, best_mask(words, matrix.shape[1]), magnitude)]

    def box(self, delta: torch.Tensor, *, name: str) -> Cells | None:
        """Kept entries keep their sign and their mean magnitude and stay largest; none with `scale=std`."""
        if self.scale == "std":
            return None
        matrix = checked(delta, name)
        kept = unpack_bits(largest_of_tensor(matrix.numpy(), self.keep), matrix.shape[1])
        pruned = box_of_largest(matrix, kept, kept_of(matrix.numel(), self.keep), by_row=False)
        plus, minus = kept & (matrix > 0), kept & (matrix < 0)
        least = float(matrix.abs().masked_fill(~kept, torch.inf).min()) if bool(kept.any()) else 0.0
        least *= 1 + MARGIN  # none comes down to a dropped entry that ties with the least kept one
        low = pruned.low.masked_fill(plus, least).masked_fill_(minus, -torch.inf)
        high = pruned.high.masked_fill(minus, -least).masked_fill_(plus, torch.inf)
        return Cells.around(matrix, low, high, Means(plus.to(torch.int8) - minus.to(torch.int8), "tensor"))


def _std(values: NDArray[np.float32]) -> float:
    """Standard deviation of all entries, summed in float64 block by block."""
    mean = float(values.mean(dtype=np.float64))
    squares = sum(
        float(np.square(values[rows] - np.float64(mean)).sum()) for rows in row_blocks(values.shape[0], values.shape[1])
    )
    return math.sqrt(squares / values.size)
