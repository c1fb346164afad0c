"""Activation patching: one variant's residual stream put in place of another's, and what becomes of the outcome.

Both variants read the same tokens. The receiver reads them once more for each layer (or window of layers): what its
block gives at some positions is replaced by what the donor's gave, and everything behind goes on from there. Done for
base and fine-tune it says which layers an effect has passed by; "causal tracing" (Meng et al. 2022, arXiv 2202.05262)
does the same between two prompts of one model. Where every position is replaced nothing of the receiver's past is left,
so a window is as good as its last layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deltakeeper.errors import LensError
from deltakeeper.lens.models import Compared
from deltakeeper.lens.outcomes import Outcome
from deltakeeper.lens.patch_batch import PatchBatch
from deltakeeper.lens.restored import FLOOR, Place, Sweep, measured, windows_of
from deltakeeper.lens.trace_statistics import Floats


@dataclass(frozen=True)
class Patching:
    """How streams are patched.

    Attributes:
        positions: which are replaced, as for `deltakeeper.lens.capture`; every position by default.
        read: where the outcome is read.
        layers: the first of each window; all by default.
        window: how many neighbouring layers are replaced at once.
        prompts_per_pass: prompts whose streams of all layers are held at once; all by default.
        floor: see `deltakeeper.lens.restored.FLOOR`, in the outcome's unit.
    """

    positions: Sequence[int] | torch.Tensor | None = None
    read: Sequence[int] | torch.Tensor = (-1,)
    layers: Sequence[int] | None = None
    window: int = 1
    prompts_per_pass: int | None = None
    floor: float = FLOOR


@dataclass(frozen=True, eq=False)
class ControlledSweep:
    """A sweep beside those that it has to differ from.

    Attributes:
        sweep: the donor's streams in the receiver.
        reverse: the receiver's in the donor; a layer that carries the effect takes it away here.
        other_prompt: the donor's streams of another prompt, drawn by the seed. As high as the sweep, they say that what
            is restored belongs to the donor and not to the prompt.
    """

    sweep: Sweep
    reverse: Sweep
    other_prompt: Sweep


def sweep_streams(
    compared: Compared,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    donor: str,
    receiver: str,
    outcome: Outcome,
    how: Patching | None = None,
) -> Sweep:
    """Patch the receiver's stream by the donor's, layer by layer.

    That the receiver's own streams change nothing, bit for bit, is asserted on every run.

    Args:
        compared: open `Variants`, or `Models`.
        ids: tokens, int64 `(rows, length)`.
        mask: 1 for a token and 0 for padding; all tokens by default.
        donor: name of the variant with the outcome that is to be restored ("clean").
        receiver: name of the variant that lost it ("corrupted").
        outcome: see `deltakeeper.lens.outcomes`.
        how: positions, layers, windows.

    Raises:
        LensError: there is no such variant, layer or position, the variants differ in shape, or the receiver's own
            streams do change something.
    """
    title = f"{receiver} with the stream of {donor}"
    return _sweep(compared, ids, mask, (donor, receiver, title), outcome, how or Patching(), None)


def sweep_with_controls(
    compared: Compared,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    donor: str,
    receiver: str,
    outcome: Outcome,
    how: Patching | None = None,
    seed: int = 0,
) -> ControlledSweep:
    """`sweep_streams` with its controls, at three times the cost; at least two prompts.

    Raises:
        LensError: as `sweep_streams`, or there is a single prompt.
    """
    if len(ids) < 2:
        raise LensError("another prompt's stream is a control of patching; give at least two prompts.")
    how = how or Patching()
    others = derange(len(ids), seed)
    given = (compared, ids, mask)
    title = f"{receiver} with the stream of {donor}"
    return ControlledSweep(
        _sweep(*given, (donor, receiver, title), outcome, how, None),
        _sweep(*given, (receiver, donor, f"{donor} with the stream of {receiver}"), outcome, how, None),
        _sweep(*given, (donor, receiver, f"{title} on another prompt"), outcome, how, others),
    )


def derange(count: int, seed: int) -> torch.Tensor:
    """A random order of at least two rows in which none keeps its place, int64 `(count,)`."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    found = torch.empty_like(order)
    found[order] = order.roll(1)  # one cycle through all rows
    return found


def _sweep(
    compared: Compared,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    who: tuple[str, str, str],
    outcome: Outcome,
    how: Patching,
    others: torch.Tensor | None,
) -> Sweep:
    donor, receiver, title = who
    batch = PatchBatch.of(compared, ids, mask, how.positions, how.read)
    clean, corrupted, patched = list[Floats](), list[Floats](), list[Floats]()
    windows: list[tuple[int, ...]] = []
    for rows in torch.split(torch.arange(len(ids)), how.prompts_per_pass or len(ids)):
        given = batch.capture(donor, rows, rows if others is None else others[rows])
        own = batch.capture(receiver, rows, rows)
        if own.block.shape != given.block.shape:
            raise LensError(f"the streams of '{donor}' and '{receiver}' differ in shape; patch variants of one base.")
        windows = windows_of(how.layers, own.layers, how.window)
        plain = batch.read(receiver, rows, own, {})
        swept = sorted({layer for window in windows for layer in window})
        if not torch.equal(batch.read(receiver, rows, own, {layer: own.block[layer] for layer in swept}), plain):
            raise LensError(
                f"'{receiver}' gives other logits when its own streams are put in place of themselves; look for hooks "
                "or caches that keep something between passes."
            )
        found = [batch.read(receiver, rows, own, {layer: given.block[layer] for layer in w}) for w in windows]
        clean.append(measured(outcome(batch.read(donor, rows, own, {})), len(rows)))
        corrupted.append(measured(outcome(plain), len(rows)))
        patched.append(np.stack([measured(outcome(logits), len(rows)) for logits in found], 1))
    return Sweep(
        places=tuple(Place("stream", window) for window in windows),
        patched=np.concatenate(patched),
        clean=np.concatenate(clean),
        corrupted=np.concatenate(corrupted),
        donor=donor,
        receiver=receiver,
        title=title,
        floor=how.floor,
    )
