"""The `grouped_int` layout: whole numbers of 1 to 8 bits with a scale for each group of neighbours in a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from deltakeeper.errors import LayoutError
from deltakeeper.layouts.base import Layout, Settings, TensorSpec, register_layout
from deltakeeper.layouts.bits import row_blocks
from deltakeeper.layouts.codes import code_padding_is_clear, code_words, pack_codes, unpack_codes
from deltakeeper.layouts.gain import split_gain
from deltakeeper.layouts.groups import group_codes, group_scales, groups_per_row, spread_groups
from deltakeeper.layouts.settings import FLOAT_DTYPES, SettingsReader, check_finite, check_matrix_shape, dtype_name

SCALE_DTYPES = ("float16", "float32")
MAX_GROUP = 1 << 31


@register_layout()
@dataclass(frozen=True, eq=False)
class GroupedInt(Layout):
    """`scale * gain * q`, in float32 with the scale times the gain first: the same bits on every machine.

    A stored code `c` means `q = c - zero_point`, without zero points `q = c - 2^(bits-1)`, or of one bit `q = 2c - 1`.

    Attributes:
        bits: 1 to 8.
        group: neighbours along `in` that share a scale, 0 for a whole row; the last group of a row may be shorter.
        packed: the codes, int32 `(out, ceil(in * bits / 32))`, in the order of `layouts.codes`.
        scale: float16 or float32 `(out, groups)`.
        gain: float32 `(1,)`, a power of two, so that float16 scales hold deltas of any magnitude.
        zero_point: the code of zero of each group, uint8 `(out, groups)`, or None where the codes are symmetric.
    """

    name: ClassVar[str] = "grouped_int"
    summary: ClassVar[str] = "whole numbers of 1 to 8 bits with a scale, and perhaps a zero point, per group of a row"

    bits: int
    group: int
    packed: torch.Tensor
    scale: torch.Tensor
    gain: torch.Tensor
    zero_point: torch.Tensor | None = None

    @classmethod
    def from_matrix(
        cls, matrix: torch.Tensor, bits: int, group: int, *, symmetric: bool = True, scale_dtype: str = "float16"
    ) -> Self:
        """Round to the nearest code, ties to even, with scales that come from each group's largest entries.

        Args:
            matrix: float32 `(out, in)`, finite.
            bits: 1 to 8.
            group: see the class.
            symmetric: half a step more than the largest magnitude is covered on either side; else the range from the
                least to the largest entry, stretched to contain zero, which is one of the codes.
            scale_dtype: float16 or float32.

        Raises:
            LayoutError: the largest code times its scale leaves float32.
        """
        scale, zero_point = group_scales(matrix, bits, group, symmetric=symmetric)
        stored = stored_scale(scale, scale_dtype)
        codes = group_codes(matrix, stored, bits, group, zero_point)
        return cls._made(codes, stored, bits, group, zero_point, scale_dtype)

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        scale: torch.Tensor,
        *,
        bits: int,
        group: int,
        zero_point: torch.Tensor | None = None,
        scale_dtype: str = "float16",
    ) -> Self:
        """Pack `scale * codes`, or `scale * (codes - zero_point)`.

        Args:
            codes: whole numbers `(out, in)`, int8, uint8 or int16: without zero points from `-2^(bits-1)` to
                `2^(bits-1) - 1` (of one bit -1 and 1), with them from 0 to `2^bits - 1`.
            scale: float32 `(out, groups)`; what `stored_scale` gives is kept exactly.
            bits: 1 to 8.
            group: see the class.
            zero_point: whole numbers from 0 to `2^bits - 1`, `(out, groups)`.
            scale_dtype: float16 or float32.

        Raises:
            LayoutError: a code or zero point is out of range, or a scale leaves float32.
        """
        packable = torch.empty(codes.shape, dtype=torch.uint8)
        for rows in row_blocks(codes.shape[0], codes.shape[1]):
            wide = codes[rows].to(torch.int16)
            if zero_point is None and bits == 1:
                wide = torch.where(wide.abs() == 1, (wide + 1) // 2, -1)
            elif zero_point is None:
                wide += 2 ** (bits - 1)
            low, high = torch.aminmax(wide)
            if int(low) < 0 or int(high) >= 2**bits:
                raise LayoutError(f"a code of layout 'grouped_int' does not fit {bits} bits; clamp the codes first.")
            packable[rows] = wide
        return cls._made(packable, scale.float(), bits, group, zero_point, scale_dtype)

    @classmethod
    def _made(
        cls,
        codes: torch.Tensor,
        scale: torch.Tensor,
        bits: int,
        group: int,
        zero_point: torch.Tensor | None,
        scale_dtype: str,
    ) -> Self:
        check_finite(cls.name, {"delta_scale": scale})
        stored, gain = split_gain(scale, FLOAT_DTYPES[scale_dtype])
        shape = (codes.shape[0], codes.shape[1])
        zeros = None if zero_point is None else zero_point.to(torch.uint8).contiguous()
        factor = torch.tensor([gain], dtype=torch.float32)
        return cls(shape, bits, group, pack_codes(codes, bits), stored, factor, zeros)._checked()

    def _checked(self) -> Self:
        """Refuse zero points that are no codes, and steps at which a code would leave float32."""
        largest = 2 ** (self.bits - 1) if self.zero_point is None else 2**self.bits - 1
        if not bool(torch.isfinite(self.steps.abs().amax() * largest)) or float(self.gain) <= 0.0:
            raise LayoutError("the scales of layout 'grouped_int' leave float32; do not use it.")
        if self.zero_point is not None and int(self.zero_point.max()) >= 2**self.bits:
            raise LayoutError(f"a zero point of layout 'grouped_int' does not fit {self.bits} bits; do not use it.")
        return self

    @property
    def steps(self) -> torch.Tensor:
        """`scale * gain`, float32 `(out, groups)`."""
        return self.scale.float() * self.gain

    def tensors(self) -> dict[str, torch.Tensor]:
        """`delta_packed`, `delta_scale`, `delta_gain`, and `delta_zero_point` where the codes are not symmetric."""
        payload = {"delta_packed": self.packed, "delta_scale": self.scale, "delta_gain": self.gain}
        return payload if self.zero_point is None else payload | {"delta_zero_point": self.zero_point}

    def settings(self) -> Settings:
        """`bits`, `group`, dtype of the `scale`, `zero_point` (`none` or `group`)."""
        zeros = "none" if self.zero_point is None else "group"
        return {"bits": self.bits, "group": self.group, "scale": dtype_name(self.scale.dtype), "zero_point": zeros}

    @classmethod
    def payload_bytes(
        cls, shape: tuple[int, int], bits: int, group: int, *, symmetric: bool = True, scale_dtype: str = "float16"
    ) -> int:
        """Bytes that a matrix of this shape takes."""
        zeros = "none" if symmetric else "group"
        specs = cls.expect(shape, {"bits": bits, "group": group, "scale": scale_dtype, "zero_point": zeros})
        return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs.values())

    @classmethod
    def expect(cls, shape: tuple[int, ...], settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """See `Layout.expect`."""
        out, columns = check_matrix_shape(cls.name, shape)
        read = SettingsReader(cls.name, settings)
        bits = read.integer("bits", 1, 8)
        groups = (out, groups_per_row(columns, read.integer("group", 0, MAX_GROUP)))
        payload = {
            "delta_packed": TensorSpec(torch.int32, (out, code_words(columns, bits))),
            "delta_scale": TensorSpec(FLOAT_DTYPES[read.choice("scale", SCALE_DTYPES)], groups),
            "delta_gain": TensorSpec(torch.float32, (1,)),
        }
        zeros = {"delta_zero_point": TensorSpec(torch.uint8, groups)}
        return payload | (zeros if read.choice("zero_point", ("none", "group")) == "group" else {})

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, ...], settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> Self:
        """See `Layout.from_tensors`."""
        cls.check_payload(shape, settings, tensors)
        check_finite(cls.name, tensors)
        out, columns = shape
        bits: int = settings["bits"]
        packed, scale, gain = tensors["delta_packed"], tensors["delta_scale"], tensors["delta_gain"]
        if not code_padding_is_clear(packed, bits, columns):
            raise LayoutError(
                "payload 'delta_packed' of layout 'grouped_int' has padding bits set; the artifact is damaged."
            )
        zeros = tensors.get("delta_zero_point")
        return cls((out, columns), bits, settings["group"], packed, scale, gain, zeros)._checked()

    def to_dense(self) -> torch.Tensor:
        """Every code minus its zero, times its step, float32."""
        dense = torch.empty(self.shape[0], self.shape[1])
        for rows in row_blocks(self.shape[0], self.shape[1]):
            dense.numpy()[rows] = self._decode(rows)
        return dense

    def merge_rows(self, base: torch.Tensor | None, rows: slice, into: torch.Tensor) -> bool:
        """See `Layout.merge_rows`; for every dtype."""
        first, *_ = rows.indices(self.shape[0])
        for part in row_blocks(len(into), self.shape[1]):
            decoded = torch.from_numpy(self._decode(slice(first + part.start, first + part.stop)))
            into[part] = decoded if base is None else torch.add(decoded, base[part])
        return True

    def numbers(self, rows: slice = slice(None)) -> NDArray[np.float32]:
        """The whole numbers `q` of some rows, as float32 `(rows, in)`."""
        columns = self.shape[1]
        found = unpack_codes(self.packed[rows], self.bits, columns).numpy().astype(np.float32)
        if self.zero_point is not None:
            found -= spread_groups(self.zero_point[rows], self.group, columns)
        elif self.bits == 1:
            found *= np.float32(2)
            found -= np.float32(1)
        else:
            found -= np.float32(2 ** (self.bits - 1))
        return found

    def _decode(self, rows: slice) -> NDArray[np.float32]:
        found = self.numbers(rows)
        found *= spread_groups(self.scale[rows].float() * self.gain, self.group, self.shape[1])
        return found

    def continuous(self) -> dict[str, torch.Tensor]:
        """`delta_scale`: what is trained instead is `steps`, float32."""
        return {"delta_scale": self.steps}

    def dense_from(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`to_dense` with other steps, differentiable in them."""
        width = self.group or self.shape[1]
        spread = values["delta_scale"].repeat_interleave(width, dim=1)[:, : self.shape[1]]
        return torch.from_numpy(self.numbers()).to(spread.device) * spread

    def replace_continuous(self, values: Mapping[str, torch.Tensor]) -> Self:
        """The same codes with other steps, rounded to the stored dtype."""
        steps = values["delta_scale"].detach().float().cpu()
        check_finite(self.name, {"delta_scale": steps})
        stored, gain = split_gain(steps, self.scale.dtype)
        return replace(self, scale=stored, gain=torch.tensor([gain], dtype=torch.float32))._checked()


def stored_scale(scale: torch.Tensor, dtype: str) -> torch.Tensor:
    """What scales become when they are stored together: float32 in, float32 out, idempotent."""
    stored, gain = split_gain(scale, FLOAT_DTYPES[dtype])
    return stored.float() * gain
