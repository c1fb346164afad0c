"""What patching is judged by: one number a prompt, from the final logits at the positions that are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from deltakeeper.errors import LensError

Outcome = Callable[[torch.Tensor], torch.Tensor]
"""From final logits, float32 `(rows, positions, vocabulary)`, one number a prompt, `(rows,)`."""


def token_mass(ids: Sequence[int]) -> Outcome:
    """Probability of a set of tokens, summed over the set and averaged over positions: from 0 to 1.

    Args:
        ids: of the tokens, for instance `find_openers(tokenizer)["refusal"].ids`.

    Raises:
        LensError: no token is given.
    """
    chosen = _chosen(ids)

    def measure(logits: torch.Tensor) -> torch.Tensor:
        return torch.softmax(logits, -1)[..., chosen.to(logits.device)].sum(-1).mean(-1)

    return measure


def token_margin(ids: Sequence[int], others: Sequence[int]) -> Outcome:
    """Log of the odds of one set of tokens against another, in nats, averaged over positions.

    A probability hardly moves near 0 and 1, so a layer that does half of the work may seem to do none of it; log-odds
    have no such ends (Heimersheim and Nanda 2024, arXiv 2404.15255, recommend the difference of logits for this).

    Raises:
        LensError: no token is given, or one that is in both sets.
    """
    one, other = _chosen(ids), _chosen(others)
    if set(one.tolist()) & set(other.tolist()):
        raise LensError("a token is in both sets, so its odds mean nothing; give sets that share none.")

    def measure(logits: torch.Tensor) -> torch.Tensor:
        first, second = (logits[..., tokens.to(logits.device)].logsumexp(-1) for tokens in (one, other))
        return (first - second).mean(-1)

    return measure


def _chosen(ids: Sequence[int]) -> torch.Tensor:
    if not ids:
        raise LensError("there is no token whose probability could be measured; give at least one.")
    return torch.tensor(sorted(set(map(int, ids))))
