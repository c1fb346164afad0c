"""Packed terms as the kernels read them: rearranged so that neighbouring threads read neighbouring words.

Words and codes lie `[in, out]` here and `[out, in]` on disk; those of signs and codes are woven in blocks of 128 inputs
for the matrix units. Fields are what a kernel finds in the table of addresses:
addresses as integers, then small numbers, floats as their bits.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from deltakeeper.errors import KernelError
from deltakeeper.layouts import Dense, GroupedInt, Layout, Lowrank, Signs, Sparse
from deltakeeper.layouts.bits import unpack_bits
from deltakeeper.layouts.codes import unpack_codes

FIELDS = 10
WIDTHS = (8, 4, 2, 1)
_FLOAT_KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_CODES = 3
_MAX_KEPT = 2**31 - 1


@dataclass(frozen=True, eq=False)
class PackedTerm:
    """One term on its device. What a table holds stays alive with it.

    Attributes:
        kind: name of the layout, which chooses the kernel.
        shape: `(out, in)`.
        tensors: its memory, by what it is.
        fields: numbers for the kernel; a name stands for the address of that tensor.
        rank: of `lowrank`; bits of `grouped_int`; else 0.
        plain: of `signs`: no scale for each input; of `grouped_int`: groups of whole blocks of 128.
    """

    kind: str
    shape: tuple[int, int]
    tensors: dict[str, torch.Tensor]
    fields: tuple[int | str, ...]
    rank: int = 0
    plain: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def numbers(self) -> list[int]:
        """The fields as integers, `FIELDS` of them."""
        found = [self.tensors[entry].data_ptr() if isinstance(entry, str) else entry for entry in self.fields]
        return found + [0] * (FIELDS - len(found))


def pack(term: Layout, device: torch.device | str = "cuda") -> PackedTerm:
    """Rearrange a term and move it to the device.

    `signs` and `grouped_int` take the bytes of disk where the inputs are a multiple of 128, but a plane with zeros
    becomes two planes of half its scale. `sparse` has a bit for each entry whatever mask was
    stored, and where each row starts. Packed factors of `lowrank` become float16 or, where that does not hold them,
    float32.

    Raises:
        KernelError: the term replaces the base's tensor, is no matrix, has no kernel, or is too large for one.
    """
    make = _MAKERS.get(type(term))
    if make is None or term.replaces or len(term.shape) != 2:
        raise KernelError(
            f"a term of layout '{term.name}' and shape {term.shape} has no product on a GPU; merge it into the base."
        )
    made = make(term)
    tensors = {name: tensor.contiguous().to(device) for name, tensor in made.tensors.items()}
    return PackedTerm(made.kind, made.shape, tensors, made.fields, made.rank, made.plain, torch.device(device))


def _signs(term: Signs) -> PackedTerm:
    out, columns = term.shape
    planes = list(term.packed)
    scales = [scale.reshape(-1) for scale in term.scales]  # of 1, out or in
    if term.nonzero is not None:  # two planes of half the scale, which differ where a sign is zero
        planes = [one for plane in planes for one in (plane | ~term.nonzero, plane & term.nonzero)]
        scales = [scale / 2 for scale in scales for _ in range(2)]
    tensors = {"words": torch.stack([_weave(plane) for plane in planes])}
    if term.scale == "column":
        gains = [_power_above(scale) for scale in scales]
        tensors["scales"] = torch.stack([scale / gain for scale, gain in zip(scales, gains, strict=True)])
        tensors["factors"] = torch.tensor(gains)[:, None]
    else:
        tensors["factors"] = torch.stack(scales)
    fields = (
        "words",
        "factors",
        int(term.scale == "row"),
        "scales" if "scales" in tensors else 0,
        len(planes),
        tensors["words"][0].numel() * 4,
    )
    return PackedTerm(term.name, (out, columns), tensors, fields, plain=term.scale != "column")


def _weave(words: torch.Tensor) -> torch.Tensor:
    """Words of 32 inputs, `(out, ceil(in/32))`, as the matrix units take them: `(ceil(in/128), out, 4)`.

    Of 128 inputs word t has the numbers 16 i + 4 t + 2 r + e, at bit 2 i + r + 16 e: a thread of the operand that lies
    in registers has these, in pairs of e, so that one operation expands two.
    """
    out = len(words)
    words = torch.nn.functional.pad(words, (0, -words.shape[1] % 4)).reshape(out, -1, 4)
    woven = torch.zeros_like(words)
    for step in range(8):
        fours = words[..., step // 2, None] >> (16 * (step % 2) + 4 * torch.arange(4)) & 15
        even, odd = fours & 1 | fours >> 1 & 2, fours >> 1 & 1 | fours >> 2 & 2
        woven |= (even | odd << 16) << 2 * step
    return woven.permute(1, 0, 2)


def _codes(term: GroupedInt) -> PackedTerm:
    out, columns = term.shape
    codes = unpack_codes(term.packed, term.bits, columns)
    tensors = {"words": _weave_codes(codes, term.bits), "steps": term.scale.T}
    signs = term.bits == 1 and term.zero_point is None
    if term.zero_point is not None:
        tensors["zeros"] = term.zero_point.T
    group = min(term.group, columns) or columns
    fields = (
        "words",
        "steps",
        0 if term.zero_point is None else "zeros",
        term.bits,
        group,
        _FLOAT_KINDS[term.scale.dtype],
        _bits_of(term.gain),
        0 if term.zero_point is not None else 1 if signs else 2 ** (term.bits - 1),
        2 if signs else 1,
    )
    return PackedTerm(
        term.name, (out, columns), tensors, fields, rank=term.bits, plain=group >= columns or group % 128 == 0
    )


def _weave_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `(out, in)` in the order of `_weave`: int32 `(ceil(in/128), out, 4 * bits)`, the larger fields first.

    A field of w bits has w words of each t: pair p = 2 i + r is slot `p % (16 / w)` of word `p // (16 / w)`.
    """
    out, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % 128)).reshape(out, -1, 8, 4, 2, 2)  # i, t, r, e
    ordered = padded.permute(1, 0, 5, 2, 4, 3).reshape(-1, out, 2, 16, 4).int()  # e, pair, t
    parts, below = [], 0
    for width in WIDTHS:
        if bits & width:
            slots = (ordered >> below & 2**width - 1).reshape(-1, out, 2, width, 16 // width, 4)
            words = torch.zeros_like(slots[:, :, 0, :, 0])
            for half in range(2):
                for slot in range(16 // width):
                    words |= slots[:, :, half, :, slot] << 16 * half + width * slot
            parts.append(words.reshape(-1, out, width * 4))
            below += width
    return torch.cat(parts, dim=2)


def _sparse(term: Sparse) -> PackedTerm:
    out, columns = term.shape
    if term.nnz > _MAX_KEPT:
        raise KernelError(f"a sparse term keeps {term.nnz} entries, more than the GPU kernel counts; leave it merged.")
    kept = unpack_bits(term.mask, columns).sum(dim=1)
    tensors = {
        "words": term.mask.T,
        "starts": (torch.cumsum(kept, 0) - kept).to(torch.int32),
        "values": term.values if term.values.numel() else term.values.new_zeros(1),
        "factors": term.gain.reshape(-1),
    }
    kind = _FLOAT_KINDS[term.values.dtype] if term.bits is None else _CODES
    row = int(term.gain.dim() == 2)
    numbers = (
        (0, 0, 0) if term.bits is None else (term.bits, 1, 2) if term.bits == 1 else (term.bits, term.zero_point, 1)
    )
    return PackedTerm(term.name, (out, columns), tensors, ("words", "starts", "values", kind, "factors", row, *numbers))


def _lowrank(term: Lowrank) -> PackedTerm:
    left, right = term.left, term.right
    if term.packed is not None:
        left, right = _smaller(left), _smaller(right)
        dtype = torch.promote_types(left.dtype, right.dtype)
        left, right = left.to(dtype), right.to(dtype)
    tensors = {"right": right, "left": left.T}  # (rank, in) and (rank, out)
    fields = ("right", "left", _FLOAT_KINDS[left.dtype], term.rank, _bits_of(term.gain))
    return PackedTerm(term.name, (term.shape[0], term.shape[1]), tensors, fields, rank=term.rank)


def _dense(term: Dense) -> PackedTerm:
    fields = ("stored", _FLOAT_KINDS[term.stored.dtype])
    return PackedTerm(term.name, (term.shape[0], term.shape[1]), {"stored": term.stored}, fields)


def _power_above(values: torch.Tensor) -> float:
    """The least power of two that is not below any magnitude, 1 for zeros."""
    peak = float(values.abs().max())
    return math.ldexp(1.0, math.frexp(peak)[1]) if peak else 1.0


def _smaller(values: torch.Tensor) -> torch.Tensor:
    """As float16 where every entry survives the way there and back to 11 bits, else as they are."""
    half = values.half()
    near = (half.float() - values).abs() <= values.abs() * 2.0**-11
    return half if bool(near.all()) else values


def _bits_of(gain: torch.Tensor) -> int:
    found: int = struct.unpack("<i", struct.pack("<f", float(gain)))[0]
    return found


_MAKERS: dict[type[Layout], Callable[..., PackedTerm]] = {
    Signs: _signs,
    GroupedInt: _codes,
    Sparse: _sparse,
    Lowrank: _lowrank,
    Dense: _dense,
}
