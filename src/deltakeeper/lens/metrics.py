"""What is said of distributions and streams: pure functions on log-probabilities, natural logarithm throughout.

`log_p` and `log_q` are log-softmax over the last axis, any leading shape, float32 or float64; results have the leading
shape. Rounding of a float32 log-softmax shows from about 1e-6 nats downwards: read smaller divergences as zero. Names
say the usual definitions; some packages use them for others (a symmetrised KL called JS, max |p − q| called TV).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

JS_FLOOR = 1e-5
"""Nats of JS(base, fine-tune) under which a share of it would be a share of rounding."""
SHIFT_FLOOR = 1e-4
"""Length of a stream's shift, in lengths of the base's stream, under which a share of it would be one of rounding."""
REST_FLOOR = 1e-6
"""Least mass of "all other tokens" in `coarse_kl`: stored probabilities are rounded, and their rest may be 0."""
_TINY = 1e-38
_LEAST = -1e4
"""In place of minus infinity where only its exponential, 0, counts."""


def entropy(log_p: Tensor, p: Tensor | None = None) -> Tensor:
    """Entropy −Σ p log p in nats; `p`, the exponential, where it is at hand."""
    return _expectation(log_p, log_p, p).neg()


def kl(log_p: Tensor, log_q: Tensor, p: Tensor | None = None) -> Tensor:
    """Kullback-Leibler divergence KL(p‖q) = Σ p (log p − log q) in nats, from 0; infinite where q lacks support.

    `p` is the exponential of `log_p`, where it is at hand.
    """
    return _expectation(log_p, log_p - log_q, p).clamp(min=0)


def js(log_p: Tensor, log_q: Tensor, probs: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Jensen-Shannon divergence ½ KL(p‖m) + ½ KL(q‖m) with m = ½ (p + q), in nats, from 0 (exactly, if equal) to log 2.

    Summed as −½ Σ ((p + q) log(m / max) + min log(max / min)), max and min being the larger and smaller of p and q.
    Every addend is exact where they are equal and none is negative: kept shares are of roots of this. `probs` are the
    exponentials of both, where they are at hand.
    """
    p, q = (log_p.exp(), log_q.exp()) if probs is None else probs
    gap = (log_p - log_q).abs_()
    ratio = gap.neg().expm1_()  # min / max − 1
    # In place, since large temporaries that come and go cost more than the logarithms.
    addends = (ratio / 2).log1p_().mul_(ratio + 2).add_(gap.mul_(ratio.add_(1)))
    found = addends.mul_(torch.maximum(p, q)).sum(-1) / -2
    if found.isnan().any() and ((log_p == -math.inf) | (log_q == -math.inf)).any():  # ∞ − ∞ and 0 × ∞, seldom
        return js(log_p.clamp(min=_LEAST), log_q.clamp(min=_LEAST))
    return found.clamp(min=0, max=math.log(2))


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation distance ½ Σ |p − q|, from 0 to 1."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def rank(log_p: Tensor, ids: Tensor) -> Tensor:
    """How many tokens are likelier than a set's best one; 0 where it holds the top-1.

    Args:
        log_p: (..., V).
        ids: int64 (n,) for one set everywhere, or (..., n) for one a row.

    Returns:
        int64 (...).
    """
    best = _gathered(log_p, ids).amax(-1, keepdim=True)
    return (log_p > best).sum(-1)


def set_log_prob(log_p: Tensor, ids: Tensor) -> Tensor:
    """Log of the summed probability of a set of tokens in nats; `ids`, without repetition, as for `rank`."""
    return _gathered(log_p, ids).logsumexp(-1).clamp(max=0)


def top_k(log_p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens, likeliest first: ids int64 (..., k) and their probabilities (..., k)."""
    values, ids = log_p.topk(k, dim=-1)
    return ids, values.exp()


def top_k_overlap(ids: Tensor, others: Tensor) -> Tensor:
    """Share |A ∩ B| / k of two lists of k different tokens, int64 (..., k) each."""
    shared = (ids.unsqueeze(-1) == others.unsqueeze(-2)).any(-1)
    return shared.sum(-1) / ids.shape[-1]


def commitment(holds: Tensor) -> Tensor:
    """First layer from which a condition holds up to the last, counted from 0.

    The condition is the definition and is to be printed beside the number: the final top-1 token stays top-1 (`rank` of
    it is 0), stays in the top 3 (rank < 3), or keeps p > 0.5.

    Args:
        holds: bool (L, ...), whether the condition holds at each layer.

    Returns:
        float (...), NaN where it does not hold at the last layer.
    """
    unbroken = holds.flip(0).long().cumprod(0).sum(0)
    return torch.where(unbroken > 0, holds.shape[0] - unbroken.double(), math.nan)


def coarse_kl(ids: Sequence[int], probs: Sequence[float], others: Sequence[int], other_probs: Sequence[float]) -> float:
    """Lower bound of KL(p‖q) in nats from the top tokens of both.

    Both are binned alike: each token that is in both lists, and all the rest. Coarsening can only lower a KL, and so
    can floors under q. Print it as a lower bound; probabilities rounded to five digits may pass it by 1e-4.

    Args:
        ids: top tokens of p, without repetition.
        probs: their probabilities.
        others: top tokens of q.
        other_probs: their probabilities.
    """
    p, q = dict(zip(ids, probs, strict=True)), dict(zip(others, other_probs, strict=True))
    common = [token for token in p if token in q]
    bins = [(p[token], q[token]) for token in common]
    bins.append((max(1 - sum(a for a, _ in bins), 0.0), max(1 - sum(b for _, b in bins), REST_FLOOR)))
    return max(sum(a * (math.log(a) - math.log(max(b, _TINY))) for a, b in bins if a > 0), 0.0)


class StreamShift(NamedTuple):
    """How a variant's shift from the base lies to the fine-tune's; squared lengths, which add up over prompts.

    Attributes:
        dot: ⟨h − h_base, h_tuned − h_base⟩.
        tuned_square: ‖h_tuned − h_base‖².
        remainder_square: ‖(h − h_base) − κ (h_tuned − h_base)‖², κ = dot / tuned_square.
    """

    dot: Tensor
    tuned_square: Tensor
    remainder_square: Tensor


def stream_shift(stream: Tensor, base: Tensor, tuned: Tensor) -> StreamShift:
    """Shift of a stream beside the fine-tune's, all (..., D) of the same layer, position and tokens; float64 (...).

    Where the fine-tune's shift is shorter than `SHIFT_FLOOR` of the base's stream, all three are NaN: there is nothing
    to keep.
    """
    own, whole = stream.double() - base.double(), tuned.double() - base.double()
    dot, square = (own * whole).sum(-1), whole.square().sum(-1)
    square = torch.where(square > SHIFT_FLOOR**2 * base.double().square().sum(-1), square, math.nan)
    remainder = own - (dot / square).unsqueeze(-1) * whole
    return StreamShift(torch.where(square.isnan(), math.nan, dot), square, remainder.square().sum(-1))


def kept_stream(shift: StreamShift) -> tuple[Tensor, Tensor]:
    """Share κ of the fine-tuning shift that is kept (1 all, 0 none, may exceed 1), and the orthogonal remainder.

    Returns:
        κ = dot / ‖h_tuned − h_base‖² and the remainder in lengths of the fine-tune's shift; NaN where that has none.
    """
    return shift.dot / shift.tuned_square, (shift.remainder_square / shift.tuned_square).sqrt()


def kept_output(js_tuned: Tensor, js_base_tuned: Tensor) -> Tensor:
    """Share of the fine-tuning's effect on the output that is kept: 1 − √JS(tuned, variant) / √JS(base, tuned).

    Args:
        js_tuned: JS between fine-tune and variant, in nats.
        js_base_tuned: JS between base and fine-tune.

    Returns:
        1 for the fine-tune itself, 0 for the base, below 0 for what is further off than the base; NaN where
        `js_base_tuned` is below `JS_FLOOR`.
    """
    share = 1 - (js_tuned / js_base_tuned).sqrt()
    return torch.where(js_base_tuned >= JS_FLOOR, share, math.nan)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Cosine of vectors (..., D), float64 (...); NaN where one has no length."""
    one, other = one.double(), other.double()
    lengths = one.norm(dim=-1) * other.norm(dim=-1)
    return torch.where(lengths > 0, (one * other).sum(-1) / lengths, math.nan)


def _expectation(log_p: Tensor, values: Tensor, p: Tensor | None) -> Tensor:
    """Σ p x, where tokens of no probability (masked ones) add nothing whatever their x."""
    p = log_p.exp() if p is None else p
    found = (p * values).sum(-1)
    if found.isnan().any():  # 0 × ∞; looked for only then, since it costs as much as the sum
        found = torch.where(p == 0, 0, p * values).sum(-1)
    return found


def _gathered(log_p: Tensor, ids: Tensor) -> Tensor:
    if ids.ndim == 1:
        return log_p[..., ids]
    return log_p.gather(-1, ids.expand(*log_p.shape[:-1], ids.shape[-1]))
