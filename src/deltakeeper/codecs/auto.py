"""`auto`: stands for whichever codec a budget finds best for each tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltakeeper.codecs.base import Codec, Inputs
from deltakeeper.errors import CodecError
from deltakeeper.layouts.base import Layout


@dataclass(frozen=True)
class Auto(Codec):
    """A placeholder that `budget.allocate` replaces tensor by tensor; not registered, since it encodes nothing."""

    name: ClassVar[str] = "auto"
    title: ClassVar[str] = "Chosen by the budget"
    summary: ClassVar[str] = "for each tensor the codec with the least error for its bytes"
    paper: ClassVar[str] = ""

    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """Always refused: without a budget there is nothing to choose by."""
        raise CodecError("codec 'auto' chooses by a budget; give --target-size or --target-ratio as well.")
