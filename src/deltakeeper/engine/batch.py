"""One pass as tensors: which tokens, where they stand, where their keys go, and which rows are answered."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from deltakeeper.engine.blocks import BLOCK
from deltakeeper.engine.sequence import Chunk


@dataclass(frozen=True, eq=False)
class Batch:
    """Tensors of one pass; rows of one slot are adjacent.

    Attributes:
        tokens: int64 `(1, tokens)`.
        positions: int64 `(1, tokens)`.
        places: int64 `(tokens,)`, block · BLOCK + offset of each token in the cache.
        answered: int64 `(rows,)`, tokens whose logits are wanted.
        tables: int32 `(requests, most blocks)`.
        query_starts: int32 `(requests + 1,)`.
        lengths: int32 `(requests,)`.
        slots: slot of each chunk, on the host.
        counts: tokens of each chunk, on the host.
        answers: answered rows of each chunk, on the host.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    answered: torch.Tensor
    tables: torch.Tensor
    query_starts: torch.Tensor
    lengths: torch.Tensor
    slots: list[int]
    counts: list[int]
    answers: list[int]


def build_batch(chunks: Many[Chunk], tables: npt.NDArray[np.int32], device: torch.device) -> Batch:
    """Lay out a pass.

    Args:
        chunks: what is computed, those of one slot adjacent.
        tables: int32 `(rows, most blocks of a request)`, the block table of every running request.
        device: where the tensors go.
    """
    tokens: list[int] = []
    positions: list[int] = []
    answered: list[int] = []
    counts: list[int] = []
    answers: list[int] = []
    for chunk in chunks:
        sequence, count = chunk.sequence, chunk.size
        start = sequence.computed
        if count == 1:
            tokens.append(sequence.tokens[start])
            positions.append(start)
        else:
            tokens += sequence.tokens[start : start + count]
            positions += range(start, start + count)
        counts.append(count)
        answers.append(chunk.answers)
        answered += range(len(tokens) - chunk.answers, len(tokens))
    rows = np.array([chunk.sequence.row for chunk in chunks])
    sizes = np.array(counts)
    at = np.array(positions)
    ends = np.cumsum(sizes)
    lengths = at[ends - 1] + 1
    places = tables[np.repeat(rows, sizes), at // BLOCK].astype(np.int64) * BLOCK + at % BLOCK
    widest = -(-int(lengths.max()) // BLOCK)
    starts = np.zeros(len(chunks) + 1, np.int32)
    starts[1:] = ends

    def send(values: npt.NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)

    return Batch(
        tokens=send(np.array(tokens)).unsqueeze(0),
        positions=send(at).unsqueeze(0),
        places=send(places),
        answered=send(np.array(answered, np.int64)),
        tables=send(tables[rows, :widest]),
        query_starts=send(starts),
        lengths=send(lengths.astype(np.int32)),
        slots=[chunk.sequence.slot for chunk in chunks],
        counts=counts,
        answers=answers,
    )


def trial_batch(context: int, vocabulary: int) -> Batch:
    """A request of the base alone in the first blocks of a cache that nobody uses yet; every row is answered."""
    count = min(context, BLOCK)
    at = torch.arange(count)
    return Batch(
        tokens=(at * 7919 % vocabulary).unsqueeze(0),
        positions=at.unsqueeze(0),
        places=at,
        answered=at,
        tables=torch.zeros(1, 1, dtype=torch.int32),
        query_starts=torch.tensor([0, count], dtype=torch.int32),
        lengths=torch.tensor([count], dtype=torch.int32),
        slots=[0],
        counts=[count],
        answers=[count],
    )
