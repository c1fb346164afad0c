"""The numbers of one variant's cells, filled layer by layer from log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from deltakeeper.lens import metrics
from deltakeeper.lens.trace import PRODUCED, SHIFT_PARTS, Target
from deltakeeper.lens.trace_json import round_numbers
from deltakeeper.lens.trace_statistics import Floats


class CellNumbers:
    """Arrays of (layers, positions) of one variant, NaN until they are filled.

    Args:
        cells: number of layers and of positions.
        top: how many of the likeliest tokens are kept.
        final: log-probabilities (P, V) of the variant's last layer.
        references: names of the variants it is measured against.
        targets: tokens by name of the set.
        produced: token that came next at each position; None where that is not known.
    """

    def __init__(
        self,
        cells: tuple[int, int],
        top: int,
        final: Tensor,
        references: Sequence[str],
        targets: Mapping[str, Sequence[int]],
        produced: Sequence[int] | None,
    ) -> None:
        self.final = final
        self.top_ids = np.zeros((*cells, top), dtype=np.int32)
        self.top_probs = np.zeros((*cells, top))
        self.entropy, self.kl_final = np.full(cells, np.nan), np.full(cells, np.nan)
        self.kl = {name: np.full(cells, np.nan) for name in references}
        self.js = {name: np.full(cells, np.nan) for name in references}
        self.ids = {name: tuple(dict.fromkeys(map(int, ids))) for name, ids in targets.items()}
        if produced is not None:
            self.ids[PRODUCED] = tuple(map(int, produced))
        self.ranks = {name: np.zeros(cells, dtype=np.int32) for name in self.ids}
        self.log_probs = {name: np.full(cells, np.nan) for name in self.ids}
        self.parts: dict[str, Floats] = {}

    def measure(self, row: int, log_p: Tensor, references: Mapping[str, Tensor]) -> None:
        """Fill a layer from its log-probabilities (P, V) and those of the references at the same layer."""
        ids, probs = metrics.top_k(log_p, self.top_ids.shape[2])
        self.top_ids[row], self.top_probs[row] = ids.cpu().numpy(), probs.clamp(0, 1).cpu().numpy()
        self.entropy[row] = _numbers(metrics.entropy(log_p).clamp(min=0))
        self.kl_final[row] = _numbers(metrics.kl(self.final, log_p))
        for name, other in references.items():
            self.kl[name][row] = _numbers(metrics.kl(other, log_p))
            # A position at a time: its temporaries stay in the cache, which halves the time on a CPU.
            self.js[name][row] = _numbers(torch.stack([metrics.js(*pair) for pair in zip(other, log_p, strict=True)]))
        for name, tokens in self.ids.items():
            chosen = torch.tensor(tokens, device=log_p.device)
            chosen = chosen[:, None] if name == PRODUCED else chosen
            self.ranks[name][row] = metrics.rank(log_p, chosen).cpu().numpy()
            self.log_probs[name][row] = _numbers(metrics.set_log_prob(log_p, chosen))

    def shift(self, row: int, stream: Tensor, base: Tensor, tuned: Tensor) -> None:
        """Fill a layer's parts of `SHIFT_PARTS` from streams (P, D)."""
        found = metrics.stream_shift(stream, base, tuned)
        cosines = metrics.cosine(stream, base), metrics.cosine(stream, tuned)
        for name, values in zip(SHIFT_PARTS, (*found, *cosines), strict=True):
            self.parts.setdefault(name, np.full(self.entropy.shape, np.nan))[row] = _numbers(values)

    def targets(self) -> dict[str, Target]:
        """The token sets as a trace holds them."""
        return {
            name: Target(ids, self.ranks[name], round_numbers(self.log_probs[name])) for name, ids in self.ids.items()
        }


def _numbers(values: Tensor) -> Floats:
    return np.asarray(values.double().cpu().numpy(), dtype=np.float64)
