"""Sums of codecs: each one encodes what those before it left over, so "1-bit plus rank 8" needs no code of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltakeeper.codecs.base import Codec
from deltakeeper.codecs.matrices import checked
from deltakeeper.errors import CodecError
from deltakeeper.layouts.base import Layout


@dataclass(frozen=True)
class SumCodec(Codec):
    """`parts[0]` of the delta, then `parts[1]` of the residual, and so on; spelled `a+b`.

    Attributes:
        parts: two or more codecs, none of them a sum.
    """

    name: ClassVar[str] = "sum"
    title: ClassVar[str] = "Sum of codecs"
    summary: ClassVar[str] = "each codec encodes what the previous ones left over"
    paper: ClassVar[str] = ""

    parts: tuple[Codec, ...]

    def __post_init__(self) -> None:
        if len(self.parts) < 2 or not all(isinstance(p, Codec) and not isinstance(p, SumCodec) for p in self.parts):
            raise CodecError("a sum needs two or more codecs, none of them a sum; write them as a+b.")

    def encode(self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None) -> list[Layout]:
        """See `Codec.encode`; parts never see `tuned`, because a value cannot be added to."""
        left_over = checked(delta, name).clone()
        terms: list[Layout] = []
        for index, part in enumerate(self.parts):
            found = part.encode(left_over, name=name)
            terms += found
            if index + 1 < len(self.parts):
                for term in found:
                    left_over -= term.to_dense()
        return terms
