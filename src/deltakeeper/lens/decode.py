"""Self-decoding: a model's own tail reads its intermediate streams, so norms, softcaps and scales are its own.

Every block becomes a pass-through that gives all layers' streams, stacked on the batch axis; what the model makes of
them are the logits of each layer. The last must come out as the model's logits, and `identity.py` holds it to that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from deltakeeper.errors import LensError
from deltakeeper.lens.streams import Part, Streams
from deltakeeper.lens.tail import Tail

Output = Literal["log_probs", "logits"]
MEMORY = 1 << 30
BYTES_A_LOGIT = 16
"""The model's logit, what a softcap makes on its way, a float32 copy and the log-probability."""


@dataclass(frozen=True)
class Decoded:
    """Some layers of some rows, decoded.

    Attributes:
        layers: which layers.
        rows: which rows of the streams.
        values: float32 `(layers, rows, positions, vocabulary)`; minus infinity for tokens that a variant lacks.
    """

    layers: range
    rows: range
    values: torch.Tensor


def decode(
    model: nn.Module,
    streams: Streams,
    *,
    tail: nn.Module | None = None,
    output: Output = "log_probs",
    part: Part = "block",
    layers: Sequence[int] | None = None,
    memory: int = MEMORY,
) -> Iterator[Decoded]:
    """What each layer would say if it were the last one, a chunk of layers at a time.

    All layers of some rows come before the next rows. Between chunks the model is as it was.

    Args:
        model: whose streams they are.
        streams: from `capture`.
        tail: another model to read them with, such as the base, so that what differs is drift of the stream alone; the
            model itself by default.
        output: natural logarithms of probabilities, or logits.
        part: `attention` or `mlp` decode what these add, through the same tail.
        layers: ascending; all by default.
        memory: bytes that a chunk may take.

    Raises:
        LensError: a single layer of a single row does not fit the memory, or the tail takes streams of another width.
    """
    reader = Tail.of(tail or model, streams.tokens)
    wanted = list(range(streams.layers)) if layers is None else [range(streams.layers)[i] for i in layers]
    source = streams.part(part)
    for rows, some in plan_chunks(streams.rows, wanted, streams.positions.shape[1], reader.vocabulary, memory):
        chosen = source[list(some), rows.start : rows.stop]
        tokens = streams.tokens[rows.start : rows.stop]
        yield Decoded(
            some, rows, finish(reader.read(chosen, tokens, torch.arange(rows.start, rows.stop), None), output)
        )


def plan_chunks(
    rows: int, layers: Sequence[int], positions: int, vocabulary: int, memory: int
) -> Iterator[tuple[range, range]]:
    """Ranges of rows and of layers whose logits fit the memory, all layers of some rows before the next rows.

    Raises:
        LensError: not even one layer of one row does.
    """
    runs = _ranges(layers)
    cell = positions * vocabulary * BYTES_A_LOGIT
    if cell > memory:
        raise LensError(
            f"{positions} positions of one layer take {cell} bytes of logits, more than the {memory} given; allow more "
            "memory or choose fewer positions."
        )
    fits = memory // cell
    most = max(len(r) for r in runs)
    for first in range(0, rows, step := min(rows, max(1, fits // most))):
        some = range(first, min(rows, first + step))
        for layer_run in runs:
            width = max(1, fits // len(some))
            for start in range(0, len(layer_run), width):
                yield some, layer_run[start : start + width]


def finish(logits: torch.Tensor, output: Output) -> torch.Tensor:
    """Logits of any dtype as float32, or as log-probabilities."""
    values = logits.float()
    return torch.log_softmax(values, -1) if output == "log_probs" else values


def _ranges(layers: Sequence[int]) -> list[range]:
    """Ascending layers as runs of neighbours."""
    runs: list[range] = []
    for layer in layers:
        if runs and runs[-1].stop == layer:
            runs[-1] = range(runs[-1].start, layer + 1)
        else:
            runs.append(range(layer, layer + 1))
    return runs
