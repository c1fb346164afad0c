"""No compression: the exact reference that every other codec is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltakeeper.codecs.base import Codec, Inputs, register_codec
from deltakeeper.codecs.matrices import checked
from deltakeeper.layouts.base import Layout
from deltakeeper.layouts.dense import Dense


@register_codec()
@dataclass(frozen=True)
class DenseCodec(Codec):
    """The fine-tuned tensor itself where it is given (bit-exact), else the float32 delta."""

    name: ClassVar[str] = "dense"
    title: ClassVar[str] = "Uncompressed"
    summary: ClassVar[str] = "every entry, exactly"
    paper: ClassVar[str] = ""
    boxless: ClassVar[str] = "every entry is stored, so no two deltas are alike to it"

    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """See `Codec.encode`; one `dense` term, whose shape and dtype are those of `tuned` where it is given."""
        if tuned is not None:
            value = tuned.detach().to("cpu", copy=True).contiguous()
            return [Dense(tuple(value.shape), "value", value)]
        matrix = checked(delta, name).clone()
        return [Dense(tuple(matrix.shape), "delta", matrix)]
