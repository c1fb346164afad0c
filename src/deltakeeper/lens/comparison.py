"""Statistics over traces, as labelled arrays that a figure draws without knowing what they mean.

Prompts differ in length, so traces are aligned by place in `positions` (0 is the first that was traced, -1 the last),
never by place in the text. Ratios are not averaged: kept shares come as median and quartiles, and as ratio of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltakeeper.lens.metrics import coarse_kl
from deltakeeper.lens.trace import LensTrace
from deltakeeper.lens.trace_statistics import Floats, check_alike, collect, read_statistic, unit_of


@dataclass(frozen=True, eq=False)
class Grid:
    """A statistic by row and column; rows are layers from the first upwards, columns are positions.

    Attributes:
        values: float64 (rows, columns); NaN where there is no number.
        rows: label of each row.
        columns: label of each column.
        unit: of the values, for instance "nats"; "" for a count or a share.
        title: what is shown, one line.
        texts: what stands in each cell, rows of columns (the likeliest token); empty for nothing.
        marks: bool (rows, columns), cells to outline (the likeliest token changed); None for none.
        diverging: whether values are differences, to be coloured from a middle at 0.
    """

    values: Floats
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    unit: str
    title: str
    texts: tuple[tuple[str, ...], ...] = ()
    marks: NDArray[np.bool_] | None = None
    diverging: bool = False

    def __post_init__(self) -> None:
        shape = (len(self.rows), len(self.columns))
        texts_fit = not self.texts or [len(row) for row in self.texts] == [shape[1]] * shape[0]
        if self.values.shape != shape or not texts_fit or (self.marks is not None and self.marks.shape != shape):
            raise ValueError(
                f"a grid of {shape[0]} rows and {shape[1]} columns needs values, texts and marks like that"
            )


@dataclass(frozen=True, eq=False)
class Bands:
    """A statistic along an axis, with its spread over prompts.

    Attributes:
        x: float64 (n,), for instance numbers of layers.
        median: float64 (n,); NaN where fewer than one prompt has a number.
        low: float64 (n,), lower quartile.
        high: float64 (n,), upper quartile.
        unit: of the statistic; "" for a count or a share.
        title: what is shown, one line.
        prompts: int (n,), how many prompts have a number at each x.
        pooled: float64 (n,), the ratio of sums over prompts, for shares; None for other statistics.
        axis: name of x.
    """

    x: Floats
    median: Floats
    low: Floats
    high: Floats
    unit: str
    title: str
    prompts: NDArray[np.int64]
    pooled: Floats | None = None
    axis: str = "layer"

    def __post_init__(self) -> None:
        given = (self.median, self.low, self.high, self.prompts, *(() if self.pooled is None else (self.pooled,)))
        if self.x.ndim != 1 or any(array.shape != self.x.shape for array in given):
            raise ValueError("bands need one median, quartile and count for each x")


def grid(trace: LensTrace, name: str) -> Grid:
    """A statistic of one trace as layers × positions, with the likeliest token in each cell.

    Raises:
        DataError: the trace has no such statistic.
    """
    texts = tuple(tuple(trace.word(int(token)) for token in row) for row in trace.top_ids[..., 0])
    title = f"{trace.meta.variant}: {name}"
    return Grid(read_statistic(trace, name), _rows(trace), _columns(trace), unit_of(name), title, texts)


def difference(one: LensTrace, other: LensTrace, name: str) -> Grid:
    """What `other` has more than `one` of a statistic; texts are those of `other`, marked where the top-1 changed.

    Raises:
        DataError: they were not traced on the same cells of the same tokens, or one lacks the statistic.
    """
    check_alike([one, other])
    values = read_statistic(other, name) - read_statistic(one, name)
    changed = one.top_ids[..., 0] != other.top_ids[..., 0]
    title = f"{other.meta.variant} − {one.meta.variant}: {name}"
    return Grid(values, _rows(one), _columns(one), unit_of(name), title, grid(other, name).texts, changed, True)


def bound_kl(one: LensTrace, other: LensTrace) -> Grid:
    """Lower bound of KL(one ‖ other) from the top tokens of both, for pairs that were not traced with each other.

    Raises:
        DataError: they were not traced on the same cells of the same tokens.
    """
    check_alike([one, other])
    values = np.empty(one.cells)
    for cell in np.ndindex(*one.cells):
        lists = (side[cell].tolist() for trace in (one, other) for side in (trace.top_ids, trace.top_probs))
        values[cell] = coarse_kl(*lists)
    title = f"KL({one.meta.variant} ‖ {other.meta.variant}), lower bound from top tokens"
    return Grid(values, _rows(one), _columns(one), "nats", title, grid(other, "entropy").texts)


def bands(traces: Sequence[LensTrace], name: str, position: int = -1) -> Bands:
    """Median and quartiles of a statistic over prompts, by layer.

    Args:
        traces: one variant, one trace a prompt.
        name: as for `read_statistic`.
        position: place in the traces' positions.

    Raises:
        DataError: as `collect`.
    """
    values = collect(traces, name, position)
    title = f"{traces[0].meta.variant}: {name}"
    return spread(values, traces[0].layers.astype(np.float64), unit_of(name), title)


def spread(values: Floats, x: Floats, unit: str, title: str, pooled: Floats | None = None) -> Bands:
    """Bands from values `(prompts, n)`; NaN is left out and not counted."""
    present = np.isfinite(values)
    quartiles = np.full((3, values.shape[1]), np.nan)
    for column in np.flatnonzero(present.any(0)):
        quartiles[:, column] = np.quantile(values[present[:, column], column], [0.25, 0.5, 0.75])
    low, median, high = quartiles
    return Bands(x, median, low, high, unit, title, present.sum(0).astype(np.int64), pooled)


def _rows(trace: LensTrace) -> tuple[str, ...]:
    return tuple(str(layer) for layer in trace.layers)


def _columns(trace: LensTrace) -> tuple[str, ...]:
    return tuple(trace.tokens[place] for place in trace.positions)
