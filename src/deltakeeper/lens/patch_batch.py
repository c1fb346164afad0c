"""A batch of prompts whose streams are taken from one variant and put into another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from deltakeeper.lens.blocks import find_blocks, held, replacing
from deltakeeper.lens.models import Compared, Texts
from deltakeeper.lens.positions import every_position
from deltakeeper.lens.reading import read_logits
from deltakeeper.lens.streams import Streams, capture


@dataclass(frozen=True)
class PatchBatch:
    """Prompts, and where they are patched and read.

    Attributes:
        compared: the variants that read them.
        where: tokens, and the positions that are patched, counted from the start of each text.
        reads: positions where logits are read, int64 `(rows, positions)`, counted in the same way.
    """

    compared: Compared
    where: Texts
    reads: torch.Tensor

    @classmethod
    def of(
        cls,
        compared: Compared,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: Sequence[int] | torch.Tensor | None,
        read: Sequence[int] | torch.Tensor,
    ) -> PatchBatch:
        """Arguments of `deltakeeper.lens.capture`; every position of each text is patched by default."""
        mask = torch.ones_like(ids) if mask is None else mask.to(ids)
        where = Texts.of(ids, mask, every_position(mask) if positions is None else positions)
        return cls(compared, where, Texts.of(ids, mask, read).positions)

    def capture(self, name: str, rows: torch.Tensor, sources: torch.Tensor) -> Streams:
        """Streams of the prompts `sources` for the positions of `rows`.

        What both begin with stands where it stood, the first token always, on which attention rests; what is behind is
        counted from the end of each, and the beginning of a longer source is left out.
        """
        texts = self.where
        positions = self._aligned(rows, sources)
        with self.compared.serving(name) as (model, around):
            return capture(model, texts.ids[sources], texts.mask[sources], positions, logits=False, around=around)

    def _aligned(self, rows: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        """Positions in the sources, from the start of each, for those of the rows, int64 `(rows, positions)`."""
        texts = self.where
        lengths = texts.mask.sum(1)
        shared = torch.tensor(
            [[_alike(self._own(row), self._own(source))] for row, source in zip(rows, sources, strict=True)]
        )
        positions, ends = texts.positions[rows], lengths[sources][:, None]
        behind = torch.maximum(positions - lengths[rows][:, None] + ends, shared)
        return torch.where(positions < shared, positions, behind).minimum(ends - 1)

    def _own(self, row: torch.Tensor) -> list[int]:
        return self.where.ids[row][self.where.mask[row].bool()].tolist()

    @torch.no_grad()
    def read(self, name: str, rows: torch.Tensor, own: Streams, put: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Logits `(rows, read positions, vocabulary)` with streams `(rows, positions, width)` put in by layer."""
        columns = self.reads[rows] + self.where.mask[rows].argmax(1, keepdim=True)
        with self.compared.serving(name) as (model, around), held(model):
            change = {layer: _putting(stream, own.positions) for layer, stream in put.items()}
            with replacing(find_blocks(model), change):
                return read_logits(model, own.ids, own.mask, columns.to(own.ids), around).float()


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike, the first counted in any case."""
    pairs = zip(one, other, strict=False)
    return max(1, next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other))))


def _putting(value: torch.Tensor, columns: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    def put(stream: torch.Tensor) -> torch.Tensor:
        new = stream.clone()
        places = columns.to(new.device)
        new[torch.arange(len(places), device=new.device)[:, None], places] = value.to(new)
        return new

    return put
