"""A model's own tail, what comes behind its blocks, borrowed to read streams."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltakeeper.errors import LensError
from deltakeeper.lens.blocks import OutputKind, find_blocks, held, passing, watching
from deltakeeper.lens.reading import Around, run


@dataclass(frozen=True)
class Tail:
    """What is to be known of a model before its tail can be borrowed."""

    model: nn.Module
    blocks: Sequence[nn.Module]
    kinds: Sequence[OutputKind]
    vocabulary: int

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, tokens: torch.Tensor) -> Tail:
        """Learn what blocks return from one short pass over tokens `(rows, positions)`."""
        blocks = find_blocks(model)
        kinds: dict[int, OutputKind] = {}

        def see(index: int, given: Any, output: Any) -> None:
            kinds[index] = OutputKind.of(output)

        with held(model), watching(blocks, see):
            logits = run(model, tokens[:1].to(next(model.parameters()).device))
        if len(kinds) < len(blocks):
            raise LensError(f"block {min(set(range(len(blocks))) - set(kinds))} did not run; give a whole decoder.")
        return cls(model, blocks, [kinds[i] for i in range(len(blocks))], logits.shape[-1])

    @torch.no_grad()
    def read(
        self, stream: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, around: Around | None
    ) -> torch.Tensor:
        """As `read_with_gradients`, whose arguments it takes, without any."""
        return self.read_with_gradients(stream, tokens, rows, around)

    def read_with_gradients(
        self, stream: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, around: Around | None
    ) -> torch.Tensor:
        """Logits `(layers, rows, positions, vocabulary)` of streams `(layers, rows, positions, width)`.

        Args:
            stream: of some layers and rows.
            tokens: at the positions, int64 `(rows, positions)`; models reshape by them, nothing else.
            rows: whose they are, int64 `(rows,)`, for `around`.
            around: see `capture`.
        """
        layers, count, positions = stream.shape[:3]
        # Rows outermost, so that those of one variant stay together.
        stacked = stream.transpose(0, 1).reshape(count * layers, positions, *stream.shape[3:])
        ids = tokens.repeat_interleave(layers, 0).to(next(self.model.parameters()).device)
        whose = rows.repeat_interleave(layers)
        context = nullcontext() if around is None else around(whose, positions, positions)
        with held(self.model), passing(self.blocks, self.kinds, stacked), context:
            logits = run(self.model, ids)
        return logits.view(count, layers, positions, -1).transpose(0, 1)
