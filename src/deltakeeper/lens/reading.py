"""One plain pass of a model over a padded batch, and its logits where they are wanted."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

Around = Callable[[torch.Tensor, int, int], AbstractContextManager[None]]
"""Given whose rows a pass has (int64 `(batch,)`, indices into the rows of the streams), tokens a row and how many of
them reach the head: the context that the pass runs in."""


def read_logits(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, columns: torch.Tensor, around: Around | None = None
) -> torch.Tensor:
    """The model's logits at some columns of each row, `(rows, positions, vocabulary)`, from one plain pass."""
    # Few models can be asked for other positions in each row, so all rows give those that any of them needs.
    chooses = takes(model, "logits_to_keep")
    reached = torch.unique(columns) if chooses else torch.arange(ids.shape[1], device=ids.device)
    with nullcontext() if around is None else around(torch.arange(len(ids)), ids.shape[1], len(reached)):
        logits = run(model, ids, mask, reached)
    place = torch.searchsorted(reached, columns.contiguous()).to(logits.device)  # (rows, positions)
    return logits[torch.arange(len(ids), device=logits.device)[:, None], place]


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward names an argument."""
    return argument in inspect.signature(model.forward).parameters


def run(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None, reached: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits `(rows, positions, vocabulary)` of one plain pass, at the columns `reached` if the model can choose."""
    given: dict[str, Any] = {"use_cache": False} if takes(model, "use_cache") else {}
    if mask is not None and not bool(mask.all()):
        given["attention_mask"] = mask
        if not bool(mask[:, 0].all()) and takes(model, "position_ids"):
            # Padding on the left would shift every position.
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if reached is not None and takes(model, "logits_to_keep") and len(reached) < ids.shape[1]:
        given["logits_to_keep"] = reached
    output = model(ids, **given)
    found = getattr(output, "logits", None)
    return output[0] if found is None else found  # type: ignore[no-any-return]
