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

_WIDTHS = (64, 1024)  # likeliest tokens that are sorted to find where a top-p set ends, before all of them are


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


def choose(logits: torch.Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """The next token of each row.

    Args:
        logits: `(rows, vocabulary)`, any float dtype; -inf for tokens that a row may not choose.
        choosers: one a row.

    Returns:
        Token ids; -1 for a row whose logits are not numbers.
    """
    shaped = [i for i, c in enumerate(choosers) if c.penalties is not None or not c.sampling.greedy]
    if not shaped:
        return greedy(logits)
    tokens = greedy(logits)
    mine = [choosers[i] for i in shaped]
    rows = logits[shaped].float()  # (shaped, vocabulary), a copy
    for row, chooser in zip(rows, mine, strict=True):
        if chooser.penalties is not None:
            chooser.penalties.apply_(row)
    for i, token in zip(shaped, _choose_shaped(rows, mine), strict=True):
        if tokens[i] >= 0:
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


def _choose_shaped(rows: torch.Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """Tokens of rows after penalties; greedy rows among them take the likeliest."""
    if all(c.sampling.greedy for c in choosers):
        return greedy(rows)
    device = rows.device
    settings = [c.sampling for c in choosers]
    # A greedy row goes along as a draw among its likeliest tokens: top-k of one, the first of ties.
    heat = torch.tensor([1.0 if s.greedy else s.temperature for s in settings], device=device)
    rows = rows / heat.unsqueeze(1)
    floor = thresholds(rows, settings)
    weights = torch.exp(rows - rows.amax(-1, keepdim=True))  # (rows, vocabulary), the likeliest has weight 1
    weights = torch.where(rows >= floor.unsqueeze(1), weights, 0.0)
    chances = [0.0 if c.sampling.greedy else chance(c.seed, c.position) for c in choosers]
    return draw(weights, torch.tensor(chances, device=device)).tolist()


def thresholds(rows: torch.Tensor, settings: Sequence[Sampling]) -> torch.Tensor:
    """The least logit that top-k, top-p and min-p leave in each row.

    Thresholds are logits, so tokens tied with the last one kept are kept too, and a row's outcome does not depend on
    how ties were sorted. Top-p counts probabilities among what top-k left; min-p compares with the likeliest token.

    Args:
        rows: `(rows, vocabulary)` float32 logits over temperature.
        settings: one a row.

    Returns:
        float32 `(rows,)`; -inf where nothing is cut.
    """
    vocabulary = rows.shape[1]
    best = rows.amax(-1)  # (rows,)
    floor = torch.full_like(best, -torch.inf)
    ks = [1 if s.greedy else s.top_k if 0 < s.top_k < vocabulary else 0 for s in settings]
    if any(ks):
        widest = rows.topk(max(ks), -1).values  # (rows, widest k), falling
        at = torch.tensor([max(k, 1) - 1 for k in ks], device=rows.device).unsqueeze(1)
        cut = torch.tensor([k > 0 for k in ks], device=rows.device)
        floor = torch.where(cut, widest.gather(1, at).squeeze(1), floor)
    nucleus = [i for i, s in enumerate(settings) if s.top_p < 1.0 and not s.greedy]
    if nucleus:
        ps = torch.tensor([settings[i].top_p for i in nucleus], device=rows.device)
        floor[nucleus] = _top_p(rows[nucleus], floor[nucleus], ps)
    if any(s.min_p > 0.0 for s in settings):
        ratios = torch.tensor([s.min_p for s in settings], device=rows.device)
        floor = torch.maximum(floor, best + ratios.log())
    return torch.minimum(floor, best)


def _top_p(rows: torch.Tensor, floor: torch.Tensor, ps: torch.Tensor) -> torch.Tensor:
    """Raise `floor` to the last of the likeliest tokens whose probabilities reach `ps`, `(rows,)` each."""
    kept = torch.where(rows >= floor.unsqueeze(1), rows, -torch.inf)
    norm = kept.logsumexp(-1, keepdim=True)  # (rows, 1)
    out = floor.clone()
    todo = torch.arange(len(rows), device=rows.device)
    for width in (*_WIDTHS, rows.shape[1]):
        width = min(width, rows.shape[1])
        values = kept[todo].topk(width, -1).values  # (todo, width), falling
        shares = torch.exp(values - norm[todo])
        before = shares.double().cumsum(-1) - shares  # probability of all likelier tokens
        inside = before < ps[todo].unsqueeze(1)
        count = inside.sum(-1)  # at least 1
        out[todo] = torch.maximum(floor[todo], values.gather(1, (count - 1).unsqueeze(1)).squeeze(1))
        open_ended = (count == width) if width < rows.shape[1] else torch.zeros_like(count, dtype=torch.bool)
        todo = todo[open_ended]
        if not len(todo):
            break
    return out
