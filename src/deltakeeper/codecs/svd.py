"""Truncated singular value decomposition, randomised by default.

Halko, Martinsson and Tropp, "Finding structure with randomness", 2009, https://arxiv.org/abs/0909.4061 (algorithms
4.4 and 5.1). A rank at or above the rank of a LoRA fine-tune keeps its delta whole.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltakeeper.codecs.base import Codec, Inputs, register_codec
from deltakeeper.codecs.box import MARGIN, Box
from deltakeeper.codecs.fields import MAX_SEED, check_range, check_types
from deltakeeper.codecs.matrices import checked, peak
from deltakeeper.codecs.spaces import Seen, Unseen
from deltakeeper.devices import working_device
from deltakeeper.errors import CodecError, LayoutError
from deltakeeper.layouts.base import Layout
from deltakeeper.layouts.lowrank import Lowrank
from deltakeeper.layouts.settings import FLOAT_DTYPES

Triplet = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@register_codec()
@dataclass(frozen=True)
class Svd(Codec):
    """The best low-rank approximation `U V` with the singular values split evenly between the factors.

    Attributes:
        rank: number of singular values, capped at the smaller side of the matrix. Give this or `energy`.
        energy: the least rank that keeps this share of the squared norm, above 0 and at most 1.
        method: `randomised` (exact where it would not save work) or `exact`.
        oversample: extra random directions.
        niter: power iterations; with few of them a flat spectrum is met less well, which the report's error shows.
        factors: dtype of the stored factors; the products are float32.
        seed: with the tensor's name it decides the random directions.
    """

    name: ClassVar[str] = "svd"
    title: ClassVar[str] = "Low rank (SVD)"
    summary: ClassVar[str] = "the largest singular values and their vectors"
    paper: ClassVar[str] = "https://arxiv.org/abs/0909.4061"

    rank: int | None = None
    energy: float | None = None
    method: Literal["randomised", "exact"] = "randomised"
    oversample: int = 16
    niter: int = 4
    factors: Literal["float16", "bfloat16", "float32"] = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        if (self.rank is None) == (self.energy is None):
            raise CodecError("codec 'svd' needs exactly one of 'rank' and 'energy', for example svd:rank=8.")
        check_range(self, "rank", 1, 1 << 20)
        check_range(self, "energy", 0, 1, above=True)
        check_range(self, "oversample", 0, 4096)
        check_range(self, "niter", 0, 64)
        check_range(self, "seed", 0, MAX_SEED)

    def payload_bytes(self, shape: tuple[int, int]) -> int | None:
        """See `Codec.payload_bytes`; a share of the energy leaves the rank to the data."""
        if self.rank is None:
            return None
        return 4 + min(self.rank, *shape) * sum(shape) * FLOAT_DTYPES[self.factors].itemsize

    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """See `Codec.encode`; one `lowrank` term."""
        matrix = checked(delta, name)
        scale = peak(matrix)
        smaller = min(matrix.shape)
        if scale == 0.0:
            rank = min(self.rank or 1, smaller)
            left, right = torch.zeros(matrix.shape[0], rank), torch.zeros(rank, matrix.shape[1])
            return [Lowrank.from_factors(left, right, self.factors)]
        matrix = matrix / scale  # squares of the smallest and the largest deltas do not fit float32
        u, s, vt = self._decompose(matrix, name)
        rank = min(self.rank, smaller) if self.rank else self._rank_for_energy(matrix, s)
        root = s[:rank].sqrt()
        left, right = u[:, :rank] * (root * scale), root[:, None] * vt[:rank]
        try:
            return [Lowrank.from_factors(left, right, self.factors)]
        except LayoutError as error:
            raise CodecError(f"the factors of '{name}' leave float32; leave this tensor dense.") from error

    def box(self, delta: torch.Tensor, *, name: str) -> Box | None:
        """Changes orthogonal to the leading spaces, or to all that a seeded sketch looks at; none with `energy`."""
        matrix = checked(delta, name)
        scale = peak(matrix)
        if self.rank is None or scale == 0.0:
            return None
        seen = Seen()
        rank = min(self.rank, *matrix.shape)
        u, s, vt = self._decompose(matrix / scale, name, seen)
        if rank == min(matrix.shape) or not float(s[rank - 1]) > 0.0:
            return None
        seen.limit = (1 - 200 * MARGIN) * float(s[rank - 1])
        if seen.exact:
            limit = max(seen.limit, float(s[rank])) * scale
            return Unseen(matrix, u[:, :rank].contiguous(), vt[:rank].T.contiguous(), limit)
        return seen.box(matrix, scale)

    def _decompose(self, matrix: torch.Tensor, name: str, seen: Seen | None = None) -> Triplet:
        smaller = min(matrix.shape)
        width = (self.rank or 16) + self.oversample
        while self.method == "randomised" and 2 * width < smaller:
            found = randomised_svd(matrix, width, name=name, seed=self.seed, niter=self.niter, seen=seen)
            if self.rank or self._kept(matrix, found[1]) >= (self.energy or 0.0):
                return found
            width *= 2
        if seen is not None:
            seen.exact = True
        return exact_svd(matrix)

    @staticmethod
    def _kept(matrix: torch.Tensor, values: torch.Tensor) -> float:
        return float(values.double().square().sum()) / float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2

    def _rank_for_energy(self, matrix: torch.Tensor, values: torch.Tensor) -> int:
        total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
        enough = values.double().square().cumsum(0) >= (self.energy or 0.0) * total
        return int(enough.int().argmax()) + 1 if bool(enough.any()) else values.numel()


def exact_svd(matrix: torch.Tensor) -> Triplet:
    """`U (out, k)`, singular values `(k,)` falling, `Vᵀ (k, in)`, with `k` the smaller side; all on the CPU."""
    u, s, vt = torch.linalg.svd(matrix.to(working_device()), full_matrices=False)
    return u.cpu(), s.cpu(), vt.cpu()


def randomised_svd(
    matrix: torch.Tensor, width: int, *, name: str, seed: int = 0, niter: int = 4, seen: Seen | None = None
) -> Triplet:
    """About the `width` largest singular values and their vectors, as `exact_svd` gives them.

    Args:
        matrix: float32 `(out, in)`, entries of about 1.
        width: how many, at most the smaller side; the last few are inexact, so ask for some more than are used.
        name: name of the tensor, which with `seed` decides the random directions.
        seed: see `name`.
        niter: power iterations.
        seen: collects the directions that the matrix is multiplied by.
    """
    seen = Seen() if seen is None else seen
    digest = hashlib.sha256(seed.to_bytes(8, "little") + name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    directions = torch.randn(matrix.shape[1], width, generator=generator)  # on the CPU: the same ones everywhere
    matrix = matrix.to(working_device())
    basis = torch.linalg.qr(matrix @ directions.to(matrix.device)).Q
    seen.add(left=basis, right=directions)
    for _ in range(niter):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        seen.add(right=basis)
        basis = torch.linalg.qr(matrix @ basis).Q
        seen.add(left=basis)
    # The thin matrix is reduced to a square one before its own decomposition, which is the slower step.
    q, r = torch.linalg.qr(matrix.T @ basis)
    u, s, vt = torch.linalg.svd(r.T)
    return (basis @ u).cpu(), s.cpu(), (vt @ q.T).cpu()
