"""BitDelta: the sign of every weight times the mean absolute delta, repeated on what is left over.

Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit", NeurIPS 2024, https://arxiv.org/abs/2402.10193.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from deltakeeper.codecs.base import Codec, Inputs, register_codec
from deltakeeper.codecs.fields import check_range, check_types
from deltakeeper.codecs.matrices import checked
from deltakeeper.errors import CodecError
from deltakeeper.layouts.base import Layout
from deltakeeper.layouts.bits import byte_view, pack_rows, row_blocks, zero_words
from deltakeeper.layouts.signs import Signs, scale_shape

Floats = NDArray[np.float32]
Scale = Literal["tensor", "row", "column"]

SAMPLE_ENTRIES = 1 << 20


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

    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """See `Codec.encode`; one `signs` term."""
        values: Floats = checked(delta, name).numpy()
        zero = choose_zero_rule(values, self.scale) if self.zero == "auto" else self.zero
        term = fit_planes(values, self.bits, self.scale, zero)
        if not any(scale.any() for scale in term.scales) and values.any():
            raise CodecError(f"the scale of '{name}' underflows to zero; leave this tensor dense.")
        return [term]


def choose_zero_rule(values: Floats, scale: Scale) -> Literal["plus", "zero"]:
    """`zero` iff one plane with a mask has a lower error than two planes without, which take the same bytes.

    Judged on every n-th row so that at most about a million entries are read twice.
    """
    sample = values[:: max(1, values.size // SAMPLE_ENTRIES)]
    if sample.all():
        return "plus"
    if not sample.any():
        return "zero" if values.any() else "plus"
    masked, finer = (_error(sample, fit_planes(sample, *fit)) for fit in ((1, scale, "zero"), (2, scale, "plus")))
    return "zero" if masked < finer else "plus"


def _error(values: Floats, term: Signs) -> float:
    difference = term.to_dense().numpy() - values
    return float(np.linalg.norm(difference.astype(np.float64)))


def fit_planes(values: Floats, planes: int, scale: Scale, zero: str) -> Signs:
    """Sign planes of a float32 matrix `(out, in)`; one pass over it per plane, and one copy when `planes > 1`."""
    out, columns = shape = (values.shape[0], values.shape[1])
    nonzero = zero_words(out, columns) if zero == "zero" else None
    counts = ScaleSums(shape, scale)
    left_over = values.copy() if planes > 1 else values
    packed: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    for plane in range(planes):
        words, sums = zero_words(out, columns), ScaleSums(shape, scale)
        for rows in row_blocks(out, columns):
            block = left_over[rows]
            present = values[rows] != 0 if nonzero is not None else None
            if plane:
                step = scales[-1].numpy()[rows] if scale == "row" else scales[-1].numpy()
                block -= np.where(_positive(block, zero), step, -step)
                if present is not None:
                    block *= present
            positive = _positive(block, zero)
            if present is not None:
                positive &= present
                if nonzero is not None and not plane:
                    pack_rows(present, byte_view(nonzero)[rows])
                    counts.add(present, rows)
            pack_rows(positive, byte_view(words)[rows])
            sums.add(np.abs(block), rows)
        packed.append(words)
        scales.append(sums.mean(None if nonzero is None else counts))
    return Signs(shape, scale, zero, tuple(packed), tuple(scales), nonzero)


def _positive(block: Floats, zero: str) -> NDArray[np.bool_]:
    return block > 0 if zero == "minus" else block >= 0


class ScaleSums:
    """Sums per tensor, row or column of blocks of rows, in float64 so that no magnitude overflows."""

    def __init__(self, shape: tuple[int, int], scale: Scale) -> None:
        self._entries = {"tensor": shape[0] * shape[1], "row": shape[1], "column": shape[0]}[scale]
        self._scale = scale
        self.sums: NDArray[np.float64] = np.zeros(scale_shape(shape, scale))

    def add(self, block: NDArray[np.float32] | NDArray[np.bool_], rows: slice) -> None:
        """Add the entries of `rows`."""
        if self._scale == "tensor":
            self.sums += block.sum(dtype=np.float64)
        elif self._scale == "row":
            self.sums[rows] = block.sum(axis=1, dtype=np.float64, keepdims=True)
        else:
            self.sums += block.sum(axis=0, dtype=np.float64, keepdims=True)

    def mean(self, counts: ScaleSums | None = None) -> torch.Tensor:
        """Means as a float32 scale, over all entries or over `counts` of them (0 where there are none)."""
        entries = self._entries if counts is None else np.maximum(counts.sums, 1.0)
        return torch.from_numpy((self.sums / entries).astype(np.float32))
