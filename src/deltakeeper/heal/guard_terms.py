"""The terms of a delta while they are guarded: finer scales, and a low-rank term that starts at zero."""

from __future__ import annotations

import zlib
from dataclasses import replace

import torch

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.heal.guard_settings import GuardSettings
from deltakeeper.heal.terms import TrainedTerms
from deltakeeper.layouts import Layout, Lowrank, Signs

INSIDE = "linear"
"""Role of the tensors that get a low-rank term; for an embedding it would be as large as the vocabulary."""


class GuardedTerms:
    """Makes the terms in training of an artifact, tensor by tensor, and keeps account of what is trained.

    Attributes:
        added: names of the tensors that got a low-rank term.
    """

    def __init__(self, artifact: DeltaArtifact, settings: GuardSettings) -> None:
        self._artifact, self._settings = artifact, settings
        self._values: list[torch.nn.Parameter] = []
        self._factors: list[torch.nn.Parameter] = []
        self.added: list[str] = []

    def prepare(self, name: str, terms: list[Layout], train: bool) -> TrainedTerms:
        """See `heal.student.Prepare`."""
        settings = self._settings
        if not train or len(terms[0].shape) != 2 or terms[0].replaces:
            whole = TrainedTerms(terms, train and settings.own)
            self._values += whole.steps.values()
            return whole
        terms = [widened(term) if settings.widen else term for term in terms]
        if settings.start != 1.0:
            terms = [scaled(term, settings.start) for term in terms]
        units: dict[tuple[int, str], float] = {}
        fixed = () if settings.own else tuple(range(len(terms)))
        if settings.rank and self._artifact.record(name).role == INSIDE:
            size = float(sum(term.to_dense().double().square().mean() for term in terms)) ** 0.5
            rank = min(settings.rank, *terms[0].shape)
            if size > 0:
                number = len(terms)
                terms = [*terms, fresh(terms[0].shape, rank, size, settings.seed ^ zlib.crc32(name.encode()))]
                units = {(number, "delta_U"): rank**-0.5}
                self.added.append(name)
        found = TrainedTerms(terms, train, unpacked=True, fixed=fixed, units=units)
        for key, step in found.steps.items():
            new = bool(units) and key.startswith(f"{len(terms) - 1}|")
            (self._factors if new else self._values).append(step)
        return found

    def groups(self) -> list[tuple[list[torch.nn.Parameter], float]]:
        """Values in training with their learning rates."""
        lr = self._settings.lr
        found = [(self._values, lr), (self._factors, lr * self._settings.rank_lr)]
        return [(values, rate) for values, rate in found if values]


def widened(term: Layout) -> Layout:
    """Sign planes with one scale a matrix as planes with one a row, all of them equal; other terms as they are."""
    if not isinstance(term, Signs) or term.scale != "tensor":
        return term
    scales = tuple(scale.expand(term.shape[0], 1).contiguous() for scale in term.scales)
    return replace(term, scale="row", scales=scales)


def scaled(term: Layout, factor: float) -> Layout:
    """A term times a factor, where its values carry the size of all of it: scales, gains, kept entries.

    Of two factors of a product each takes the root.
    """
    values = term.continuous()
    if isinstance(term, Lowrank):
        factor = factor**0.5
    return term.replace_continuous({suffix: value * factor for suffix, value in values.items()}) if values else term


def fresh(shape: tuple[int, ...], rank: int, size: float, seed: int) -> Lowrank:
    """A low-rank term that is zero: left factor zeros, right factor normal, gain the size of the delta's entries."""
    right = torch.randn(rank, shape[1], generator=torch.Generator().manual_seed(seed))
    return Lowrank(
        shape=tuple(shape),
        stored_left=torch.zeros(shape[0], rank, dtype=torch.float16),
        stored_right=right.half(),
        gain=torch.tensor([size], dtype=torch.float32),
    )
