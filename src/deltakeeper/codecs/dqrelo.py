"""D-QRELO: one bit per weight, and a low-rank term for what the signs leave over.

https://arxiv.org/abs/2604.16940, of which the abstract alone is known here: one-bit quantisation, followed by the best
low-rank approximation of the residual.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from deltakeeper.codecs.base import Codec, Inputs, register_codec
from deltakeeper.codecs.bitdelta import BitDelta
from deltakeeper.codecs.fields import check_range, check_types
from deltakeeper.codecs.matrices import checked
from deltakeeper.codecs.planes import Scale
from deltakeeper.codecs.svd import Svd
from deltakeeper.errors import CodecError, LayoutError
from deltakeeper.layouts.base import Layout
from deltakeeper.layouts.bits import row_blocks
from deltakeeper.layouts.grouped_int import MAX_GROUP, GroupedInt
from deltakeeper.layouts.lowrank import Lowrank
from deltakeeper.layouts.settings import FLOAT_DTYPES, check_finite
from deltakeeper.layouts.signs import Signs

Factors = Literal["float16", "bfloat16", "float32", "int2", "int3", "int4", "int5", "int6", "int7", "int8"]


@register_codec()
@dataclass(frozen=True)
class DQRelo(Codec):
    """`a S + [delta - a S]_rank`: a sign plane, then the largest singular values of what it leaves over.

    Attributes:
        rank: number of singular values, capped at the smaller side of the matrix.
        factors: dtype of the low-rank factors, or whole numbers of 2 to 8 bits with a scale per group.
        group: neighbours along a factor's long side that share a scale, 0 for a whole singular vector.
        scale: one `a` per tensor, per row (output) or per column (input).
        zero: the sign of an exact zero, as of `bitdelta`.
        refit: choose `a` and the low-rank term's gain once more, together, for the least squared error of the sum.
    """

    name: ClassVar[str] = "dqrelo"
    title: ClassVar[str] = "D-QRELO"
    summary: ClassVar[str] = "one sign bit per weight, plus a low-rank term for the residual"
    paper: ClassVar[str] = "https://arxiv.org/abs/2604.16940"
    boxless: ClassVar[str] = "signs fix entries and the low-rank part fixes directions; no simple set keeps both"

    rank: int = 16
    factors: Factors = "float16"
    group: int = 128
    scale: Scale = "tensor"
    zero: Literal["auto", "plus", "minus", "zero"] = "auto"
    refit: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "rank", 1, 1 << 20)
        check_range(self, "group", 0, MAX_GROUP)

    def payload_bytes(self, shape: tuple[int, int]) -> int | None:
        """See `Codec.payload_bytes`; with the zero rule `auto` the data decide on a mask."""
        return None if self.zero == "auto" else self.expected_bytes(shape)

    def expected_bytes(self, shape: tuple[int, int]) -> int:
        """See `Codec.expected_bytes`; without a mask where the rule is `auto`."""
        rank = min(self.rank, *shape)
        if self.factors in FLOAT_DTYPES:
            factors = rank * sum(shape) * FLOAT_DTYPES[self.factors].itemsize
        else:
            factors = sum(GroupedInt.payload_bytes((rank, side), self._bits, self.group) for side in shape)
        return self._signs.expected_bytes(shape) + factors + 4

    @property
    def _signs(self) -> BitDelta:
        return BitDelta(scale=self.scale, zero=self.zero)

    @property
    def _bits(self) -> int:
        return int(self.factors.removeprefix("int"))

    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """See `Codec.encode`; a `signs` term and a `lowrank` term."""
        matrix = checked(delta, name)
        (signs,) = self._signs.encode(matrix, name=name)
        left_over = torch.sub(matrix, signs.to_dense())
        try:
            lowrank = self._lowrank(left_over, name)
            if self.refit and isinstance(signs, Signs):
                return list(refit(matrix, signs, lowrank))
        except LayoutError as error:
            raise CodecError(f"the factors of '{name}' leave float32; leave this tensor dense.") from error
        return [signs, lowrank]

    def _lowrank(self, matrix: torch.Tensor, name: str) -> Lowrank:
        if self.factors in ("float16", "bfloat16", "float32"):
            (term,) = Svd(rank=self.rank, factors=self.factors).encode(matrix, name=name)
        else:
            (term,) = Svd(rank=self.rank, factors="float32").encode(matrix, name=name)
        assert isinstance(term, Lowrank)
        if self.factors in FLOAT_DTYPES:
            return term
        left = GroupedInt.from_matrix(term.left.T.contiguous(), self._bits, self.group)
        right = GroupedInt.from_matrix(term.right, self._bits, self.group)
        return Lowrank.from_terms(left, right, float(term.gain))


def refit(matrix: torch.Tensor, signs: Signs, lowrank: Lowrank) -> tuple[Signs, Lowrank]:
    """Scales `a` of one sign plane `S` and a factor `b` of the low-rank term `L` with the least `‖D - a S - b L‖`.

    For a given `b` the best scale is `(<D, S> - b <L, S>) / <S, S>` over the entries that share it, which leaves one
    linear equation for `b`.

    Raises:
        LayoutError: a scale leaves float32.
    """
    out, columns = signs.shape
    unit = replace(signs, scales=(torch.ones_like(signs.scales[0]),)).to_dense()
    product = lowrank.to_dense()
    peak = float(matrix.abs().max()) or 1.0  # squares of the smallest and the largest deltas do not fit float32
    found = torch.zeros(3, *signs.scales[0].shape, dtype=torch.float64)  # <D, S>, <L, S>, <S, S> of each scale
    with_product = squared = 0.0
    for rows in row_blocks(out, columns):
        s, d, p = unit[rows].double(), matrix[rows].double() / peak, product[rows].double() / peak
        where = rows if signs.scale == "row" else slice(None)
        for k, other in enumerate((d, p, s)):
            found[k, where] += _over(other * s, signs.scale)
        with_product += float((d * p).sum())
        squared += float(p.square().sum())
    given, shared, entries = found[0], found[1], found[2].clamp(min=1.0)
    independent = squared - float((shared.square() / entries).sum())
    distinct = independent > 1e-9 * squared  # else the signs can say all that the low-rank term says
    factor = (with_product - float((given * shared / entries).sum())) / independent if distinct else 1.0
    scales = ((given - factor * shared) / entries * peak).float()
    gain = (lowrank.gain.double() * factor).float()
    check_finite(signs.name, {"delta_scale.0": scales, "delta_gain": gain})
    return replace(signs, scales=(scales,)), replace(lowrank, gain=gain)


def _over(numbers: torch.Tensor, scale: str) -> torch.Tensor:
    if scale == "tensor":
        return numbers.sum().reshape(1)
    return numbers.sum(dim=1 if scale == "row" else 0, keepdim=True)
