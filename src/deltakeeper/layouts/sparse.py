"""The `sparse` layout: kept entries of a matrix as floats, signs or b-bit codes, and where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from deltakeeper.errors import LayoutError
from deltakeeper.layouts.base import Layout, Settings, TensorSpec, register_layout
from deltakeeper.layouts.bits import count_bits, unpack_bits
from deltakeeper.layouts.codes import code_padding_is_clear, code_words
from deltakeeper.layouts.gain import split_gain
from deltakeeper.layouts.masks import MASKS, BitMask, Mask, SeedMask, check_count, chosen_rows, gather
from deltakeeper.layouts.settings import (
    FLOAT_DTYPES,
    SettingsReader,
    check_finite,
    check_matrix_shape,
    dtype_name,
)
from deltakeeper.layouts.streams import pack_stream, unpack_stream

MIN_BITS, MAX_BITS = 2, 8
MAX_DRAWN = 1 << 29


@register_layout()
@dataclass(frozen=True, eq=False)
class Sparse(Layout):
    """`gain * value` at the set bits of a mask in row-major order, zero elsewhere.

    Attributes:
        values: floats `(nnz,)` in float16, bfloat16 or float32; or an int32 stream of `bits`-bit codes.
        gain: float32 `(1,)`, or `(out, 1)` for one per row (codes only).
        places: which entries are kept, as it is stored.
        bits: None for floats; 1 for signs, whose value is +1 (bit 1) or -1; 2 to 8 for codes.
        zero_point: the code of zero, where `bits` is 2 to 8: the value is `code - zero_point`.
        count: number of kept entries, which a stream of codes does not tell; None for that of float `values`.
    """

    name: ClassVar[str] = "sparse"
    summary: ClassVar[str] = "kept entries as floats, signs or codes, with a mask as bits, gaps, two of four or a seed"

    values: torch.Tensor
    gain: torch.Tensor
    places: Mask
    bits: int | None = None
    zero_point: int = 0
    count: int | None = None

    @classmethod
    def from_matrix(cls, matrix: torch.Tensor, mask: torch.Tensor | Mask, values: str, *, factor: float = 1.0) -> Self:
        """Pack `factor * matrix` at the set bits of `mask`, as floats.

        Args:
            matrix: float32 `(out, in)`.
            mask: the entries to keep, as they shall be stored; packed bits are stored as bits.
            values: dtype to store, one of float16, bfloat16, float32.
            factor: multiplies every kept entry.

        Raises:
            LayoutError: a scaled entry does not fit float32.
        """
        places, words = _placed(mask, matrix)
        kept = gather(matrix.numpy(), words)
        with np.errstate(over="ignore"):  # overflow becomes infinity, which is refused below
            kept *= np.float32(factor)
        packed = torch.from_numpy(kept)
        check_finite(cls.name, {"delta_values": packed})
        stored, gain = split_gain(packed, FLOAT_DTYPES[values])
        return cls._made(matrix, stored, torch.tensor([gain], dtype=torch.float32), places, words, kept.size)

    @classmethod
    def from_signs(cls, matrix: torch.Tensor, mask: torch.Tensor | Mask, magnitude: float) -> Self:
        """Pack `magnitude * sign(matrix)` at the set bits of `mask`; a kept zero counts as minus.

        Raises:
            LayoutError: the magnitude does not fit float32.
        """
        places, words = _placed(mask, matrix)
        gain = torch.tensor([magnitude], dtype=torch.float64).float()
        check_finite(cls.name, {"delta_gain": gain})
        kept = gather(matrix.numpy() > 0, words)
        return cls._made(matrix, pack_stream(kept.view(np.uint8), 1), gain, places, words, kept.size, bits=1)

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        scale: torch.Tensor,
        mask: torch.Tensor | Mask,
        *,
        bits: int,
        zero_point: int | None = None,
    ) -> Self:
        """Pack `scale * codes` (or `scale * (codes - zero_point)`) at the set bits of `mask`.

        Args:
            codes: whole numbers `(out, in)`, int8, uint8 or int16; those that are not kept are not read. From
                `-2^(bits-1)` to `2^(bits-1) - 1`, or from 0 to `2^bits - 1` where there is a `zero_point`.
            scale: float32 `(1,)`, or `(out, 1)` for one per row.
            mask: the entries to keep, as they shall be stored; packed bits are stored as bits.
            bits: 2 to 8.
            zero_point: the code that means zero, 0 to `2^bits - 1`; None for symmetric codes.

        Raises:
            LayoutError: a kept code does not fit `bits`, or a scale is not finite.
        """
        places, words = _placed(mask, codes)
        kept = gather(codes.numpy(), words).astype(np.int16)
        offset = 2 ** (bits - 1) if zero_point is None else 0
        kept += np.int16(offset)
        if kept.size and not 0 <= kept.min() <= kept.max() < 2**bits:
            raise LayoutError(f"a code of layout 'sparse' does not fit {bits} bits; clamp the codes first.")
        gain = scale.float().contiguous()
        check_finite(cls.name, {"delta_gain": gain})
        stream = pack_stream(kept.astype(np.uint8), bits)
        zero = offset if zero_point is None else zero_point
        return cls._made(codes, stream, gain, places, words, kept.size, bits=bits, zero_point=zero)

    @classmethod
    def _made(
        cls,
        matrix: torch.Tensor,
        values: torch.Tensor,
        gain: torch.Tensor,
        places: Mask,
        words: torch.Tensor,
        count: int,
        *,
        bits: int | None = None,
        zero_point: int = 0,
    ) -> Self:
        term = cls((matrix.shape[0], matrix.shape[1]), values, gain, places, bits, zero_point, count)
        term.__dict__["mask"] = words  # what `mask` would work out again
        return term

    @cached_property
    def mask(self) -> torch.Tensor:
        """Packed bits of the kept entries, int32 `(out, ceil(in/32))`, whatever kind is stored."""
        return self.places.words((self.shape[0], self.shape[1]))

    @property
    def nnz(self) -> int:
        """Number of kept entries."""
        return self.values.numel() if self.count is None else self.count

    def tensors(self) -> dict[str, torch.Tensor]:
        """`delta_values` (floats) or `delta_packed` (signs, codes), `delta_gain`, and the mask's own."""
        values = "delta_values" if self.bits is None else "delta_packed"
        return {values: self.values, "delta_gain": self.gain} | self.places.tensors()

    def settings(self) -> Settings:
        """`values`, `nnz`, `mask` (kind) with the mask's own; of codes also `bits`, `zero_point` and `scale`."""
        found: Settings = {"values": "sign", "nnz": self.nnz, "mask": self.places.kind}
        if self.bits is None:
            found["values"] = dtype_name(self.values.dtype)
        elif self.bits > 1:
            scale = "tensor" if self.gain.dim() == 1 else "row"
            found |= {"values": "int", "bits": self.bits, "zero_point": self.zero_point, "scale": scale}
        return found | self.places.settings()

    @classmethod
    def expect(cls, shape: tuple[int, ...], settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """See `Layout.expect`."""
        out, columns = check_matrix_shape(cls.name, shape)
        read = SettingsReader(cls.name, settings)
        kind = read.choice("values", (*FLOAT_DTYPES, "sign", "int"))
        nnz = read.integer("nnz", 0, out * columns)
        gain: tuple[int, ...] = (1,)
        if kind == "int":
            bits = read.integer("bits", MIN_BITS, MAX_BITS)
            read.integer("zero_point", 0, 2**bits - 1)
            gain = (out, 1) if read.choice("scale", ("tensor", "row")) == "row" else gain
            payload = {"delta_packed": TensorSpec(torch.int32, (code_words(nnz, bits),))}
        elif kind == "sign":
            payload = {"delta_packed": TensorSpec(torch.int32, (code_words(nnz, 1),))}
        else:
            payload = {"delta_values": TensorSpec(FLOAT_DTYPES[kind], (nnz,))}
        payload["delta_gain"] = TensorSpec(torch.float32, gain)
        return payload | MASKS[read.choice("mask", tuple(MASKS))].expect((out, columns), nnz, settings)

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, ...], settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> Self:
        """See `Layout.from_tensors`; a seeded mask is drawn here, once, and the others only when they are used."""
        cls.check_payload(shape, settings, tensors)
        check_finite(cls.name, tensors)
        out, columns = shape
        nnz: int = settings["nnz"]
        places = MASKS[settings["mask"]].from_tensors(settings, tensors)
        places.check((out, columns), nnz)
        gain = tensors["delta_gain"]
        if settings["values"] in FLOAT_DTYPES:
            term = cls((out, columns), tensors["delta_values"], gain, places, count=nnz)
        else:
            bits, zero_point = (settings["bits"], settings["zero_point"]) if settings["values"] == "int" else (1, 0)
            stream = tensors["delta_packed"]
            if nnz and not code_padding_is_clear(stream[None], bits, nnz):
                raise LayoutError(
                    "payload 'delta_packed' of layout 'sparse' has padding bits set; the artifact is damaged."
                )
            term = cls((out, columns), stream, gain, places, bits, zero_point, nnz)
        if isinstance(places, SeedMask):
            at_once = out * columns <= MAX_DRAWN  # the mask is kept for use; a larger one might be an attack on memory
            check_count(nnz, count_bits(term.mask) if at_once else places.count((out, columns)))
        return term

    def to_dense(self) -> torch.Tensor:
        """Zeros with the kept entries put in place, float32."""
        dense = torch.zeros(self.shape[0], self.shape[1])
        array, gain = dense.numpy(), self.gain.numpy()
        start = 0
        for rows, chosen in chosen_rows(self.mask, self.shape[1]):
            each = np.count_nonzero(chosen, axis=1)
            stop = start + int(each.sum())
            factor = gain if self.gain.dim() == 1 else np.repeat(gain[rows, 0], each)
            with np.errstate(over="ignore"):  # a hostile gain gives infinity, as every other product of float32 does
                array[rows][chosen] = self._read(start, stop) * factor
            start = stop
        return dense

    def continuous(self) -> dict[str, torch.Tensor]:
        """The kept entries before their gain, `delta_values`; of signs and codes the gain, `delta_gain`."""
        return {"delta_values": self.values.float()} if self.bits is None else {"delta_gain": self.gain}

    def dense_from(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Layout.dense_from`."""
        chosen = unpack_bits(self.mask, self.shape[1])
        if self.bits is None:
            kept = values["delta_values"] * self.gain
            return torch.zeros(self.shape).masked_scatter(chosen, kept)
        codes = torch.from_numpy(self._read(0, self.nnz))
        return torch.zeros(self.shape).masked_scatter(chosen, codes) * values["delta_gain"]

    def replace_continuous(self, values: Mapping[str, torch.Tensor]) -> Self:
        """See `Layout.replace_continuous`."""
        if self.bits is None:
            found = values["delta_values"].detach().to(self.values.dtype)
            term = replace(self, values=found)
        else:
            found = values["delta_gain"].detach().float().contiguous()
            term = replace(self, gain=found)
        check_finite(self.name, {"values": found})
        term.__dict__["mask"] = self.mask
        return term

    def _read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Kept entries `start .. stop - 1` before their gain, float32."""
        if self.bits is None:
            return self.values[start:stop].float().numpy()
        codes = unpack_stream(self.values, self.bits, start, stop).astype(np.float32)
        return codes * np.float32(2) - np.float32(1) if self.bits == 1 else codes - np.float32(self.zero_point)


def _placed(mask: torch.Tensor | Mask, matrix: torch.Tensor) -> tuple[Mask, torch.Tensor]:
    places = BitMask(mask) if isinstance(mask, torch.Tensor) else mask
    return places, places.words((matrix.shape[0], matrix.shape[1]))
