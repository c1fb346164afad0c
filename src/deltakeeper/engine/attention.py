"""Attention of many requests over one paged cache: the compiled operators where they are there, else plain torch."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from deltakeeper.engine.blocks import BLOCK


@functools.cache
def compiled(name: str, device: str) -> Callable[..., Any] | None:
    """The operator `torch.ops.deltakeeper.<name>`, or None where it was not built for this type of device."""
    try:
        importlib.import_module("deltakeeper.kernels")
    except ModuleNotFoundError:
        return None
    operators = torch.ops.deltakeeper
    if not hasattr(operators, name):
        return None
    served = torch._C._dispatch_has_kernel_for_dispatch_key(f"deltakeeper::{name}", device.upper())
    return getattr(operators, name) if served else None


def write_cache_(
    cache_k: torch.Tensor, cache_v: torch.Tensor, k: torch.Tensor, v: torch.Tensor, places: torch.Tensor
) -> None:
    """Put keys and values of a pass into the cache.

    Args:
        cache_k: `(blocks, kv_heads, BLOCK, dim)`, contiguous; `cache_v` alike.
        cache_v: see `cache_k`.
        k: `(tokens, kv_heads, dim)` in the cache's dtype, rows of any stride whose last dimension is dense; `v` alike.
        v: see `k`.
        places: int64 `(tokens,)`, block · BLOCK + offset, all different.
    """
    operator = compiled("write_cache_", k.device.type)
    if operator is not None:
        operator(cache_k, cache_v, k, v, places)
        return
    block, offset = places // BLOCK, places % BLOCK
    cache_k[block, :, offset] = k
    cache_v[block, :, offset] = v


def paged_attention(
    q: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    tables: torch.Tensor,
    query_starts: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """Causal attention of each request's newest tokens over its own context.

    Args:
        q: `(tokens, heads, dim)`; the rows of request r are `query_starts[r]:query_starts[r + 1]`, the last ones of its
            context.
        cache_k: `(blocks, kv_heads, BLOCK, dim)`, contiguous, with this pass's keys written; `cache_v` alike.
        cache_v: see `cache_k`.
        tables: int32 `(requests, most blocks)`, the blocks of each request in order; entries past its length are not
            read.
        query_starts: int32 `(requests + 1,)`.
        lengths: int32 `(requests,)`, tokens of context, those of this pass included.
        scale: factor of the products.
        window: how many tokens, itself included, a token looks back; 0 for all.
        softcap: products s become `softcap · tanh(s / softcap)`; 0 for none.

    Returns:
        `(tokens, heads, dim)` in the dtype of `q`.
    """
    operator = compiled("paged_attention", q.device.type)
    if operator is not None:
        result: torch.Tensor = operator(
            q, cache_k, cache_v, tables, query_starts, lengths, scale=scale, window=window, softcap=softcap
        )
        return result
    starts, totals = query_starts.tolist(), lengths.tolist()
    if len(totals) == starts[-1]:
        return _decode(q, cache_k, cache_v, tables, lengths, max(totals), scale, window, softcap)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    single = [r for r in range(len(totals)) if starts[r + 1] - starts[r] == 1]
    if single:
        rows = torch.tensor([starts[r] for r in single], device=q.device)
        chosen = torch.tensor(single, device=q.device)
        longest = max(totals[r] for r in single)
        out[rows] = _decode(q[rows], cache_k, cache_v, tables[chosen], lengths[chosen], longest, scale, window, softcap)
    for r, total in enumerate(totals):
        first, end = starts[r], starts[r + 1]
        if end - first > 1:
            out[first:end] = _prefill(q[first:end], cache_k, cache_v, tables[r], total, scale, window, softcap)
    return out


def _gather(
    cache_k: torch.Tensor, cache_v: torch.Tensor, tables: torch.Tensor, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The caches of some requests side by side, `(requests, kv_heads, tokens in whole blocks, dim)` each; copies."""
    blocks, heads, _, dim = cache_k.shape
    tables = tables[:, : -(-longest // BLOCK)].long()  # (requests, blocks used)
    index = (tables.unsqueeze(1) * heads + torch.arange(heads, device=tables.device).view(1, -1, 1)).flatten()
    shape = (len(tables), heads, -1, dim)
    k, v = (cache.view(blocks * heads, BLOCK * dim).index_select(0, index).view(shape) for cache in (cache_k, cache_v))
    return k, v


def _decode(
    q: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """Requests of one new token each, all at once, padded to the longest."""
    requests, heads, dim = q.shape
    k, v = _gather(cache_k, cache_v, tables, longest)
    at = torch.arange(k.shape[2], device=q.device)
    lengths = lengths.unsqueeze(1)
    seen = at < lengths  # (requests, padded length)
    if window:
        seen &= at >= lengths - window
    # The rest of a block holds what another request left there: not even a NaN of its may be multiplied by zero.
    unseen = ~seen[:, None, :, None]
    k.masked_fill_(unseen, 0)
    v.masked_fill_(unseen, 0)
    groups = q.view(requests, k.shape[1], -1, dim)  # heads that share keys stand where queries would
    out = _attend(groups, k, v, seen[:, None, None, :], scale, softcap)
    return out.reshape(requests, heads, -1)


def _prefill(
    q: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    table: torch.Tensor,
    total: int,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """One request of several new tokens."""
    tokens, heads, _ = q.shape
    k, v = (x[:, :, :total] for x in _gather(cache_k, cache_v, table.unsqueeze(0), total))  # (1, kv_heads, total, dim)
    sharing = heads // k.shape[1]
    if sharing > 1:
        k, v = k.repeat_interleave(sharing, 1), v.repeat_interleave(sharing, 1)
    q = q.transpose(0, 1).unsqueeze(0)  # (1, heads, tokens, dim)
    if tokens == total and not softcap and (not window or window >= total):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        own = torch.arange(total - tokens, total, device=q.device).unsqueeze(1)
        at = torch.arange(total, device=q.device)
        seen = at <= own  # (tokens, total)
        if window:
            seen &= at > own - window
        out = _attend(q, k, v, seen, scale, softcap)
    return out[0].transpose(0, 1)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """Attention over the places that are `seen`, every query seeing at least one; shapes as torch's own."""
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores.float().masked_fill(~seen, -math.inf), -1).to(q.dtype)
    return torch.matmul(weights, v)
