"""The box of sign planes: every entry keeps its signs, and every plane its mean magnitude."""

from __future__ import annotations

import torch

from deltakeeper.codecs.box import MARGIN, Box, Guarded
from deltakeeper.codecs.cells import Cells, Means
from deltakeeper.codecs.planes import choose_zero_rule, sample_step
from deltakeeper.layouts.bits import unpack_bits
from deltakeeper.layouts.signs import Signs


def sign_box(values: torch.Tensor, term: Signs, *, auto: bool) -> Box:
    """The deltas with the same signs and scales in every plane.

    A plane has the sign of what the earlier ones leave over, so with their scales fixed each entry has an interval. The
    scales stay if the entries of each pattern of signs keep their sum.

    Args:
        values: the delta, float32 `(out, in)`.
        term: what it is encoded as.
        auto: whether the rule for zeros was chosen from the data; then exact zeros stay zero and others do not.
    """
    columns = term.shape[1]
    low, high = torch.full_like(values, -torch.inf), torch.full_like(values, torch.inf)
    total, classes = torch.zeros_like(values), torch.zeros(values.shape, dtype=torch.uint8)
    first: torch.Tensor | None = None
    least = _least(values)
    for words, scale in zip(term.packed, term.scales, strict=True):
        plus = unpack_bits(words, columns)
        margin = MARGIN * scale if first is not None else torch.tensor(least)
        above, below = total + margin, total - margin
        if first is None and not auto and term.zero != "zero":  # a zero has one of the signs
            above, below = (total, below) if term.zero == "plus" else (above, total)
        low = torch.where(plus, torch.maximum(low, above), low)
        high = torch.where(plus, high, torch.minimum(high, below))
        first = plus if first is None else first
        classes = classes * 2 + (plus != first)
        total += torch.where(plus, scale, -scale)
    assert first is not None
    signs = torch.where(first, 1, -1).to(torch.int8)
    if auto or term.zero == "zero":
        nothing = values == 0
        low, high = low.masked_fill_(nothing, 0.0), high.masked_fill_(nothing, 0.0)
        signs.masked_fill_(nothing, 0)
    several = len(term.packed) > 1
    box = Cells.around(values, low, high, Means(signs, term.scale, classes if several else None))  # type: ignore[arg-type]
    if not auto:
        return box
    step = sample_step(*values.shape)
    if bool(values[::step].all()):  # no zero in the sample, and none will come: the rule is `plus` in any case
        return box

    def agrees(candidate: torch.Tensor) -> bool:
        sample = candidate[::step]
        return choose_zero_rule(sample, term.scale, bool(values.any())) == term.zero  # type: ignore[arg-type]

    return Guarded(box, agrees)


def _least(values: torch.Tensor) -> float:
    """A magnitude that counts as nothing beside the mean, and is not zero."""
    return max(MARGIN * 1e-2 * float(values.abs().mean(dtype=torch.float64)), 2.0**-140)
