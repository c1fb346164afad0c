"""DARE and DAREx-q: drop entries at random and scale up what is left.

Yu et al., "Language Models are Super Mario", ICML 2024, https://arxiv.org/abs/2311.03099; the free rescale `1/q` is
Deng et al., ICLR 2025, https://arxiv.org/abs/2410.09344.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from deltakeeper.codecs.base import Codec, Inputs, register_codec
from deltakeeper.codecs.cells import Cells
from deltakeeper.codecs.fields import MAX_SEED, check_range, check_types
from deltakeeper.codecs.grid import Grid
from deltakeeper.codecs.matrices import checked
from deltakeeper.codecs.rescale import bound_q, least_error_q
from deltakeeper.errors import CodecError, LayoutError
from deltakeeper.layouts.base import Layout
from deltakeeper.layouts.bits import unpack_bits
from deltakeeper.layouts.codes import code_words
from deltakeeper.layouts.masks import SeedMask, gather
from deltakeeper.layouts.settings import FLOAT_DTYPES
from deltakeeper.layouts.sparse import Sparse

MAX_DROP = 0.9999
INT_BITS = {"int8": 8, "int4": 4}


@register_codec()
@dataclass(frozen=True)
class Dare(Codec):
    """`mask * delta / (1 - p)` with a mask that is drawn again from the seed and so costs no bytes.

    The result is unbiased, but its expected squared relative error is `p / (1 - p)`; with another divisor `q` it is
    `(1 - p)(1/q - 1)^2 + p`.

    Attributes:
        p: share of the entries to drop, 0 to 0.9999.
        q: divide kept entries by this instead of by `1 - p` (DAREx-q); 1 leaves them as they are.
        fit_q: find `q` for each tensor: `error` for the least expected squared error of the layer's outputs (closed
            form), or `bound` as in the paper (option "analytic"). Both use the layer's inputs; without calibration both
            take the least expected error of the weights, which is at `q = 1`.
        eta: the paper's balance within `bound`, above 0.
        values: how kept entries are stored: a float dtype, or whole numbers of 8 or 4 bits with one scale per tensor.
        seed: with the tensor's name it decides the mask.
    """

    name: ClassVar[str] = "dare"
    title: ClassVar[str] = "DARE"
    summary: ClassVar[str] = "a random share of the entries, scaled up, with the mask as a seed"
    paper: ClassVar[str] = "https://arxiv.org/abs/2311.03099"

    p: float = 0.9
    q: float | None = None
    fit_q: Literal["error", "bound"] | None = None
    eta: float = 0.45
    values: Literal["float16", "bfloat16", "float32", "int8", "int4"] = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "p", 0, MAX_DROP)
        check_range(self, "q", 0, 1, above=True)
        check_range(self, "eta", 0, 1e9, above=True)
        check_range(self, "seed", 0, MAX_SEED)
        if self.q is not None and self.fit_q is not None:
            raise CodecError("codec 'dare' takes 'q' or 'fit_q', not both; leave one out.")

    @property
    def uses_inputs(self) -> bool:
        """Whether `q` is to be found."""
        return self.fit_q is not None

    @property
    def unbiased(self) -> bool:
        """See `Codec.unbiased`."""
        return self.q is None and self.fit_q is None

    @property
    def row_by_row(self) -> bool:
        """See `Codec.row_by_row`."""
        return self.values in FLOAT_DTYPES

    def expected_bytes(self, shape: tuple[int, int]) -> int:
        """See `Codec.expected_bytes`; the draw decides how many entries are kept."""
        kept = round((1.0 - self.p) * math.prod(shape))
        if self.values in FLOAT_DTYPES:
            return 4 + kept * FLOAT_DTYPES[self.values].itemsize
        return 4 + 4 * code_words(kept, INT_BITS[self.values])

    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """See `Codec.encode`; one `sparse` term."""
        matrix = checked(delta, name)
        recipe = SeedMask(self.seed, name, 1.0 - self.p)
        factor = 1.0 / self._divisor(matrix, inputs)
        try:
            if self.values in FLOAT_DTYPES:
                return [Sparse.from_matrix(matrix, recipe, self.values, factor=factor)]
            return [_rounded(matrix, recipe, INT_BITS[self.values], factor)]
        except LayoutError as error:
            raise CodecError(f"rescaling '{name}' by {factor:g} overflows float32; set 'q' to 1.") from error

    def box(self, delta: torch.Tensor, *, name: str) -> Cells:
        """Entries that the seed drops are free; kept ones stay as they are, or as whole numbers in their cell."""
        matrix = checked(delta, name)
        kept = unpack_bits(self._mask(matrix, name), matrix.shape[1])
        if self.values in FLOAT_DTYPES:
            return Cells.holding(matrix, kept, torch.inf)
        size = matrix.abs().masked_fill(~kept, 0.0)
        largest = float(size.max())
        low, high = Grid.symmetric(largest, INT_BITS[self.values]).cells(matrix)
        low, high = low.clamp(min=-largest), high.clamp(max=largest)
        fixed = kept & (size == largest)
        low, high = torch.where(fixed, matrix, low), torch.where(fixed, matrix, high)
        return Cells.around(matrix, low.masked_fill(~kept, -torch.inf), high.masked_fill(~kept, torch.inf))

    def _mask(self, matrix: torch.Tensor, name: str) -> torch.Tensor:
        return SeedMask(self.seed, name, 1.0 - self.p).words((matrix.shape[0], matrix.shape[1]))

    def _divisor(self, matrix: torch.Tensor, inputs: Inputs | None) -> float:
        if self.fit_q == "bound" and inputs is not None:
            return bound_q(matrix, self.p, inputs.mean, self.eta)
        if self.fit_q is not None:
            return least_error_q(matrix, self.p, inputs)
        return 1.0 - self.p if self.q is None else self.q


def _rounded(matrix: torch.Tensor, recipe: SeedMask, bits: int, factor: float) -> Sparse:
    """Kept entries rounded to nearest, with one scale from the largest of them."""
    words = recipe.words((matrix.shape[0], matrix.shape[1]))
    grid = Grid.symmetric(float(np.abs(gather(matrix.numpy(), words)).max(initial=0.0)), bits)
    scale = torch.tensor([grid.step * factor], dtype=torch.float64).float()
    return Sparse.from_codes(grid.codes(matrix), scale, recipe, bits=bits, zero_point=grid.zero_point)
