"""ImPart: singular vectors thinned out at random, the less important the more.

Yang et al., "ImPart: Importance-Aware Delta-Sparsification for Improved Model Compression and Merging in LLMs",
ACL 2025, https://arxiv.org/abs/2504.13237.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltakeeper.codecs.base import Codec, Inputs, register_codec
from deltakeeper.codecs.box import Box
from deltakeeper.codecs.fields import MAX_SEED, check_range, check_types
from deltakeeper.codecs.matrices import checked, peak
from deltakeeper.codecs.rounding import group_scale
from deltakeeper.codecs.spaces import Seen
from deltakeeper.codecs.svd import Triplet, exact_svd, randomised_svd
from deltakeeper.codecs.vector_rates import Band, VectorRates
from deltakeeper.errors import CodecError, LayoutError
from deltakeeper.layouts.base import Layout
from deltakeeper.layouts.bits import unpack_bits
from deltakeeper.layouts.lowrank import Lowrank
from deltakeeper.layouts.masks import SeedMask
from deltakeeper.layouts.philox import philox_key
from deltakeeper.layouts.settings import FLOAT_DTYPES
from deltakeeper.layouts.sparse import Sparse

BANDS = {"int8": ((8, None),), "int4": ((4, None),), "bands": ((8, 2), (3, 32), (2, None))}
OVERSAMPLE = 16


@register_codec()
@dataclass(frozen=True)
class ImPart(Codec):
    """Random shares of the singular vectors, with the masks as seeds; the first vector whole, later ones ever thinner.

    The share of vectors that are dropped whole beforehand, the rates of the others and where they end follow the paper,
    whose two rules for attention and MLP are one rule of the shape: `2 max(out, in) / (out + in)` is its 1 and 1.45.
    Where the released code keeps an exact number of entries of a vector, here each is drawn by itself, and only a seed
    is stored. Where the paper counts kept entries, here all bytes count, so that a matrix never takes more than its
    part of `cr` (except the 20 bytes of a term without entries, where even those are more).

    Attributes:
        cr: 16 bits a weight over the bits stored for it, 1 to 4096.
        beta: share of the vectors of a square matrix that are dropped whole, at least 0 and below 1; less is dropped
            where all the others fit as they are.
        c: power of the singular values that is the importance of their vectors, 0 to 8.
        values: how kept entries are stored: a float dtype, whole numbers with a scale for each vector, or `bands` of
            them: the first 2 vectors with 8 bits, the next 32 with 3, the others with 2 (ImPart-Qt, but rounded to
            nearest and not by GPTQ).
        rescale: `mean` divides both vectors of a pair by the share that is kept of them: unbiased, but noisy; `none`
            leaves entries as they are, which has the least expected error.
        niter: power iterations of the decomposition.
        seed: with the tensor's name it decides what is dropped.
    """

    name: ClassVar[str] = "impart"
    title: ClassVar[str] = "ImPart"
    summary: ClassVar[str] = "singular vectors, thinned out at random by their importance"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.13237"

    cr: float = 32.0
    beta: float = 0.8
    c: float = 0.5
    values: Literal["float16", "bfloat16", "float32", "int8", "int4", "bands"] = "float16"
    rescale: Literal["mean", "none"] = "mean"
    niter: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "cr", 1, 4096)
        check_range(self, "beta", 0, 1, below=True)
        check_range(self, "c", 0, 8)
        check_range(self, "niter", 0, 64)
        check_range(self, "seed", 0, MAX_SEED)

    @property
    def unbiased(self) -> bool:
        """See `Codec.unbiased`."""
        return self.rescale == "mean"

    def expected_bytes(self, shape: tuple[int, int]) -> int:
        """See `Codec.expected_bytes`; less where the last vector or entry that would fit is a large one."""
        return self._budget(shape)

    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """See `Codec.encode`; one `lowrank` term of two `sparse` factors, or one for each band."""
        matrix = checked(delta, name)
        shape = (matrix.shape[0], matrix.shape[1])
        scale = peak(matrix)
        if scale == 0.0:
            u, s, vt = torch.zeros(shape[0], 1), torch.zeros(1), torch.zeros(1, shape[1])
            rates = torch.zeros(1)
        else:
            (u, s, vt), rates = self._thinned(matrix / scale, name)
        factor = s[: len(rates)].sqrt()
        if self.rescale == "mean":
            factor = factor / torch.where(rates == 0, 1, rates)
        left, right = u.T[: len(rates)] * factor[:, None], vt[: len(rates)] * factor[:, None]
        largest = left.abs().amax(1).double() @ right.abs().amax(1).double()
        if not 4 * float(largest) * scale < torch.finfo(torch.float32).max:
            raise CodecError(f"rescaling '{name}' overflows float32; set 'rescale' to none, or leave it dense.")
        terms: list[Layout] = []
        try:
            for index, band in enumerate(self._bands(len(rates))):
                rows = slice(band.start, band.stop)
                u_name, v_name = mask_names(name, index)
                first = self._packed(left[rows], rates[rows], u_name, band)
                terms.append(Lowrank.from_terms(first, self._packed(right[rows], rates[rows], v_name, band), scale))
        except LayoutError as error:
            raise CodecError(f"the factors of '{name}' leave float32; leave this tensor dense.") from error
        return terms

    def box(self, delta: torch.Tensor, *, name: str) -> Box | None:
        """Changes orthogonal to all that the sketches look at, below the least singular value kept.

        None where the matrix is so small that it is decomposed exactly or everything is looked at.
        """
        matrix = checked(delta, name)
        scale = peak(matrix)
        if scale == 0.0:
            return None
        seen = Seen()
        (_, s, _), rates = self._thinned(matrix / scale, name, seen)
        seen.limit = float(s[len(rates) - 1])
        return seen.box(matrix, scale)

    def _budget(self, shape: tuple[int, int]) -> int:
        return int(2 * shape[0] * shape[1] / self.cr)

    def _bands(self, count: int) -> list[Band]:
        """The bands of the first `count` vectors; none of them is empty."""
        found: list[Band] = []
        start = 0
        for bits, width in BANDS.get(self.values, ((None, None),)):
            stop = count if width is None else min(count, start + width)
            if stop > start:
                found.append(Band(start, stop, bits, FLOAT_DTYPES[self.values].itemsize * 8 if bits is None else bits))
            start = stop
        return found

    def _thinned(self, matrix: torch.Tensor, name: str, seen: Seen | None = None) -> tuple[Triplet, torch.Tensor]:
        """Vectors, and the rates of the first of them that are kept at all."""
        out, columns = matrix.shape
        smaller, budget = min(out, columns), self._budget((out, columns))
        bits = self._bands(smaller)[-1].width
        whole = int(8 * budget / (bits * (out + columns)))  # vectors that fit as they are
        elongation = 2 * max(out, columns) / (out + columns)
        vectors = min(smaller, max(1, whole, int(smaller * min(1.0, (1 - self.beta) * elongation))))
        width = min(vectors, 2 * whole + OVERSAMPLE)
        while True:
            exact = 2 * (width + OVERSAMPLE) >= smaller
            if exact:
                found, width = exact_svd(matrix), vectors
                if seen is not None:
                    seen.exact = True
            else:
                found = randomised_svd(
                    matrix, width + OVERSAMPLE, name=name, seed=self.seed, niter=self.niter, seen=seen
                )
            bands = self._bands(width)
            keys = [[philox_key(self.seed, key) for key in mask_names(name, band)] for band in range(len(bands))]
            rates = VectorRates((out, columns), bands, vectors, budget, keys).rates(found[1][:width], self.c)
            if len(rates) < width or width == vectors:
                return found, rates
            width = min(vectors, 2 * width)

    def _packed(self, vectors: torch.Tensor, rates: torch.Tensor, name: str, band: Band) -> Sparse:
        mask = SeedMask(self.seed, name, rates.clone())
        if band.bits is None:
            return Sparse.from_matrix(vectors, mask, self.values)
        kept = vectors * unpack_bits(mask.words((vectors.shape[0], vectors.shape[1])), vectors.shape[1])
        scale = group_scale(kept, band.bits, search=True)[:, None]
        limit = 2 ** (band.bits - 1)
        codes = (kept / torch.where(scale == 0, torch.inf, scale)).round_().clamp_(-limit, limit - 1)
        return Sparse.from_codes(codes.to(torch.int8), scale, mask, bits=band.bits)


def mask_names(name: str, band: int) -> tuple[str, str]:
    """What names the masks of the left and the right vectors of a band."""
    return f"{name}::U.{band}", f"{name}::V.{band}"
