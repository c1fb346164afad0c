"""The numbers of one variant's cells, filled layer by layer from log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltakeeper.lens import metrics
from deltakeeper.lens.trace import PRODUCED, SHIFT_PARTS, Numbers, Target, Whole
from deltakeeper.lens.trace_json import round_numbers
from deltakeeper.lens.trace_statistics import Floats

_NORMALISED = 1e-2


@dataclass(frozen=True)
class RoundedCells:
    """The numbers as traces hold them, arrays of (layers, positions)."""

    arrays: Mapping[str, Any]
    stacks: Mapping[str, Mapping[str, Numbers]]
    ids: Mapping[str, tuple[int, ...]]
    ranks: Mapping[str, Whole]
    log_probs: Mapping[str, Numbers]

    def of(self, columns: slice) -> dict[str, Any]:
        """Fields of a `LensTrace` of some positions."""
        targets = {
            name: Target(
                ids[columns] if name == PRODUCED else ids,
                self.ranks[name][:, columns].copy(),
                self.log_probs[name][:, columns].copy(),
            )
            for name, ids in self.ids.items()
        }
        arrays = {name: values[:, columns].copy() for name, values in self.arrays.items()}
        stacks = {
            part: {name: values[:, columns].copy() for name, values in found.items()}
            for part, found in self.stacks.items()
        }
        return {**arrays, **stacks, "targets": targets}


class CellNumbers:
    """Arrays of (layers, positions) of one variant, NaN until they are filled.

    Args:
        cells: number of layers and of positions.
        top: how many of the likeliest tokens are kept.
        final: log-probabilities (P, V) of the variant's last layer.
        references: names of the variants it is measured against.
        targets: tokens by name of the set.
        produced: token that the variant would say next at each position; None where that is not known.
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
        self.final, self._final_probs = final, final.exp()
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

    def measure(
        self, row: int, some: slice, log_p: Tensor, references: Mapping[str, tuple[Tensor, Tensor]], *, own: str
    ) -> bool:
        """Fill some positions of a layer from their log-probabilities (n, V).

        Args:
            row: place of the layer.
            some: which positions.
            log_p: of this variant.
            references: log-probabilities and probabilities of the references in the same cells.
            own: this variant's name, whose distance to itself is nothing.

        Returns:
            Whether they are log-probabilities.
        """
        p = references[own][1] if own in references else log_p.exp()
        self.entropy[row, some] = _numbers(metrics.entropy(log_p, p).clamp(min=0))
        self.kl_final[row, some] = _numbers(metrics.kl(self.final[some], log_p, self._final_probs[some]))
        for name, (log_q, q) in references.items():
            if name == own:
                self.kl[name][row, some] = self.js[name][row, some] = 0
                continue
            self.kl[name][row, some] = _numbers(metrics.kl(log_q, log_p, q))
            self.js[name][row, some] = _numbers(metrics.js(log_q, log_p, (q, p)))
        ids, probs = metrics.top_k(log_p, self.top_ids.shape[2])
        self.top_ids[row, some], self.top_probs[row, some] = ids.cpu().numpy(), _numbers(probs.clamp(0, 1))
        for name, tokens in self.ids.items():
            chosen = torch.tensor(tokens[some] if name == PRODUCED else tokens, device=log_p.device)
            chosen = chosen[:, None] if name == PRODUCED else chosen
            self.ranks[name][row, some] = metrics.rank(log_p, chosen).cpu().numpy()
            self.log_probs[name][row, some] = _numbers(metrics.set_log_prob(log_p, chosen))
        return bool(((p.sum(-1) - 1).abs() < _NORMALISED).all())

    def shift(self, row: int, stream: Tensor, base: Tensor, tuned: Tensor) -> None:
        """Fill a layer's parts of `SHIFT_PARTS` from streams (P, D)."""
        found = metrics.stream_shift(stream, base, tuned)
        cosines = metrics.cosine(stream, base), metrics.cosine(stream, tuned)
        for name, values in zip(SHIFT_PARTS, (*found, *cosines), strict=True):
            self.parts.setdefault(name, np.full(self.entropy.shape, np.nan))[row] = _numbers(values)

    def rounded(self) -> RoundedCells:
        """The numbers as traces hold them."""
        arrays = {name: round_numbers(getattr(self, name)) for name in ("top_probs", "entropy", "kl_final")}
        stacks = {"kl": self.kl, "js": self.js, "shift": self.parts}
        return RoundedCells(
            {"top_ids": self.top_ids, **arrays},
            {part: {name: round_numbers(values) for name, values in found.items()} for part, found in stacks.items()},
            self.ids,
            self.ranks,
            {name: round_numbers(values) for name, values in self.log_probs.items()},
        )


def _numbers(values: Tensor) -> Floats:
    return np.asarray(values.double().cpu().numpy(), dtype=np.float64)
