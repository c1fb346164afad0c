"""Delta-CoMe: singular vectors with many bits for the first and few for the rest.

Ping et al., "Delta-CoMe: Training-Free Delta-Compression with Mixed-Precision for Large Language Models",
NeurIPS 2024, https://arxiv.org/abs/2406.08903.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltakeeper.codecs.base import Codec, Inputs, register_codec
from deltakeeper.codecs.box import Box
from deltakeeper.codecs.fields import check_range, check_types
from deltakeeper.codecs.gptq import quantise_columns, roots
from deltakeeper.codecs.matrices import checked, peak
from deltakeeper.codecs.rounding import ColumnRounding, NeighbourRounding
from deltakeeper.codecs.spaces import Seen
from deltakeeper.codecs.svd import exact_svd, randomised_svd
from deltakeeper.errors import CodecError, LayoutError
from deltakeeper.layouts.base import Layout
from deltakeeper.layouts.codes import code_words
from deltakeeper.layouts.grouped_int import GroupedInt
from deltakeeper.layouts.groups import groups_per_row
from deltakeeper.layouts.lowrank import Lowrank

OVERSAMPLE = 16
_GAINS = 12  # bytes of a band's three float32 gains


@dataclass(frozen=True)
class Weights:
    """How much the inputs of a matrix matter: their gram, `R` with `R Rᵀ` the damped gram, and the inverse of `R`."""

    gram: torch.Tensor
    root: torch.Tensor
    inverse: torch.Tensor


@register_codec()
@dataclass(frozen=True)
class DeltaCome(Codec):
    """Bands of singular vectors with 8, 3 and 2 bits, each one `lowrank` term of two `grouped_int` factors.

    The singular values are folded into V. V is quantised first, then U against what the quantised V makes of the
    inputs, both by GPTQ where the layer's inputs are known, and by rounding otherwise (the data-free variant). Unlike
    in the released code, codes are symmetric about zero, scales lie along the vectors of both factors, and columns are
    taken in their order.

    Attributes:
        bpw: bits a weight, scales and gains included, that the ranks may cost where `rank2` is none: never exceeded,
            except that one vector of 2 bits is always stored.
        rank8: vectors of 8 bits, fewer where the budget or the matrix is too small.
        rank3: vectors of 3 bits, likewise.
        rank2: vectors of 2 bits; none for as many as the budget allows. A number (it is 968 of 4096 in the paper's
            attention, 1428 in its MLP) puts the budget out of force.
        group: neighbours in a vector that share a float16 scale, 0 for a whole vector.
        search: choose each scale for the least squared error, instead of from the largest entry as in the paper.
        refine: let each band encode what the quantised ones before it left over, in the metric of the inputs where they
            are known, and refit U to the quantised V; the paper quantises the singular vectors of the delta itself.
        calibrated: weigh errors by the inputs of the layer, where there are some.
        damp: share of the gram's mean diagonal that is added to its diagonal (0.01 in the paper; more holds better on
            other text where calibration saw a few thousand tokens).
        niter: power iterations of the decomposition, which is exact where ranks are high.
    """

    name: ClassVar[str] = "delta_come"
    title: ClassVar[str] = "Delta-CoMe"
    summary: ClassVar[str] = "singular vectors in bands of 8, 3 and 2 bits"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.08903"

    bpw: float = 1.0
    rank8: int = 2
    rank3: int = 32
    rank2: int | None = None
    group: int = 128
    search: bool = True
    refine: bool = True
    calibrated: bool = True
    damp: float = 0.03
    niter: int = 2

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "bpw", 0, 32, above=True)
        for name in ("rank8", "rank3", "rank2", "group"):
            check_range(self, name, 0, 1 << 20)
        check_range(self, "damp", 0, 1)
        check_range(self, "niter", 0, 64)
        if self.rank8 == self.rank3 == self.rank2 == 0:
            raise CodecError("codec 'delta_come' has no ranks; raise 'rank8', 'rank3' or 'rank2'.")

    @property
    def uses_inputs(self) -> bool:
        """See `Codec.uses_inputs`."""
        return self.calibrated

    def payload_bytes(self, shape: tuple[int, int]) -> int:
        """See `Codec.payload_bytes`."""
        return sum(_GAINS + count * self._vector_bytes(bits, shape) for bits, count in self.bands(shape))

    def bands(self, shape: tuple[int, int]) -> list[tuple[int, int]]:
        """Bits and number of vectors of each band of a matrix `(out, in)`, in order; none of them is empty."""
        free = min(shape)
        budget = int(self.bpw * shape[0] * shape[1]) // 8
        found: list[tuple[int, int]] = []
        for bits, wanted in ((8, self.rank8), (3, self.rank3), (2, free if self.rank2 is None else self.rank2)):
            count = min(wanted, free)
            if self.rank2 is None:
                count = min(count, max(0, budget - _GAINS) // self._vector_bytes(bits, shape))
            if count:
                found.append((bits, count))
                budget -= _GAINS + count * self._vector_bytes(bits, shape)
                free -= count
        return found or [(2, 1)]

    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """See `Codec.encode`; one `lowrank` term for each band."""
        return self._encode(delta, name, inputs, Seen())

    def box(self, delta: torch.Tensor, *, name: str) -> Box | None:
        """Changes orthogonal to all that the sketches and the quantised vectors look at, below the least value kept.

        Codes that rounding turns over may differ. None where a band is decomposed exactly or everything is looked at.
        """
        matrix = checked(delta, name)
        if not bool(matrix.any()):
            return None
        seen = Seen()
        self._encode(matrix, name, None, seen)
        return seen.box(matrix, peak(matrix))

    def _encode(self, delta: torch.Tensor, name: str, inputs: Inputs | None, seen: Seen) -> list[Layout]:
        matrix = checked(delta, name)
        out, columns = matrix.shape
        bands = self.bands((out, columns))
        scale = peak(matrix)
        if scale == 0.0:
            return [
                Lowrank.from_terms(self._zeros(count, out, bits), self._zeros(count, columns, bits))
                for bits, count in bands
            ]
        weights = self._weights(inputs, columns)
        left_over = matrix / scale  # squares of the smallest and the largest deltas do not fit float32
        whole = None if self.refine else self._leading(left_over, sum(count for _, count in bands), None, name, seen)
        terms: list[Layout] = []
        start = 0
        for bits, count in bands:
            if whole is None:
                u, v = self._leading(left_over, count, weights, name, seen)
            else:
                u, v = whole[0][:, start : start + count], whole[1][start : start + count]
            left, right = self._quantise(left_over, u, v, bits, weights)
            if self.refine:
                seen.add(right=right.to_dense().T)
            try:
                terms.append(Lowrank.from_terms(left, right, scale))
            except LayoutError as error:
                raise CodecError(f"the factors of '{name}' leave float32; leave this tensor dense.") from error
            start += count
            if self.refine and len(terms) < len(bands):
                left_over.addmm_(left.to_dense().T, right.to_dense(), alpha=-1)
        return terms

    def _leading(
        self, matrix: torch.Tensor, rank: int, weights: Weights | None, name: str, seen: Seen
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`U (out, rank)` and `Σ Vᵀ (rank, in)`, whose product is the nearest of this rank where the inputs go."""
        weighed = matrix if weights is None else matrix @ weights.root
        width = rank + OVERSAMPLE
        if 2 * width < min(matrix.shape):
            u, s, vt = randomised_svd(weighed, width, name=name, niter=self.niter, seen=seen)
        else:
            seen.exact = True
            u, s, vt = exact_svd(weighed)
        seen.limit = min(seen.limit, float(s[rank - 1]))
        v = s[:rank, None] * vt[:rank]
        return u[:, :rank], v if weights is None else v @ weights.inverse

    def _quantise(
        self, target: torch.Tensor, u: torch.Tensor, v: torch.Tensor, bits: int, weights: Weights | None
    ) -> tuple[GroupedInt, GroupedInt]:
        """Terms of Uᵀ and V of one band: `u (out, k)`, `v (k, in)`; `target` is what the band should give."""
        rank, columns = v.shape
        neighbours = NeighbourRounding(rank, columns, bits, self.group, search=self.search)
        gram, upper = (None, None) if weights is None else (weights.gram, weights.inverse)
        quantise_columns(v, gram, neighbours, damp=self.damp, upper=upper)
        right = neighbours.term()
        v = right.to_dense()
        weighted = v if gram is None else v @ gram
        inner = weighted @ v.T  # gram of x Vᵀ, which is what U is fed
        if self.refine:
            u = _refit(target, weighted, inner, u)
        within = ColumnRounding(u.shape[0], rank, bits, self.group, search=self.search)
        quantise_columns(u, inner if self.refine or gram is not None else None, within, damp=self.damp)
        return within.term(), right

    def _weights(self, inputs: Inputs | None, columns: int) -> Weights | None:
        if inputs is None or not self.calibrated or not bool(inputs.gram.diagonal().any()):
            return None
        if tuple(inputs.gram.shape) != (columns, columns):
            raise CodecError(f"inputs of width {len(inputs.gram)} do not fit a matrix of {columns} columns.")
        gram = inputs.gram.clone()
        if self.refine:  # damped here too, or the refit would be free where no token has been
            gram.diagonal().add_(self.damp * float(gram.diagonal().double().mean()))
        return Weights(gram, *roots(inputs.gram, self.damp))

    def _vector_bytes(self, bits: int, shape: tuple[int, int]) -> int:
        """Bytes of one pair of singular vectors."""
        return sum(4 * code_words(size, bits) + 2 * groups_per_row(size, self.group) for size in shape)

    def _zeros(self, rank: int, size: int, bits: int) -> GroupedInt:
        return NeighbourRounding(rank, size, bits, self.group).term()


def _refit(target: torch.Tensor, weighted: torch.Tensor, inner: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The U for which `U V` is nearest to the target in the metric of the inputs; `u` where V is nothing."""
    size = inner.diagonal().double().sqrt()  # vectors of all sizes are brought to one, so that none is damped away
    if not bool(size.any()):
        return u
    size = torch.where(size > 0, size, 1.0)
    damped = inner.double() / size / size[:, None]
    damped.diagonal().add_(1e-6)
    solved: torch.Tensor = torch.linalg.solve(damped, (target @ weighted.T).T.double() / size[:, None])
    return (solved / size[:, None]).T.float()
