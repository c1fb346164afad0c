"""The tuned lens: an affine map per layer into the basis that a model's tail reads, as a second decoder.

Layers write in a basis of their own, so decoding them as they are is biased, most of all in early layers. A translator
h + W h + b per layer, trained on the base to give the final distribution (Belrose et al. 2023, arXiv 2303.08112), takes
that bias away. It is trained once, on the base, and reads the streams of every variant: what differs is then the
variants. The last layer is never translated, so the lens keeps its identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from deltakeeper.calibration.text import stack_rows
from deltakeeper.errors import LensError
from deltakeeper.lens import metrics
from deltakeeper.lens.decode import MEMORY, decode
from deltakeeper.lens.streams import Streams, capture
from deltakeeper.lens.trace_statistics import Floats

ROWS = 4
"""Rows of text that are read at once when a lens is measured."""


@dataclass(frozen=True, eq=False)
class Translators:
    """One affine map h + W h + b for each layer but the last; zeros are the identity.

    Attributes:
        weight: W, float32 `(layers − 1, width, width)`.
        bias: b, float32 `(layers − 1, width)`.
        base_root: fingerprint of the base that they were trained on.
        steps: of training.
        text_sha256: of the tokens that they were trained on.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    base_root: str
    steps: int
    text_sha256: str

    @classmethod
    def identity(cls, layers: int, width: int, base_root: str) -> Translators:
        """Translators that change nothing, for a model of so many layers."""
        return cls(torch.zeros(layers - 1, width, width), torch.zeros(layers - 1, width), base_root, 0, "")

    @property
    def layers(self) -> int:
        """Number of the model's blocks."""
        return len(self.weight) + 1

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.bias.shape[-1]

    def translate(self, streams: Streams) -> Streams:
        """Streams for `decode`, with every block but the last translated; what attention and MLP add is left out.

        They may be the base's or a variant's; `Compared.decode` takes `{name: t.translate(s) for name, s in ...}`.

        Raises:
            LensError: the streams are of another number of layers or another width.
        """
        self.require_fit(streams)
        moved = streams.block.clone()
        for layer in range(self.layers - 1):
            stream = streams.block[layer]
            weight, bias = (part[layer].to(stream.device) for part in (self.weight, self.bias))
            moved[layer] = affine(stream, weight, bias)
        return replace(streams, block=moved, attention=None, mlp=None)

    def require_fit(self, streams: Streams) -> None:
        """Raise LensError unless streams are of as many layers and of this width."""
        if streams.block.ndim != 4:
            raise LensError("the model keeps several streams a token, which one affine map a layer cannot translate.")
        if (streams.layers, streams.block.shape[-1]) != (self.layers, self.width):
            raise LensError(
                f"the tuned lens is of {self.layers} layers of width {self.width}, and the model has {streams.layers} "
                f"of width {streams.block.shape[-1]}; train one on its base."
            )


@dataclass(frozen=True, eq=False)
class TunedReport:
    """KL(final ‖ layer) in nats, a mean over all tokens of a text; both float64 (layers,), about 0 in the last.

    Attributes:
        before: of the streams as they are.
        after: of the translated ones.
        tokens: how many.
    """

    before: Floats
    after: Floats
    tokens: int


def affine(stream: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The map h + W h + b over the last axis, in float32 or wider, rounded once to the stream's dtype."""
    wide = stream.to(torch.promote_types(stream.dtype, torch.float32))
    # Added to the stream and not multiplied into it, so that zeros are the identity to the bit in any dtype.
    return (wide + (wide @ weight.to(wide).mT + bias.to(wide))).to(stream.dtype)


def measure_kl(
    model: nn.Module,
    rows: Sequence[torch.Tensor],
    translators: Translators | None = None,
    *,
    memory: int = MEMORY,
) -> Floats:
    """Mean KL(final ‖ layer) over all tokens of a text, in nats, float64 (layers,).

    Args:
        model: the base, or another model of its shape, in evaluation mode.
        rows: tokens, int64 `(length,)` each, as `deltakeeper.calibration.text.tokenise` gives them.
        translators: of the base; None for the streams as they are.
        memory: see `deltakeeper.lens.decode`.

    Raises:
        LensError: there is no text, or as `capture` and `decode`.
    """
    totals: list[Floats] = []
    tokens = 0
    for ids in stack_rows(rows, ROWS):
        streams = capture(model, ids)
        final = final_log_probs(streams)
        streams = streams if translators is None else translators.translate(streams)
        sums = np.zeros(streams.layers)
        for chunk in decode(model, streams, memory=memory):
            span = slice(chunk.rows.start, chunk.rows.stop)
            kl = metrics.kl(final[span].to(chunk.values.device), chunk.values)
            sums[list(chunk.layers)] += kl.double().sum((1, 2)).cpu().numpy()
        totals.append(sums)
        tokens += ids.numel()
    if not tokens:
        raise LensError("there is no text to measure a tuned lens on; give at least one row of tokens.")
    return np.asarray(np.sum(totals, 0) / tokens, dtype=np.float64)


def report_tuned(
    model: nn.Module, translators: Translators, rows: Sequence[torch.Tensor], *, memory: int = MEMORY
) -> TunedReport:
    """What translators are worth on a text, which should be one that they were not trained on; as `measure_kl`."""
    before, after = (measure_kl(model, rows, chosen, memory=memory) for chosen in (None, translators))
    return TunedReport(before, after, sum(len(row) for row in rows))


def final_log_probs(streams: Streams) -> torch.Tensor:
    """The model's own log-probabilities, float32 `(rows, positions, vocabulary)`."""
    if streams.logits is None:
        raise LensError("the logits were not kept; ask for them with capture(..., logits=True).")
    return torch.log_softmax(streams.logits.float(), -1)
