"""Residual streams of a decoder at chosen positions, kept while it reads a batch of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import nn

from deltakeeper.errors import LensError
from deltakeeper.lens.blocks import find_blocks, held, stream_of, watching
from deltakeeper.lens.parts import BlockParts, find_parts
from deltakeeper.lens.positions import resolve_positions
from deltakeeper.lens.reading import Around, read_logits, run

Part = Literal["block", "attention", "mlp"]
PROBE = 16
"""Tokens that tell which modules of a block are its parts."""
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class Streams:
    """What was kept of one pass, in the model's dtype and on its device.

    Attributes:
        block: the residual stream after each block, `(layers, rows, positions, width)`; a model that keeps several
            streams a token has one more axis before `width`.
        attention: what attention (or the mixer in its place) adds to the stream in each block, of the same shape; zeros
            in a block without; None if it was not asked for or no block has it.
        mlp: the same of the MLP or the experts.
        ids: the tokens that were read, int64 `(rows, length)`.
        mask: 1 for a token, 0 for padding, int64 `(rows, length)`.
        positions: columns of `ids`, int64 `(rows, positions)`.
        logits: the model's own at these positions, `(rows, positions, vocabulary)`; None if they were not kept.
    """

    block: torch.Tensor
    attention: torch.Tensor | None
    mlp: torch.Tensor | None
    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    logits: torch.Tensor | None

    @property
    def tokens(self) -> torch.Tensor:
        """The token at each position, int64 `(rows, positions)`."""
        return self.ids.gather(1, self.positions)

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.block)

    @property
    def rows(self) -> int:
        """Number of prompts."""
        return self.block.shape[1]

    def part(self, part: Part) -> torch.Tensor:
        """One of the kept parts; raises LensError if it was not kept."""
        found: torch.Tensor | None = getattr(self, part) if part in PARTS else None
        if found is None:
            raise LensError(
                f"'{part}' was not kept, or no block has it; ask for it with capture(..., parts=('block', '{part}'))."
            )
        return found

    def select(self, rows: slice) -> Streams:
        """Some of the rows, sharing memory."""
        found: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in found.items():
            if value is not None:
                found[name] = value[:, rows] if name in PARTS else value[rows]
        return Streams(**found)


def capture(
    model: nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    positions: Sequence[int] | torch.Tensor | None = None,
    parts: Sequence[Part] = ("block",),
    *,
    logits: bool = True,
    around: Around | None = None,
) -> Streams:
    """Read a batch once and keep what every block returned at some positions; nothing larger is kept.

    Args:
        model: a Hugging Face decoder in evaluation mode.
        ids: tokens, int64 `(rows, length)`, padded on either side.
        mask: 1 for a token and 0 for padding, `(rows, length)`; all tokens by default.
        positions: of every row, or int64 `(rows, positions)`, counted in each row's own text without padding, negative
            ones from its end; all by default, for rows of one length.
        parts: `attention` and `mlp` are kept beside `block` if they are named, at the cost of a pass over one row.
        logits: whether the model's logits at these positions are kept, which `check_identity` needs.
        around: the context of the pass, by whose rows it has.

    Raises:
        LensError: a position lies outside a row's text, the model is training, or its blocks cannot be read.
    """
    if model.training:
        raise LensError(f"the {type(model).__name__} is training; call eval() on it first.")
    blocks = find_blocks(model)
    device = next(model.parameters()).device
    ids = ids.to(device)
    mask = torch.ones_like(ids) if mask is None else mask.to(ids)
    columns = resolve_positions(mask, positions)
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise LensError(f"'{min(unknown)}' is no part of a block; ask for block, attention or mlp.")
    with held(model), torch.no_grad():
        inner: Sequence[BlockParts] = ()
        if len(set(parts) - {"block"}):
            inner = find_parts(blocks, lambda: run(model, ids[:1][mask[:1] > 0][None, :PROBE]))
        keeper = _Keeper(len(blocks), ids, columns)
        watched: list[nn.Module] = list(blocks)
        targets: list[tuple[str, int, float]] = [("block", layer, 1.0) for layer in range(len(blocks))]
        for layer, one in enumerate(inner):
            for name, share in (("attention", one.attention), ("mlp", one.mlp)):
                if name in parts and share is not None:
                    watched.append(share.module)
                    targets.append((name, layer, share.factor))
        with watching(watched, lambda i, _, output: keeper.keep(*targets[i], output)):
            found = read_logits(model, ids, mask, columns if logits else columns[:1, :1].expand(len(ids), 1), around)
    keeper.require_all()
    extra = {name: keeper.kept.get(name) for name in ("attention", "mlp")}
    return Streams(
        keeper.kept["block"], extra["attention"], extra["mlp"], ids, mask, columns, found if logits else None
    )


def join(pieces: Sequence[Streams]) -> Streams:
    """Rows of several captures, one below the other."""
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    found: dict[str, Any] = {}
    for field in fields(Streams):
        values = [getattr(piece, field.name) for piece in pieces]
        axis = 1 if field.name in PARTS else 0
        found[field.name] = None if getattr(first, field.name) is None else torch.cat(values, axis)
    return Streams(**found)


class _Keeper:
    """Memory for what hooks see, made when the first of each part is seen."""

    def __init__(self, layers: int, ids: torch.Tensor, columns: torch.Tensor) -> None:
        self.layers, self.ids, self.columns = layers, ids, columns
        self.kept: dict[str, torch.Tensor] = {}
        self.seen = [0] * layers

    def keep(self, part: str, layer: int, factor: float, output: Any) -> None:
        stream = stream_of(output)
        if stream.ndim == 2 and len(stream) == self.ids.numel():  # experts often see rows without a batch axis
            stream = stream.view(*self.ids.shape, -1)
        if stream.shape[:2] != self.ids.shape or stream.ndim < 3:
            raise LensError(
                f"the {part} of layer {layer} gives {tuple(stream.shape)} for {tuple(self.ids.shape)} tokens; the lens "
                "reads decoders whose blocks give (rows, positions, width)."
            )
        columns = self.columns.to(stream.device)
        chosen = stream[torch.arange(len(columns), device=stream.device)[:, None], columns]
        if part not in self.kept:
            self.kept[part] = chosen.new_zeros(self.layers, *chosen.shape)
        self.kept[part][layer] = chosen if factor == 1.0 else chosen * factor
        self.seen[layer] += part == "block"

    def require_all(self) -> None:
        wrong = [layer for layer, count in enumerate(self.seen) if count != 1]
        if wrong:
            raise LensError(
                f"block {wrong[0]} ran {self.seen[wrong[0]]} times in one pass; the lens reads decoders whose blocks "
                "run once each."
            )
