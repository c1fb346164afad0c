"""Attention over a cache of keys and values cut into blocks of 16 tokens, for requests of any lengths in one call.

What a query gets from the compiled kernels depends on its own context alone, to the last bit: not on the other requests
of the pass, nor on whether its prompt came in one piece, in chunks, or token by token. Scores and sums are float32; in
bfloat16 on a CPU with AVX512-BF16 the weights of the values are rounded to bfloat16, and divided by the sum of the
rounded ones. What a block holds past the end of its request's context is never part of a sum, be it NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from deltakeeper.kernels.registration import Operator, Operators, nothing, refusal

BLOCK = 16
"""Tokens of a block of the cache."""


def write_cache_(
    cache_k: torch.Tensor, cache_v: torch.Tensor, k: torch.Tensor, v: torch.Tensor, places: torch.Tensor
) -> None:
    """Put keys and values of a pass into the cache.

    Args:
        cache_k: `(blocks, kv_heads, 16, dim)`, contiguous.
        cache_v: alike.
        k: `(tokens, kv_heads, dim)` in the cache's dtype, of any strides whose last dimension is contiguous.
        v: alike.
        places: int64 `(tokens,)`: block · 16 + offset, all different; negative ones are skipped.

    Raises:
        KernelError: shapes or dtypes do not fit, or a place is not in the cache.
    """
    try:
        _OPERATORS.ready()[0](cache_k, cache_v, k, v, places)
    except (RuntimeError, IndexError) as error:
        raise refusal("write_cache_", error) from error


def paged_attention(
    q: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    tables: torch.Tensor,
    query_starts: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of each request's newest tokens over its own context: `(tokens, heads, dim)`, as `q`.

    Args:
        q: `(tokens, heads, dim)`, last dimension contiguous; rows `query_starts[r]:query_starts[r + 1]` are the last
            tokens of request r's context.
        cache_k: `(blocks, kv_heads, 16, dim)`, contiguous, with the keys of this pass written; heads are a multiple of
            `kv_heads`, and adjacent ones share keys.
        cache_v: alike.
        tables: int32 `(requests, most blocks)`: the blocks of each request in order; only those that a query sees are
            read.
        query_starts: int32 `(requests + 1,)`, from 0 to tokens.
        lengths: int32 `(requests,)`: tokens of context, those of this pass included.
        scale: factor of the products.
        window: how many tokens, itself included, a token sees; 0 for all.
        softcap: products s become `softcap · tanh(s / softcap)`; 0 for none.
        sinks: `(heads,)`: scores that take part in the softmax and have no value, or None.

    Raises:
        KernelError: shapes or dtypes do not fit, or a table names a block that is not in the cache.
    """
    try:
        out: torch.Tensor = _OPERATORS.ready()[1](
            q, cache_k, cache_v, tables, query_starts, lengths, scale, window, softcap, sinks
        )
    except (RuntimeError, IndexError) as error:
        raise refusal("paged_attention", error) from error
    return out


def _plain_write(
    cache_k: torch.Tensor, cache_v: torch.Tensor, k: torch.Tensor, v: torch.Tensor, places: torch.Tensor
) -> None:
    if places.dtype != torch.int64 or k.shape != v.shape or places.shape != k.shape[:1]:
        raise RuntimeError("k, v and places do not have the shapes and dtypes that belong together")
    if k.dtype != cache_k.dtype or v.dtype != cache_v.dtype or places.max() >= len(cache_k) * BLOCK:
        raise RuntimeError("a place is not in the cache, or the cache has another dtype")
    kept = places >= 0
    block, offset = places[kept] // BLOCK, places[kept] % BLOCK
    cache_k[block, :, offset] = k[kept]
    cache_v[block, :, offset] = v[kept]


def _plain_attention(
    q: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    tables: torch.Tensor,
    query_starts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same, a request at a time."""
    heads, kv_heads = q.shape[1], cache_k.shape[1]
    starts, totals = query_starts.tolist(), lengths.tolist()
    if heads % kv_heads or len(starts) != len(totals) + 1 or starts[0] or starts[-1] != len(q):
        raise RuntimeError("the heads cannot share the heads of keys, or the query starts do not cover q")
    out = torch.empty(q.shape, dtype=q.dtype)
    for r, total in enumerate(totals):
        first, end = starts[r], starts[r + 1]
        if first == end:
            continue
        if end < first or total < end - first or total > tables.shape[1] * BLOCK:
            raise RuntimeError(f"request {r} has {total} tokens of context and {end - first} of this pass")
        own = torch.arange(total - (end - first), total).unsqueeze(1)
        begin = max(0, total - (end - first) - window + 1) // BLOCK * BLOCK if window else 0
        at = torch.arange(begin, total)
        table = tables[r, begin // BLOCK : -(-total // BLOCK)].long()
        if table.min() < 0 or table.max() >= len(cache_k):
            raise RuntimeError(f"the table of request {r} names a block that is not in the cache")
        k, v = (  # (heads, seen, dim)
            cache[table]
            .transpose(0, 1)
            .flatten(1, 2)[:, : total - begin]
            .float()
            .repeat_interleave(heads // kv_heads, 0)
            for cache in (cache_k, cache_v)
        )
        scores = q[first:end].transpose(0, 1).float() @ k.transpose(1, 2) * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        hidden = at > own  # (queries, seen)
        if window:
            hidden = hidden | (at <= own - window)
        scores = scores.masked_fill(hidden, -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.float().view(-1, 1, 1).expand(-1, end - first, 1)], -1)
        weights = scores.softmax(-1)[..., : total - begin]
        out[first:end] = (weights @ v).transpose(0, 1).to(q.dtype)
    return out


def _attention_shape(q: torch.Tensor, *others: Any) -> torch.Tensor:
    return q.new_empty(q.shape)


_OPERATORS = Operators(
    Operator(
        "write_cache_(Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor k, Tensor v, Tensor places) -> ()",
        _plain_write,
        nothing,
    ),
    Operator(
        "paged_attention(Tensor q, Tensor cache_k, Tensor cache_v, Tensor tables, Tensor query_starts, "
        "Tensor lengths, float scale, int window=0, float softcap=0.0, Tensor? sinks=None) -> Tensor",
        _plain_attention,
        _attention_shape,
    ),
)
