"""Embeddings: the base's row plus the packed row of each token's tenant, added tokens, tables of tenants' own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deltakeeper.errors import OverlayError
from deltakeeper.kernels.products import add_rows_
from deltakeeper.overlay.current import CurrentPass, Span
from deltakeeper.overlay.site import Part, Place, Site


class EmbeddingSite(Site):
    """An embedding of tokens or of positions; Gemma's, whose rows are scaled, included."""

    lanes = 1

    def __init__(self, name: str, module: nn.Module, current: CurrentPass) -> None:
        super().__init__(name, module, current)
        self.size = len(self.parameters["weight"])
        self.scaled = hasattr(module, "embed_scale")
        self.table = torch.zeros(1, 1, dtype=torch.int64)
        self.own: dict[int, Part] = {}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids `(...)` to rows `(..., width)`."""
        current = self.current
        groups = current.groups
        if groups is None:
            return self.inner(ids)  # type: ignore[no-any-return]
        if ids.numel() != current.rows:
            ids = self._one_for_all(ids)
        flat = ids.reshape(-1).contiguous()  # (rows,); positions of one token given for all rows are one number
        # A token that the base lacks reads any row here, and is written over below.
        shared = flat.clamp(max=self.size - 1) if self.own else flat
        weight = self.parameters["weight"]
        y = F.embedding(shared, weight)
        if not groups.base_only:
            add_rows_(y, shared, self.table, groups)
        if self.own:
            self._replace_rows(y, flat, current.spans)
        if self.scaled:
            scale: Any = self.module.embed_scale
            y = y * (scale.to(weight.dtype) if isinstance(scale, torch.Tensor) else scale)
        return y.view(*ids.shape, -1)

    def _one_for_all(self, ids: torch.Tensor) -> torch.Tensor:
        """Positions are often given once for all sequences of a batch, whose tenants differ."""
        rows = self.current.rows
        if ids.ndim == 2 and ids.shape[0] == 1 and ids.shape[1] and rows % ids.shape[1] == 0:
            return ids.expand(rows // ids.shape[1], -1)
        raise self.misfit(ids.numel())

    def _replace_rows(self, y: torch.Tensor, ids: torch.Tensor, spans: list[Span]) -> None:
        over = ids >= self.size
        grown = bool(over.any())
        for slot, start, end in spans:
            part = self.own.get(slot)
            matrix = None if part is None else part.values.get("weight")
            if grown or matrix is not None:
                known = self.size if part is None or part.vocabulary is None else part.vocabulary
                if int(ids[start:end].max()) >= known:
                    raise OverlayError(
                        f"token {int(ids[start:end].max())} is beyond the {known} that the tenant in slot {slot} has; "
                        "use its own tokenizer."
                    )
            if matrix is not None:
                y[start:end] = F.embedding(ids[start:end], matrix)
            elif grown and part is not None and part.added is not None:
                new = over[start:end].nonzero()[:, 0] + start
                y[new] = part.added[ids[new] - self.size]

    def place(self, leaf: str, expert: int | None = None, half: int | None = None) -> Place | None:
        """See `Site.place`."""
        if leaf != "weight" or expert is not None:
            return None
        live = self.parameters["weight"]
        return Place(self, leaf, live, tuple(live.shape), 0, resizable=True)

    def grow(self, lanes: torch.Tensor, slots: int) -> None:
        """See `Site.grow`."""
        self.slots, self.table = slots, lanes[0]

    def put(self, slot: int, part: Part | None) -> None:
        """See `Site.put`."""
        if part is None:
            self.own.pop(slot, None)
        else:
            self.own[slot] = part
