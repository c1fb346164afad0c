"""The weights that will be served, `base + codec(delta)`, made anew from weights in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from deltakeeper.codecs import Codec, RowEncoder, Statistics
from deltakeeper.lab.adaptive.targets import Target
from deltakeeper.native import KINDS, load_library
from deltakeeper.reconstruct import merge_block
from deltakeeper.workers import map_in_order, one_thread_each


class ServedWeights:
    """What a compression would make of each encoded weight, kept beside it.

    Between two runs of the codec a weight is served with the error that the codec made at the last one, so that it
    moves with its master.
    """

    def __init__(self, targets: Sequence[Target], codec: Codec, dtype: torch.dtype, refresh: int = 1) -> None:
        """Take memory for one more copy of the encoded weights, and for a second one if `refresh` is above 1."""
        self._targets = [target for target in targets if target.encoded]
        self._dtype, self._refresh = dtype, refresh
        self._codecs = {target.name: target.choice.codec or codec for target in self._targets}
        self._served = [torch.empty_like(target.weight, requires_grad=False) for target in self._targets]
        self._errors: list[torch.Tensor] = []

    def prepare(self, model: Any, pad: int, step: int) -> None:
        """Make what `model` computes with at step `step`."""
        self.update(step)

    def hand_down(self) -> None:
        """Turn the gradients of the served weights, which have just been made, into those of their deltas."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Bring the served weights up to date before step `step`."""
        if step % self._refresh and self._errors:
            for target, served, error in zip(self._targets, self._served, self._errors, strict=True):
                torch.add(target.weight, error, out=served)
            return
        self._spread()
        with one_thread_each() as workers:
            work = list(zip(self._targets, self._served, strict=True))
            for _ in map_in_order(
                lambda item: self._encode(*item), work, cost=lambda item: 24 * item[1].numel(), workers=workers
            ):
                pass
        if self._refresh > 1:
            self._errors = [served - target.weight for target, served in zip(self._targets, self._served, strict=True)]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model compute with the served weights; gradients land in the same parameters as ever."""
        masters = [target.weight.data for target in self._targets]
        try:
            for target, served in zip(self._targets, self._served, strict=True):
                target.weight.data = served
            yield
        finally:
            for target, master in zip(self._targets, masters, strict=True):
                target.weight.data = master

    def _encode(self, target: Target, served: torch.Tensor) -> None:
        codec = self._codecs[target.name]
        weight = target.weight.detach()
        tuned = weight.to(self._dtype) if self._dtype != torch.float32 else weight
        encoder = self._row_encoder(target, codec)
        if encoder is not None:
            encoder.add(target.base, tuned)
            terms, _ = encoder.finish()
            merge_block(terms, target.base, slice(0, len(served)), torch.float32, served)
            return
        base = target.base.float()
        delta = torch.sub(tuned.float(), base)
        served.copy_(base)
        for (name, part), (_, into) in zip(target.slices(delta), target.slices(served), strict=True):
            for term in codec.encode(part.contiguous().cpu(), name=name):  # codecs pack on the CPU
                into += term.to_dense().to(into.device)

    def _row_encoder(self, target: Target, codec: Codec) -> RowEncoder | None:
        """The codec's encoder from rows, which needs no delta in memory, where it has one and rows are rows."""
        rows = target.weight.dim() == 2 and not target.transposed and target.weight.device.type == "cpu"
        if not rows or load_library() is None or target.base.dtype not in KINDS:
            return None
        return codec.encode_rows((target.weight.shape[0], target.weight.shape[1]), name=target.name)

    def _spread(self) -> None:
        """Give tensors the settings that a codec chooses by comparing them."""
        for codec in {target.choice.codec for target in self._targets}:
            if codec is None or not codec.surveys:
                continue
            mine = [target for target in self._targets if target.choice.codec == codec]
            self._codecs |= codec.spread({target.name: _statistics(target, self._dtype) for target in mine})


def _statistics(target: Target, dtype: torch.dtype) -> Statistics:
    delta = target.weight.detach().to(dtype).float() - target.base.float()
    flat = delta.T if target.transposed else delta.reshape(-1, delta.shape[-1])
    return Statistics(
        shape=(flat.shape[0], flat.shape[1]),
        std=float(flat.std(correction=0)),
        mean_abs=float(flat.abs().mean(dtype=torch.float64)),
        zeros=float((flat == 0).sum()) / flat.numel(),
    )
