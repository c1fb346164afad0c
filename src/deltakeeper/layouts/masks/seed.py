"""Masks that cost no bytes: drawn again from a seed and the name of the tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from deltakeeper.errors import LayoutError
from deltakeeper.layouts.base import Settings, TensorSpec
from deltakeeper.layouts.bits import byte_view, pack_rows, zero_words
from deltakeeper.layouts.masks.base import Mask, check_count
from deltakeeper.layouts.masks.draws import draw_words
from deltakeeper.layouts.philox import philox_key, seeded_mask
from deltakeeper.layouts.settings import SettingsReader

LEAST_RATE = 2.0**-14  # a seed costs nothing, so the rate alone bounds what a stated count may make a reader draw


@dataclass(frozen=True, eq=False)
class SeedMask(Mask):
    """A mask by its recipe: Philox draws it again (`philox.seeded_mask`).

    Attributes:
        seed: 0 to 2^64 - 1.
        tensor: checkpoint name that goes into the key.
        keep: probability of an entry to be kept, above 0 and at most 1; or one for each row, float32 `(out,)`, each
            of them 0 or at least 2^-14. Entry `i` (flat, row-major) is kept iff its word is below
            `floor(keep * 2^32)`, so rows of one rate are those of the mask with that rate throughout.
    """

    kind: ClassVar[str] = "seed"

    seed: int
    tensor: str
    keep: float | torch.Tensor

    def words(self, shape: tuple[int, int]) -> torch.Tensor:
        """The mask, drawn."""
        if isinstance(self.keep, torch.Tensor):
            return _draw_rows(shape, philox_key(self.seed, self.tensor), self.keep.double().numpy())
        return seeded_mask(shape, seed=self.seed, name=self.tensor, keep=self.keep)

    def tensors(self) -> dict[str, torch.Tensor]:
        """`delta_keep` where each row has its own rate."""
        return {"delta_keep": self.keep} if isinstance(self.keep, torch.Tensor) else {}

    def settings(self) -> Settings:
        """`seed`, `tensor`, and `keep`: the rate, or `row`."""
        keep = "row" if isinstance(self.keep, torch.Tensor) else self.keep
        return {"seed": self.seed, "tensor": self.tensor, "keep": keep}

    @classmethod
    def expect(cls, shape: tuple[int, int], nnz: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """See `Mask.expect`."""
        read = SettingsReader("sparse", settings)
        read.integer("seed", 0, 2**64 - 1)
        if not read.text("tensor").isprintable():  # a lone surrogate, which JSON can spell, has no bytes to hash
            raise LayoutError("setting 'tensor' of layout 'sparse' is no printable name; the artifact is damaged.")
        if settings.get("keep") == "row":
            return {"delta_keep": TensorSpec(torch.float32, (shape[0],))}
        read.fraction("keep")
        return {}

    @classmethod
    def from_tensors(cls, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        """See `Mask.from_tensors`."""
        return cls(settings["seed"], settings["tensor"], tensors.get("delta_keep", settings["keep"]))

    def check(self, shape: tuple[int, int], nnz: int) -> None:
        """See `Mask.check`; a count sixteen standard deviations off is refused without a draw."""
        rates = torch.as_tensor(self.keep, dtype=torch.float64)
        if bool(((rates > 1) | (rates < LEAST_RATE) & (rates != 0)).any()):
            raise LayoutError(
                "a seeded mask of layout 'sparse' keeps less than one entry in 16384 or more than all; "
                "the artifact is damaged."
            )
        entries = shape[1] if rates.dim() else shape[0] * shape[1]
        mean = float(rates.sum()) * entries
        deviation = math.sqrt(max(0.0, float((rates * (1 - rates)).sum()) * entries))
        if abs(nnz - mean) > 16 * (deviation + 1):
            check_count(nnz, round(mean))

    def count(self, shape: tuple[int, int]) -> int:
        """Number of kept entries, drawn piece by piece and without building the mask."""
        rates = np.atleast_1d(np.asarray(self.keep, dtype=np.float64))
        key, entries = philox_key(self.seed, self.tensor), shape[0] * shape[1] // rates.size
        return sum(
            int(np.count_nonzero(words < threshold))
            for index, threshold in enumerate(_thresholds(rates))
            if threshold
            for _, words in draw_words(key, index * entries, entries)
        )


def _thresholds(rates: NDArray[np.float64]) -> NDArray[np.uint64]:
    return (rates * 2**32).astype(np.uint64)


def _draw_rows(shape: tuple[int, int], key: tuple[int, int], rates: NDArray[np.float64]) -> torch.Tensor:
    """Packed mask with one rate for each row; rows of rate zero are not drawn."""
    out, columns = shape
    words = zero_words(out, columns)
    kept = np.empty((1, columns), dtype=np.bool_)
    thresholds = _thresholds(rates)
    for row in np.flatnonzero(thresholds):
        for part, drawn in draw_words(key, int(row) * columns, columns):
            kept[0, part] = drawn < thresholds[row]
        pack_rows(kept, byte_view(words)[row : row + 1])
    return words
