"""Module patching: a variant with the delta of one layer, or of its attention or MLP, taken from another variant.

Where patching the stream asks what has happened up to a layer, this asks what one layer's weights do. Effects of single
layers need not add up to the whole: layers may do the same work twice, or only together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import nn

from deltakeeper.attach import Change, attached
from deltakeeper.errors import LensError
from deltakeeper.lens.changes import mixtures
from deltakeeper.lens.identity import require_same_bits
from deltakeeper.lens.models import Texts
from deltakeeper.lens.modules import Tensors, layer_tensors, part_tensors
from deltakeeper.lens.outcomes import Outcome
from deltakeeper.lens.positions import resolve_positions
from deltakeeper.lens.reading import read_logits
from deltakeeper.lens.restored import FLOOR, Place, Sweep, measured, windows_of
from deltakeeper.lens.trace_statistics import Floats

Grain = Literal["layer", "part"]


def sweep_deltas(
    model: nn.Module,
    changes: Mapping[str, Sequence[Change]],
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    donor: str,
    receiver: str,
    outcome: Outcome,
    grain: Grain = "layer",
    read: Sequence[int] | torch.Tensor = (-1,),
    layers: Sequence[int] | None = None,
    window: int = 1,
    prompts_per_pass: int | None = None,
    floor: float = FLOOR,
) -> Sweep:
    """Serve the receiver with the donor's delta of one place after the other, and measure the outcome.

    The last place is what is in no layer (embeddings, the last norm, the head), so that nothing goes unseen. The model
    serves the mixtures through `deltakeeper.attach` and is itself again afterwards, which is asserted bit for bit.

    Args:
        model: the base, in evaluation mode, without an overlay.
        changes: of each variant by its name, such as `apply.iterate_changes` and `weights_of` give; none for the base.
        ids: tokens, int64 `(rows, length)`.
        mask: 1 for a token and 0 for padding; all tokens by default.
        donor: name of the variant with the outcome that is to be restored ("clean").
        receiver: name of the variant that lost it ("corrupted").
        outcome: see `deltakeeper.lens.outcomes`.
        grain: whole layers, or attention and MLP of each apart.
        read: positions where the outcome is read, as for `deltakeeper.lens.capture`.
        layers: the first of each window; all by default.
        window: how many neighbouring layers are taken at once.
        prompts_per_pass: prompts that are read at once; all by default.
        floor: see `deltakeeper.lens.restored.FLOOR`, in the outcome's unit.

    Raises:
        LensError: there is no such variant, layer or position, or the parts of a block are not found.
        DeltakeeperError: a change does not fit the model.
    """
    mask = torch.ones_like(ids) if mask is None else mask.to(ids)
    texts = Texts.of(ids, mask, read)
    tensors = _windows(layer_tensors(model) if grain == "layer" else part_tensors(model), layers, window)
    mixed = mixtures(changes, donor, receiver, tensors)
    step = prompts_per_pass or len(ids)
    before = _read(model, (), texts, step)
    found: dict[Place, Floats] = {}
    for place, mixture in mixed:
        found[place] = measured(outcome(_read(model, mixture, texts, step)), len(ids))
    clean, corrupted = (
        measured(outcome(_read(model, changes[name], texts, step)), len(ids)) for name in (donor, receiver)
    )
    require_same_bits(_read(model, (), texts, step), before, type(model).__name__)
    title = f"{receiver} with the delta of {donor}"
    return Sweep(tuple(found), np.stack(list(found.values()), 1), clean, corrupted, donor, receiver, title, floor)


@torch.no_grad()
def _read(model: nn.Module, changes: Sequence[Change], texts: Texts, rows: int) -> torch.Tensor:
    """Logits at the positions of the texts, float32 `(rows, positions, vocabulary)`."""
    device = next(model.parameters()).device
    found = []
    with attached(model, changes):
        for ids, mask, positions in texts.split(rows):
            columns = resolve_positions(mask, positions).to(device)
            found.append(read_logits(model, ids.to(device), mask.to(device), columns).float())
    return torch.cat(found)


def _windows(tensors: Tensors, layers: Sequence[int] | None, width: int) -> Tensors:
    """Tensors of windows of layers, place by place of one kind, and of what is in no layer."""
    count = 1 + max(place.layers[0] for place in tensors if place.layers)
    found: Tensors = {}
    for window in windows_of(layers, count, width):
        for patched in ("layer", "attention", "mlp"):
            names = [n for layer in window for n in tensors.get(Place(patched, (layer,)), ())]
            if names:
                found[Place(patched, window)] = tuple(names)
    outside = Place("outside", ())
    if not found:
        raise LensError("no layer of the model has tensors that could be taken from another variant.")
    return {**found, outside: tensors[outside]}
