"""The two factors of one delta, `(out, rank)` and `(rank, in)`, from what an artifact stores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from deltakeeper.codecs.svd import Svd
from deltakeeper.layouts import Layout, Lowrank
from deltakeeper.layouts.settings import FLOAT_DTYPES

Factors = tuple[torch.Tensor, torch.Tensor]


def own_factors(terms: Sequence[Layout], rank: int | None) -> Factors | None:
    """The factors of a delta that is stored as float low-rank terms of at most `rank` in all, else None."""
    if not all(isinstance(t, Lowrank) and t.settings()["factors"] in FLOAT_DTYPES for t in terms):
        return None
    if rank is not None and total_rank(terms) > rank:
        return None
    payloads = [term.tensors() for term in terms]
    left = torch.cat([held["delta_U"].float() * held["delta_gain"] for held in payloads], 1)
    return left, torch.cat([held["delta_V"].float() for held in payloads], 0)


def total_rank(terms: Sequence[Layout]) -> int:
    """Rank of a sum of low-rank terms, at most."""
    return sum(int(term.settings()["rank"]) for term in terms)


def best_factors(delta: torch.Tensor, rank: int, name: str) -> Factors:
    """The best approximation of a float32 matrix by that rank; `name` decides the random directions that find it."""
    [term] = Svd(rank=rank, factors="float32").encode(delta, name=name)
    assert isinstance(term, Lowrank)
    return term.left * term.gain, term.right


def stored_factors(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> Factors:
    """Both factors in the dtype they are stored in."""
    if dtype != torch.float32:  # as large as each other, so that neither leaves the range of half precision
        shift = math.frexp(float(right.abs().max()) / float(left.abs().max()))[1] // 2
        left, right = left * 2.0**shift, right * 2.0**-shift
    return left.to(dtype).contiguous(), right.to(dtype).contiguous()


def padded_factors(left: torch.Tensor, right: torch.Tensor, rank: int) -> Factors:
    """The same product with factors of a larger rank."""
    more = rank - left.shape[1]
    return torch.nn.functional.pad(left, (0, more)), torch.nn.functional.pad(right, (0, 0, 0, more))
