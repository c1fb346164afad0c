"""Fitting of sign planes, from a whole delta or from blocks of rows of base and fine-tune as they are read."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from deltakeeper.codecs.base import RowEncoder
from deltakeeper.errors import CodecError
from deltakeeper.fidelity import Sums
from deltakeeper.layouts.base import Layout
from deltakeeper.layouts.bits import row_blocks
from deltakeeper.layouts.signs import Signs, scale_shape
from deltakeeper.native import SignRows, merge_signs, pack_signs

Scale = Literal["tensor", "row", "column"]
Zero = Literal["plus", "minus", "zero"]

SAMPLE_ENTRIES = 1 << 20


def fit_planes(values: torch.Tensor, planes: int, scale: Scale, zero: Zero) -> Signs:
    """Sign planes of a float32 matrix `(out, in)`: the sign of what is left over times its mean, plane after plane.

    With `zero="zero"` exact zeros of `values` stay zero in every plane and means are over the others.
    """
    out, columns = values.shape
    shape = (out, columns)
    left_over = values.clone() if planes > 1 else values
    first: SignRows | None = None
    packed: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    for plane in range(planes):
        found, by_column = SignRows.empty(out, columns), np.zeros((1, columns))
        mask = found.present if first is None else first.present
        for rows in row_blocks(out, columns):
            block = left_over[rows]
            if plane:
                _subtract_plane(
                    block, packed[-1][rows], scales[-1], scale, rows, mask[rows] if zero == "zero" else None
                )
            pack_signs(block, minus=zero == "minus", into=found[rows])
            if scale == "column":
                by_column += np.abs(block.numpy()).sum(axis=0, dtype=np.float64, keepdims=True)
        first = first or found
        packed.append(found.words.bitwise_and_(mask) if zero == "zero" else found.words)
        entries = _entries(values, first, scale) if zero == "zero" else None
        scales.append(mean_scale(shape, scale, found, by_column, entries))
    nonzero = first.present if zero == "zero" and first is not None else None
    return Signs(shape, scale, zero, tuple(packed), tuple(scales), nonzero)


def mean_scale(
    shape: tuple[int, int],
    scale: Scale,
    found: SignRows,
    by_column: NDArray[np.float64],
    entries: NDArray[np.float64] | None,
) -> torch.Tensor:
    """Mean absolute entries in `scale_shape`, float32: over all entries, or over `entries` of them.

    The sum over rows is exact (`math.fsum`), so that it does not depend on how the rows were cut into blocks.
    """
    sums: NDArray[np.float64]
    if scale == "tensor":
        sums = np.array([_exact_sum(found.absolute)])
    else:
        sums = found.absolute[:, None] if scale == "row" else by_column
    every = {"tensor": shape[0] * shape[1], "row": shape[1], "column": shape[0]}[scale]
    counts = every if entries is None else np.maximum(entries, 1.0)
    return torch.from_numpy((sums / counts).astype(np.float32).reshape(scale_shape(shape, scale)))


def choose_zero_rule(sample: torch.Tensor, scale: Scale, any_delta: bool) -> Literal["plus", "zero"]:
    """`zero` iff one plane with a mask has a lower error than two planes without, which take the same bytes.

    Args:
        sample: some rows of the delta, float32 `(rows, in)`.
        scale: what scales belong to.
        any_delta: whether the whole delta has an entry that is not zero.
    """
    if bool(sample.all()):
        return "plus"
    if not bool(sample.any()):
        return "zero" if any_delta else "plus"
    masked, finer = fit_planes(sample, 1, scale, "zero"), fit_planes(sample, 2, scale, "plus")
    errors = [float((term.to_dense() - sample).double().norm()) for term in (masked, finer)]
    return "zero" if errors[0] < errors[1] else "plus"


def sample_step(out: int, columns: int) -> int:
    """Every how many-th row is looked at to choose the zero rule: about a million entries are."""
    return max(1, out * columns // SAMPLE_ENTRIES)


class PlaneRows(RowEncoder):
    """One sign plane from blocks of rows, without the delta ever being whole in memory."""

    def __init__(self, shape: tuple[int, int], scale: Literal["tensor", "row"], zero: Zero | None, name: str) -> None:
        """`zero` None means that the rule is chosen, as `choose_zero_rule` says."""
        self._shape, self._scale, self._zero, self._name = shape, scale, zero, name
        self._found: SignRows | None = None  # taken with the first rows: encoders are also made to plan
        self._done = self._broken = 0
        self._sample: list[torch.Tensor] = []

    def add(self, base: torch.Tensor, tuned: torch.Tensor) -> None:
        """See `RowEncoder.add`."""
        if self._found is None:
            self._found = SignRows.empty(*self._shape)
        rows = slice(self._done, self._done + len(tuned))
        found = pack_signs(tuned, base, minus=self._zero == "minus", into=self._found[rows])
        if not np.isfinite(found.absolute).all():
            self._broken += int((~torch.isfinite(tuned.float() - base.float())).sum())
        if self._zero is None:
            step = sample_step(*self._shape)
            first = -self._done % step
            self._sample.append(tuned[first::step].float() - base[first::step].float())
        self._done = rows.stop

    def finish(self) -> tuple[list[Layout], Sums]:
        """See `RowEncoder.finish`."""
        found, (out, columns) = self._found, self._shape
        if found is None or self._done != out:
            raise ValueError(f"'{self._name}' got {self._done} of its {out} rows")
        if self._broken:
            raise CodecError(
                f"the delta of '{self._name}' holds NaN or infinity in {self._broken} entries; "
                "repair or leave out this checkpoint."
            )
        nonzero = int(found.nonzero.sum())
        zero = self._zero or choose_zero_rule(torch.cat(self._sample), self._scale, nonzero > 0)
        masked = zero == "zero"
        counts = found.nonzero.astype(np.float64)[:, None] if self._scale == "row" else np.array([float(nonzero)])
        scale = mean_scale(self._shape, self._scale, found, np.zeros((1, columns)), counts if masked else None)
        if nonzero and not bool(scale.any()):
            raise CodecError(f"the scale of '{self._name}' underflows to zero; leave this tensor dense.")
        words = found.words.bitwise_and_(found.present) if masked else found.words
        term = Signs(self._shape, self._scale, zero, (words,), (scale,), found.present if masked else None)
        steps = np.broadcast_to(scale.numpy().astype(np.float64).reshape(-1), (out,))
        covered = found.nonzero if masked else np.full(out, columns)
        sums = Sums(
            entries=out * columns,
            true_square=_exact_sum(found.square),
            decoded_square=_exact_sum(steps * steps * covered),
            product=_exact_sum(steps * found.absolute),
            zeros=out * columns - nonzero,
            agreeing=int(found.nonzero[steps > 0].sum()),
        )
        return [term], sums


def _subtract_plane(
    block: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, axis: Scale, rows: slice, mask: torch.Tensor | None
) -> None:
    """`block -= plane`, in place."""
    step = scale[rows] if axis == "row" else scale
    if merge_signs([words], [-step], axis, mask, block, block):
        return
    plane = Signs(
        (block.shape[0], block.shape[1]), axis, "plus" if mask is None else "zero", (words,), (step,), mask
    ).to_dense()
    block -= plane


def _entries(values: torch.Tensor, found: SignRows, scale: Scale) -> NDArray[np.float64]:
    counts: NDArray[np.float64] = found.nonzero.astype(np.float64)[:, None]
    if scale == "column":
        counts = np.count_nonzero(values.numpy(), axis=0).astype(np.float64)[None, :]
    elif scale == "tensor":
        counts = counts.sum(axis=0)
    return counts


def _exact_sum(values: NDArray[np.float64]) -> float:
    return math.fsum(values.tolist())
