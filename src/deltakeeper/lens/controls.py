"""What a direction has to beat: directions that mean nothing, put through the same measurement.

Each control fits or draws a direction without the difference that is claimed, and measures how far it sets the *same*
held-out harmful and harmless prompts apart. A direction whose value controls often reach measures something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltakeeper.errors import DataError
from deltakeeper.lens.directions import check_streams, fit_direction, project, unit
from deltakeeper.lens.separation import Separation, measure_effect, separate
from deltakeeper.lens.trace_statistics import Floats

ISOTROPIC, MATCHED, SHUFFLED, HARMLESS = "isotropic", "covariance-matched", "shuffled labels", "harmless A − B"
COUNT = 100


@dataclass(frozen=True, eq=False)
class ControlledSeparation:
    """How far a direction sets held-out prompts apart, and how far controls do.

    Attributes:
        separation: of the direction, harmful first.
        controls: by name, effects float64 (draws, L) in pooled standard deviations; their sign means nothing.
        reached: by name, float64 (L,): (1 + how many draws come as far as the direction, either way) / (1 + draws).
            For a direction that means nothing it is at most α with probability α; it is at least 1 / (1 + draws).
    """

    separation: Separation
    controls: Mapping[str, Floats]
    reached: Mapping[str, Floats]


def separate_beside_controls(
    fit: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    count: int = COUNT,
    seed: int = 0,
    harmless_kinds: Sequence[bool] | None = None,
) -> ControlledSeparation:
    """Fit a direction on one split, judge it on another, beside four controls.

    Args:
        fit: harmful and harmless streams, (n, L, D) and (m, L, D), that the direction is fitted on.
        test: the same of other prompts.
        count: draws of each control.
        seed: of all draws.
        harmless_kinds: which harmless prompts of `fit` are of kind A, for instance of one topic; the harmless control
            is then one direction, A − B. None draws random halves.

    Raises:
        DataError: too few prompts, or splits that do not fit each other.
    """
    check_streams(*fit, *test)
    generator = torch.Generator().manual_seed(seed)
    harmful, harmless = (streams.double().cpu() for streams in fit)
    if harmless_kinds is not None and len(harmless_kinds) != len(harmless):
        raise DataError(f"{len(harmless_kinds)} kinds are given for {len(harmless)} harmless prompts; give one each.")
    drawn = {
        ISOTROPIC: torch.randn(count, *harmful.shape[1:], generator=generator, dtype=torch.float64),
        MATCHED: _matched(harmful, harmless, count, generator),
        SHUFFLED: _relabelled(torch.cat([harmful, harmless]), len(harmful), count, generator),
    }
    if harmless_kinds is None:
        drawn[HARMLESS] = _relabelled(harmless, len(harmless) // 2, count, generator)
    else:
        kinds = torch.tensor(list(map(bool, harmless_kinds)))
        drawn[HARMLESS] = fit_direction(harmless[kinds], harmless[~kinds]).vectors[None]
    bad, good = (streams.double().cpu() for streams in test)
    vectors = fit_direction(harmful, harmless).vectors
    separation = separate(project(vectors, bad), project(vectors, good))
    controls = {
        name: measure_effect(project(unit(directions), bad), project(unit(directions), good))
        for name, directions in drawn.items()
    }
    return ControlledSeparation(
        separation, controls, {name: share_reached(separation.effect, effects) for name, effects in controls.items()}
    )


def share_reached(effect: Floats, effects: Floats) -> Floats:
    """How often controls `(draws, L)` come as far from zero as an effect `(L,)`, itself counted in; NaN stays NaN."""
    reached = (1 + (np.abs(effects) >= np.abs(effect)).sum(0)) / (1 + len(effects))
    return np.where(np.isfinite(effect), reached, np.nan)


def _matched(harmful: Tensor, harmless: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Normal draws with the activations' covariance within kinds: what sets the kinds apart is not in it.

    A weighted sum of centred rows with normal weights has their covariance, so no D × D matrix is needed.
    """
    rows = torch.cat([harmful - harmful.mean(0), harmless - harmless.mean(0)])
    weights = torch.randn(count, len(rows), generator=generator, dtype=torch.float64)
    return _mixed(weights, rows) / math.sqrt(len(rows) - 2)


def _relabelled(rows: Tensor, first: int, count: int, generator: torch.Generator) -> Tensor:
    """Differences of means between `first` rows and the others, under random labels: (count, L, D)."""
    weights = torch.empty(count, len(rows), dtype=torch.float64)
    for draw in range(count):
        order = torch.randperm(len(rows), generator=generator)
        weights[draw, order[:first]] = 1 / first
        weights[draw, order[first:]] = -1 / (len(rows) - first)
    return _mixed(weights, rows)


def _mixed(weights: Tensor, rows: Tensor) -> Tensor:
    return (weights @ rows.flatten(1)).view(len(weights), *rows.shape[1:])
