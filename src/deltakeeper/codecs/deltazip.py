"""DeltaZip: prune and round a delta column by column, so that what one column loses the next ones make up for.

Yao et al., "DeltaZip: Efficient Serving of Multiple Full-Model-Tuned LLMs", EuroSys 2025,
https://arxiv.org/abs/2312.05215: SparseGPT (https://arxiv.org/abs/2301.00774) on the difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltakeeper.codecs.base import Codec, Inputs, register_codec
from deltakeeper.codecs.cells import Cells
from deltakeeper.codecs.fields import check_range, check_types
from deltakeeper.codecs.gptq import quantise_columns
from deltakeeper.codecs.largest import kept_of
from deltakeeper.codecs.matrices import checked, peak
from deltakeeper.codecs.pruning import PrunedRounding, prune_and_round, pruned_cells, row_steps
from deltakeeper.errors import CodecError
from deltakeeper.layouts.base import Layout
from deltakeeper.layouts.bits import pack_bits
from deltakeeper.layouts.codes import code_words
from deltakeeper.layouts.masks import Mask, TwoFourMask, best_mask, expected_mask_bytes
from deltakeeper.layouts.sparse import Sparse

BLOCK = 128
LOSS_ROWS = 256


@register_codec()
@dataclass(frozen=True)
class DeltaZip(Codec):
    """Keep two of each four columns (or a share of each 128), rounded to one grid per output row.

    Entries go by least `D² / U²`, with `U` the diagonal of the Cholesky factor of the inverse gram of the layer's
    inputs, and every loss is paid into the columns that follow. Inputs that were always zero lose their column.
    Without calibration this is pruning by magnitude and plain rounding, and so it is where paying back does not help,
    as when a tenth or less is kept. The paper's largest ratio also has gdeflate on top, which is not done here.

    Attributes:
        pattern: `2:4` keeps two of each four neighbours in a row, at `bits / 2 + 1` bits a weight (of a last group of
            fewer than four, up to two); `unstructured` keeps the share `keep`, and of it what does not round to zero.
        keep: share kept by `unstructured`: of each 128 columns with calibration, of the whole matrix without. Above 0,
            at most 1.
        bits: of a code, 2 to 8; the step is `2 max|D| / (2^bits - 1)` of the row, and zero is a code.
        search: shrink the step of each row, down to a fifth, to the least sum of `|error|^2.4`.
        calibrated: weigh errors by the inputs of the layer, where there are some.
        damp: share of the gram's mean diagonal that is added to its diagonal, 0 to 1.
    """

    name: ClassVar[str] = "deltazip"
    title: ClassVar[str] = "DeltaZip"
    summary: ClassVar[str] = "two of four entries as codes, with losses paid back by later columns"
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.05215"

    pattern: Literal["2:4", "unstructured"] = "2:4"
    keep: float = 0.5
    bits: int = 4
    search: bool = False
    calibrated: bool = True
    damp: float = 0.01

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "keep", 0, 1, above=True)
        check_range(self, "bits", 2, 8)
        check_range(self, "damp", 0, 1)
        if self.pattern == "2:4" and self.keep != 0.5:
            raise CodecError("codec 'deltazip' keeps a half by '2:4'; for another 'keep' add pattern=unstructured.")

    @property
    def uses_inputs(self) -> bool:
        """See `Codec.uses_inputs`."""
        return self.calibrated

    @property
    def row_by_row(self) -> bool:
        """See `Codec.row_by_row`."""
        return True

    def payload_bytes(self, shape: tuple[int, int]) -> int | None:
        """See `Codec.payload_bytes`; without a pattern it depends on what rounds to zero."""
        out, columns = shape
        if self.pattern == "unstructured":
            return None
        kept = TwoFourMask.kept_per_row(columns)
        return 4 * (out + code_words(out * kept, self.bits) + out * code_words(kept, 2))

    def expected_bytes(self, shape: tuple[int, int]) -> int:
        """See `Codec.expected_bytes`; of `unstructured`, fewer by what rounds to zero."""
        if self.pattern == "2:4":
            return self.payload_bytes(shape) or 0
        kept = kept_of(math.prod(shape), self.keep)
        return 4 * (shape[0] + code_words(kept, self.bits)) + expected_mask_bytes(shape, kept)

    def box(self, delta: torch.Tensor, *, name: str) -> Cells | None:
        """Kept entries stay kept, in their cell, and dropped ones dropped; none with `search`, nor with a text."""
        if self.search:
            return None
        matrix = checked(delta, name)
        return pruned_cells(matrix, row_steps(matrix, self.bits, search=False), self.bits, self._share)

    @property
    def _share(self) -> float | None:
        return None if self.pattern == "2:4" else self.keep

    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """See `Codec.encode`; one `sparse` term of codes with a scale for each row."""
        matrix = checked(delta, name)
        out, columns = matrix.shape
        level = math.ldexp(1.0, math.frexp(peak(matrix))[1] - 1)  # powers of the least and largest deltas leave float32
        matrix = matrix / level
        gram = inputs.gram if self.uses_inputs and inputs is not None and bool(inputs.gram.any()) else None
        if gram is not None and tuple(gram.shape) == (columns, columns):
            matrix[:, gram.diagonal() == 0] = 0.0  # before their entries can widen a step
        scale = row_steps(matrix, self.bits, search=self.search)
        stored = (scale.double() * level).float()
        if not bool(torch.isfinite(stored * 2 ** (self.bits - 1)).all()) or bool(scale.any()) > bool(stored.any()):
            raise CodecError(f"the steps of '{name}' leave float32; leave this tensor dense.")
        keep = self._share
        codes, words = prune_and_round(matrix, scale, self.bits, keep)
        if gram is not None:
            rule = PrunedRounding((out, columns), scale, self.bits, keep, BLOCK)
            quantise_columns(matrix, gram, rule, damp=self.damp, block=BLOCK)
            paid = rule.codes.T.contiguous()
            if _loss(matrix, paid, scale, gram) < _loss(matrix, codes, scale, gram):
                codes, words = paid, pack_bits(rule.kept.T)
        if keep is None:
            mask: Mask = TwoFourMask.from_words(words, columns)
        else:
            mask = best_mask(pack_bits(codes != 0), columns)
        return [Sparse.from_codes(codes, stored[:, None], mask, bits=self.bits)]


def _loss(matrix: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, gram: torch.Tensor) -> float:
    """Squared error of the layer's outputs, of at most `LOSS_ROWS` of its rows."""
    step = -(-len(matrix) // LOSS_ROWS)
    error = codes[::step] * scale[::step, None] - matrix[::step]
    return float(((error @ gram) * error).sum(dtype=torch.float64))
