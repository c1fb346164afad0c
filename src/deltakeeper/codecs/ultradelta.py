"""UltraDelta: few levels, random drops within each level, and more of them where the delta varies less.

Wang et al., "Breaking the Compression Ceiling: Data-Free Pipeline for Ultra-Efficient Delta Compression", NeurIPS 2025,
https://arxiv.org/abs/2505.13563.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch

from deltakeeper.codecs.base import Codec, Inputs, Statistics, register_codec
from deltakeeper.codecs.cells import Cells
from deltakeeper.codecs.fields import MAX_SEED, check_range, check_types
from deltakeeper.codecs.grid import Grid
from deltakeeper.codecs.matrices import checked, peak
from deltakeeper.codecs.thinning import thin_out
from deltakeeper.errors import CodecError
from deltakeeper.layouts.base import Layout
from deltakeeper.layouts.bits import row_blocks
from deltakeeper.layouts.codes import code_words
from deltakeeper.layouts.masks import Mask, best_mask, expected_mask_bytes
from deltakeeper.layouts.philox import philox_key
from deltakeeper.layouts.sparse import Sparse

MAX_DROP = 0.99


@register_codec()
@dataclass(frozen=True)
class UltraDelta(Codec):
    """Round to `2^bits` levels between the least and the largest entry, drop entries at random, rescale the rest.

    Zero is forced onto the grid, because otherwise every untouched weight would move by the nearest level, and entries
    that round to zero are never stored. Of each other level the same share is dropped, exactly, so that the shape of
    the distribution stays. The paper takes its rescale factor from the other fine-tunes compressed in the same run;
    here a result depends on its own delta alone. A tensor belongs to the third of the weights where its middle weight
    lies (in the released code its last one).

    Attributes:
        p: share of the entries that are zero in the end, averaged over all weights, 0 to 0.99: where fewer round to
            zero, so much is dropped.
        step: the third of the weights whose tensors vary least drops to `p + step`, the middle third to `p` and the
            last third to what is left to the average; 0 drops to `p` everywhere.
        bits: of a code, 2 to 8.
        rescale: `mean` multiplies by `1 / (1 - p)`, `trace` on top of it by what makes the nuclear norm that of the
            delta (slow: two decompositions of a matrix of the smaller side), `none` leaves the entries as they are.
        rescale_p: the share that rescaling goes by, `p` if none: the average where tensors were given their own `p`.
        seed: with the tensor's name it decides what is dropped.
    """

    name: ClassVar[str] = "ultradelta"
    title: ClassVar[str] = "UltraDelta"
    summary: ClassVar[str] = "a few levels, each thinned out at random, more where the delta varies less"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.13563"

    p: float = 0.97
    step: float = 0.01
    bits: int = 4
    rescale: Literal["none", "mean", "trace"] = "mean"
    rescale_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "p", 0, MAX_DROP)
        check_range(self, "rescale_p", 0, MAX_DROP)
        check_range(self, "step", 0, 0.5)
        check_range(self, "bits", 2, 8)
        check_range(self, "seed", 0, MAX_SEED)

    @property
    def unbiased(self) -> bool:
        """See `Codec.unbiased`."""
        return self.rescale != "none"

    @property
    def surveys(self) -> bool:
        """Whether tensors drop different shares."""
        return self.step > 0

    def spread(self, survey: Mapping[str, Statistics]) -> dict[str, Codec]:
        """The codec with the share of each tensor's third of the weights, by standard deviation."""
        if not self.surveys:
            return dict.fromkeys(survey, self)
        sizes = {name: math.prod(found.shape) for name, found in survey.items()}
        total = sum(sizes.values())
        thirds: list[list[str]] = [[], [], []]
        passed = 0
        for name in sorted(survey, key=lambda name: (survey[name].std, name)):
            thirds[(2 * passed + sizes[name]) * 3 // (2 * total)].append(name)  # by where its middle weight lies
            passed += sizes[name]
        left = self.p * total
        shares: dict[str, float] = {}
        groups = [(min(MAX_DROP, self.p + self.step), thirds[0]), (self.p, thirds[1]), (self.p, thirds[2])]
        filled = [(share, names) for share, names in groups if names]
        for index, (share, names) in enumerate(filled):
            weights = sum(sizes[name] for name in names)
            if index == len(filled) - 1:
                share = min(MAX_DROP, max(0.0, left / weights))
            left -= share * weights
            shares |= dict.fromkeys(names, share)
        mean = self.p if self.rescale_p is None else self.rescale_p
        return {name: replace(self, p=round(shares[name], 6), step=0.0, rescale_p=mean) for name in survey}

    def expected_bytes(self, shape: tuple[int, int]) -> int:
        """See `Codec.expected_bytes`; fewer where more entries than `p` round to zero."""
        kept = round((1.0 - self.p) * math.prod(shape))
        return 4 + 4 * code_words(kept, self.bits) + expected_mask_bytes(shape, kept)

    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """See `Codec.encode`; one `sparse` term of codes."""
        matrix = checked(delta, name)
        low, high = (float(end) for end in torch.aminmax(matrix))
        grid = Grid.spanning(low, high, self.bits)
        codes = grid.codes(matrix)
        zeros = int(np.count_nonzero(codes.numpy() == grid.zero_point)) / codes.numel()
        share = max(0.0, (self.p - zeros) / (1.0 - zeros)) if zeros < 1.0 else 0.0
        words = thin_out(codes.numpy(), share, philox_key(self.seed, name), never=grid.zero_point)
        mask = best_mask(words, matrix.shape[1])
        factor = 1.0
        if self.rescale != "none":
            factor = 1.0 / (1.0 - (self.p if self.rescale_p is None else self.rescale_p))
        term = self._packed(codes, grid, mask, factor, name)
        if self.rescale == "trace" and term.nnz:
            size = peak(matrix)
            wanted, found = nuclear_norm(matrix, size), nuclear_norm(term.to_dense(), size)
            # Rounded, so that the last bits of a decomposition, which vary with the threads, do not reach the artifact.
            term = self._packed(codes, grid, mask, factor * float(f"{wanted / found:.4g}"), name)
        return [term]

    def box(self, delta: torch.Tensor, *, name: str) -> Cells | None:
        """Entries stay in the cell of their level and the two extremes as they are; none with `rescale=trace`."""
        if self.rescale == "trace":
            return None
        matrix = checked(delta, name)
        least, largest = (float(end) for end in torch.aminmax(matrix))
        low, high = Grid.spanning(least, largest, self.bits).cells(matrix)
        low, high = low.clamp(min=min(least, 0.0)), high.clamp(max=max(largest, 0.0))
        fixed = ((matrix == least) & (least < 0)) | ((matrix == largest) & (largest > 0))
        return Cells.around(matrix, torch.where(fixed, matrix, low), torch.where(fixed, matrix, high))

    def _packed(self, codes: torch.Tensor, grid: Grid, mask: Mask, factor: float, name: str) -> Sparse:
        scale = torch.tensor([grid.step * factor], dtype=torch.float64).float()
        if not 0.0 < float(scale) < math.inf:
            raise CodecError(f"the scale of '{name}' leaves float32; leave this tensor dense.")
        return Sparse.from_codes(codes, scale, mask, bits=self.bits, zero_point=grid.zero_point)


def nuclear_norm(matrix: torch.Tensor, size: float) -> float:
    """Sum of the singular values of `matrix / size`, from its Gram matrix of the smaller side in float64."""
    thin = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    side = thin.shape[1]
    gram = torch.zeros(side, side, dtype=torch.float64)
    for rows in row_blocks(thin.shape[0], side):
        block = thin[rows].double() / size
        gram += block.T @ block
    return float(torch.linalg.eigvalsh(gram).clamp_(min=0).sqrt_().sum())
