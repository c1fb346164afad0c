"""Positions in rows of a padded batch, counted in each row's own text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltakeeper.errors import LensError


def resolve_positions(mask: torch.Tensor, positions: Sequence[int] | torch.Tensor | None) -> torch.Tensor:
    """Columns of a padded batch, int64 `(rows, positions)`, of positions in each row's own text; see `capture`."""
    lengths = mask.sum(1)  # (rows,)
    starts = mask.argmax(1)
    steps = (mask[:, 1:] != mask[:, :-1]).sum(1)
    if int(lengths.min()) == 0 or int(steps.max() if steps.numel() else 0) > 2 or _torn(mask, starts, lengths):
        raise LensError("a row of the mask is empty or has a hole; give each row one unbroken text.")
    if positions is None:
        if int(lengths.min()) != int(lengths.max()):
            raise LensError("rows differ in length, so they have no positions in common; say which ones, e.g. [-1].")
        positions = range(int(lengths[0]))
    wanted = torch.as_tensor(list(positions) if not isinstance(positions, torch.Tensor) else positions)
    wanted = wanted.to(mask).expand(len(mask), -1)  # (rows, positions)
    own = torch.where(wanted < 0, wanted + lengths[:, None], wanted)
    outside = (own < 0) | (own >= lengths[:, None])
    if not wanted.numel() or bool(outside.any()):
        at = wanted[outside].tolist()[:1]
        which = (
            f"position {at[0]} lies outside the text of row {int(outside.nonzero()[0, 0])}" if at else "none is given"
        )
        raise LensError(f"{which}; the shortest row has {int(lengths.min())} tokens.")
    return own + starts[:, None]


def every_position(mask: torch.Tensor) -> torch.Tensor:
    """All positions of each row's own text from its end, int64 `(rows, longest)`; shorter rows repeat their first."""
    lengths = mask.sum(1, keepdim=True)
    backwards = torch.arange(int(lengths.max()), device=mask.device) - int(lengths.max())
    return (lengths + backwards).clamp(min=0)


def _torn(mask: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor) -> bool:
    columns = torch.arange(mask.shape[1], device=mask.device)
    text = (columns >= starts[:, None]) & (columns < (starts + lengths)[:, None])
    return not torch.equal(text, mask > 0)
