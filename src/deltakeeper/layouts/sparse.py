"""The `sparse` layout: some entries and a mask, which is either stored as bits or drawn again from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch

from deltakeeper.errors import LayoutError
from deltakeeper.layouts.base import Layout, Settings, TensorSpec, register_layout
from deltakeeper.layouts.bits import (
    byte_view,
    count_bits,
    padding_is_clear,
    row_blocks,
    unpack_rows,
    words_per_row,
)
from deltakeeper.layouts.gain import split_gain
from deltakeeper.layouts.philox import seeded_mask
from deltakeeper.layouts.settings import (
    FLOAT_DTYPES,
    SettingsReader,
    check_finite,
    check_matrix_shape,
    dtype_name,
)


@dataclass(frozen=True)
class SeedMask:
    """A mask by its recipe: `philox.seeded_mask` draws it again.

    Attributes:
        seed: 0 to 2^64 - 1.
        tensor: checkpoint name that goes into the key.
        keep: probability of an entry to be kept, above 0 and at most 1.
    """

    seed: int
    tensor: str
    keep: float

    def draw(self, shape: tuple[int, int]) -> torch.Tensor:
        """Packed bits, int32 `(out, ceil(in/32))`."""
        return seeded_mask(shape, seed=self.seed, name=self.tensor, keep=self.keep)


@register_layout()
@dataclass(frozen=True, eq=False)
class Sparse(Layout):
    """`gain * values` at the set bits of a mask in row-major order, zero elsewhere.

    Attributes:
        values: `(nnz,)`, float16, bfloat16 or float32.
        gain: float32 `(1,)`.
        mask: packed bits, int32 `(out, ceil(in/32))`; part of the payload unless it has a recipe.
        recipe: how to draw the mask again, or None.
    """

    name: ClassVar[str] = "sparse"
    summary: ClassVar[str] = "kept entries with a bit mask or a seed"

    values: torch.Tensor
    gain: torch.Tensor
    mask: torch.Tensor
    recipe: SeedMask | None = None

    @classmethod
    def from_matrix(
        cls,
        matrix: torch.Tensor,
        mask: torch.Tensor,
        values: str,
        *,
        factor: float = 1.0,
        recipe: SeedMask | None = None,
    ) -> Self:
        """Pack `factor * matrix` at the set bits of `mask`.

        Args:
            matrix: float32 `(out, in)`.
            mask: packed bits of the entries to keep.
            values: dtype to store, one of float16, bfloat16, float32.
            factor: multiplies every kept entry.
            recipe: says that `mask` is what this recipe draws, so that only the seed is stored.

        Raises:
            LayoutError: a scaled entry does not fit float32.
        """
        out, columns = matrix.shape
        dense = matrix.numpy()
        kept = np.concatenate(
            [
                dense[rows][unpack_rows(byte_view(mask)[rows], columns).view(np.bool_)]
                for rows in row_blocks(out, columns)
            ]
        )
        with np.errstate(over="ignore"):  # overflow becomes infinity, which is refused below
            kept *= np.float32(factor)
        packed = torch.from_numpy(kept)
        check_finite(cls.name, {"delta_values": packed})
        stored, gain = split_gain(packed, FLOAT_DTYPES[values])
        return cls((out, columns), stored, torch.tensor([gain], dtype=torch.float32), mask, recipe)

    @property
    def nnz(self) -> int:
        """Number of kept entries."""
        return self.values.numel()

    def tensors(self) -> dict[str, torch.Tensor]:
        """`delta_values`, `delta_gain`, and `delta_bitmask` where the mask has no recipe."""
        payload = {"delta_values": self.values, "delta_gain": self.gain}
        return payload if self.recipe else payload | {"delta_bitmask": self.mask}

    def settings(self) -> Settings:
        """`values` (dtype), `nnz`, `mask` (`bits` or `seed`), and of a seeded mask `seed`, `tensor`, `keep`."""
        found: Settings = {"values": dtype_name(self.values.dtype), "nnz": self.nnz, "mask": "bits"}
        if self.recipe is not None:
            found |= {
                "mask": "seed",
                "seed": self.recipe.seed,
                "tensor": self.recipe.tensor,
                "keep": self.recipe.keep,
            }
        return found

    @classmethod
    def expect(cls, shape: tuple[int, ...], settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """See `Layout.expect`."""
        out, columns = check_matrix_shape(cls.name, shape)
        read = SettingsReader(cls.name, settings)
        dtype = FLOAT_DTYPES[read.choice("values", tuple(FLOAT_DTYPES))]
        payload = {
            "delta_values": TensorSpec(dtype, (read.integer("nnz", 0, out * columns),)),
            "delta_gain": TensorSpec(torch.float32, (1,)),
        }
        if _recipe(read):
            return payload
        return payload | {"delta_bitmask": TensorSpec(torch.int32, (out, words_per_row(columns)))}

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, ...], settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> Self:
        """See `Layout.from_tensors`; a seeded mask is drawn here, once."""
        cls.check_payload(shape, settings, tensors)
        check_finite(cls.name, tensors)
        out, columns = shape
        recipe = _recipe(SettingsReader(cls.name, settings))
        mask = recipe.draw((out, columns)) if recipe else tensors["delta_bitmask"]
        if not padding_is_clear(mask, columns):
            raise LayoutError(
                "payload 'delta_bitmask' of layout 'sparse' has padding bits set; the artifact is damaged."
            )
        if (kept := count_bits(mask)) != settings["nnz"]:
            raise LayoutError(
                f"layout 'sparse' states {settings['nnz']} kept entries but its mask has {kept}; "
                "the artifact is damaged."
            )
        return cls((out, columns), tensors["delta_values"], tensors["delta_gain"], mask, recipe)

    def to_dense(self) -> torch.Tensor:
        """Zeros with the kept entries put in place, float32."""
        out, columns = self.shape
        dense = torch.zeros(out, columns)
        array, kept = dense.numpy(), (self.values.float() * self.gain).numpy()
        start = 0
        for rows in row_blocks(out, columns):
            chosen = unpack_rows(byte_view(self.mask)[rows], columns).view(np.bool_)
            stop = start + int(np.count_nonzero(chosen))
            array[rows][chosen] = kept[start:stop]
            start = stop
        return dense


def _recipe(read: SettingsReader) -> SeedMask | None:
    if read.choice("mask", ("bits", "seed")) == "bits":
        return None
    return SeedMask(read.integer("seed", 0, 2**64 - 1), read.text("tensor"), read.fraction("keep"))
