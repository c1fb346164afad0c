"""The next token of each row: one argmax where all rows are greedy, vectorised filters where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from deltakeeper.engine.chances import chance, draw
from deltakeeper.engine.penalties import Penalties
from deltakeeper.engine.request import Sampling
from deltakeeper.engine.stream import Logprobs

_FEW = 64  # likeliest tokens that nearly always reach top-p
_STEPS, _STEPS_A_UNIT = 4096, 128  # of logits, down to 32 below the likeliest token, where e⁻³² of its weight is left


class Chooser(NamedTuple):
    """What decides one row.

    Attributes:
        sampling: the request's settings.
        seed: bytes of its seed.
        position: number of tokens that its answer has already.
        penalties: of its tokens so far, None where none are asked for.
    """

    sampling: Sampling
    seed: bytes
    position: int
    penalties: Penalties | None


def greedy(logits: torch.Tensor) -> list[int]:
    """The likeliest token of each row of `(rows, vocabulary)`; -1 where a row holds NaN or no finite maximum.

    On the CPU NumPy's argmax is 10 to 40 times faster than torch's.
    """
    if logits.device.type != "cpu":
        best, at = logits.max(-1)
        return torch.where(torch.isfinite(best), at, -1).tolist()
    rows = logits.float().numpy()
    found = rows.argmax(-1)
    finite = np.isfinite(rows[np.arange(len(rows)), found])
    tokens: list[int] = (found if finite.all() else np.where(finite, found, -1)).tolist()
    return tokens


def choose(logits: torch.Tensor, choosers: Sequence[Chooser], *, keep: bool = False) -> list[int]:
    """The next token of each row.

    Args:
        logits: `(rows, vocabulary)`, any float dtype; -inf for tokens that a row may not choose.
        choosers: one a row.
        keep: leave `logits` as they are; otherwise float32 ones are worked on in place.

    Returns:
        Token ids; -1 for a row whose logits are not numbers.
    """
    drawn = [i for i, chooser in enumerate(choosers) if not chooser.sampling.greedy]
    penalised = [(i, chooser.penalties) for i, chooser in enumerate(choosers) if chooser.penalties is not None]
    if not drawn and not penalised:
        return greedy(logits)
    rows = logits.clone() if keep and logits.dtype == torch.float32 else logits.float()
    for i, penalties in penalised:
        penalties.apply_(rows[i])
    if len(drawn) == len(choosers):
        return _draw_(rows, choosers)
    tokens = greedy(rows)
    if drawn:
        for i, token in zip(drawn, _draw_(rows[drawn], [choosers[i] for i in drawn]), strict=True):
            tokens[i] = token
    return tokens


def logprobs_of(logits: torch.Tensor, chosen: Sequence[int], counts: Sequence[int]) -> list[Logprobs]:
    """Log-probabilities of the chosen and of the likeliest tokens, from logits as the model gave them.

    Args:
        logits: `(rows, vocabulary)`.
        chosen: a token id a row.
        counts: how many of the likeliest tokens to name, a row.
    """
    logs = torch.log_softmax(logits.float(), -1)
    ids = torch.tensor(chosen, device=logs.device).unsqueeze(1)
    own = logs.gather(1, ids).squeeze(1).tolist()
    width = min(max(counts), logs.shape[1])
    if not width:
        return [Logprobs(value, ()) for value in own]
    values, at = logs.topk(width, -1)
    rows = zip(own, at.tolist(), values.tolist(), counts, strict=True)
    return [Logprobs(value, tuple(zip(a[:n], v[:n], strict=True))) for value, a, v, n in rows]


def _draw_(rows: torch.Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """Draw a token a row from float32 logits after penalties, `(rows, vocabulary)`, which are overwritten."""
    settings = [chooser.sampling for chooser in choosers]
    best = rows.amax(-1)  # (rows,)
    finite = torch.isfinite(best)
    cold = torch.tensor([1.0 / s.temperature for s in settings], device=rows.device)
    if not finite.all():
        rows[~finite] = 0.0  # any numbers will do
        best = torch.where(finite, best, 0.0)
    rows.sub_(best.unsqueeze(1)).mul_(cold.unsqueeze(1))  # the likeliest token is at 0
    floor = thresholds(rows, settings)
    if floor is None:
        weights = rows.exp_()
    else:
        outside = rows < floor.unsqueeze(1)
        weights = rows.exp_().masked_fill_(outside, 0.0)
    chances = torch.tensor([chance(c.seed, c.position) for c in choosers], device=rows.device)
    return torch.where(finite, draw(weights, chances), -1).tolist()


def thresholds(rows: torch.Tensor, settings: Sequence[Sampling]) -> torch.Tensor | None:
    """The least logit that top-k, top-p and min-p leave in each row, or None where nothing is cut.

    Thresholds are logits, so tokens tied with the last one kept are kept too, and a row's outcome does not depend on
    how ties were sorted. Top-p counts probabilities among what top-k left; min-p compares with the likeliest token.

    Args:
        rows: `(rows, vocabulary)` float32 logits over temperature, less those of the likeliest token.
        settings: one a row.

    Returns:
        float32 `(rows,)`, at most 0.
    """
    vocabulary, device = rows.shape[1], rows.device
    ks = [s.top_k if 0 < s.top_k < vocabulary else 0 for s in settings]
    nucleus = [i for i, s in enumerate(settings) if s.top_p < 1.0]
    least = any(s.min_p > 0.0 for s in settings)
    if not (any(ks) or nucleus or least):
        return None
    floor = torch.full((len(settings),), -torch.inf, device=device)
    if any(ks):
        highest = rows.topk(max(ks), -1).values  # (rows, widest k), falling
        last = highest.gather(1, torch.tensor([[max(k, 1) - 1] for k in ks], device=device)).squeeze(1)
        floor = torch.where(torch.tensor([k > 0 for k in ks], device=device), last, floor)
    if nucleus:
        some = len(nucleus) < len(settings)
        ps = torch.tensor([settings[i].top_p for i in nucleus], device=device)
        floor[nucleus] = _top_p(rows[nucleus] if some else rows, floor[nucleus], ps)
    if least:
        floor = torch.maximum(floor, torch.tensor([s.min_p for s in settings], device=device).log())
    return floor


def _top_p(rows: torch.Tensor, floor: torch.Tensor, ps: torch.Tensor) -> torch.Tensor:
    """Raise `floor` to the last of the likeliest tokens whose probabilities reach `ps`, `(rows,)` each.

    Nearly always a few tokens reach it, so those are looked at first; a row's own logits decide which way it goes.
    """
    total = torch.where(rows >= floor.unsqueeze(1), rows.exp(), 0.0).double().sum(-1)  # (rows,)
    target = ps * total
    highest = rows.topk(min(_FEW, rows.shape[1]), -1).values  # (rows, few), falling
    mass = torch.where(highest >= floor.unsqueeze(1), highest.exp(), 0.0).double()
    before = mass.cumsum(-1) - mass  # of all likelier tokens
    count = (before < target.unsqueeze(1)).sum(-1)  # at least 1
    last = highest.gather(1, (count - 1).unsqueeze(1)).squeeze(1)
    if highest.shape[1] < rows.shape[1]:
        for row in (count == highest.shape[1]).nonzero().flatten().tolist():
            last[row] = _last_of_many(rows[row], floor[row], target[row])
    return torch.maximum(floor, last)


def _last_of_many(row: torch.Tensor, floor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The logit at which the mass of the likeliest tokens of one row reaches `target`.

    Sums the mass in steps of logits first, and sorts only the step in which it is reached: sorting a whole vocabulary
    takes longer than a pass of a small model.
    """
    mass = torch.where(row >= floor, row.exp(), 0.0).double()  # (vocabulary,)
    step = (row * -_STEPS_A_UNIT).clamp(max=_STEPS - 1).long()
    sums = torch.bincount(step, mass, minlength=_STEPS)
    upto = sums.cumsum(0)
    at = torch.searchsorted(upto, target).clamp(max=_STEPS - 1)
    inside, order = row[step == at].sort(descending=True)
    if not len(inside):  # rounding at the very end: everything is kept
        return floor
    mass = mass[step == at][order]
    before = upto[at] - sums[at] + mass.cumsum(0) - mass
    return inside[(before < target).sum().clamp(min=1) - 1]
