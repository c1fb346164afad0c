"""A decoder layer of the Llama shape in one operator: a token of one request is otherwise mostly calls of operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltakeeper.kernels.attention import paged_attention, write_cache_
from deltakeeper.kernels.pointwise import rms_norm, rotate, silu_mul
from deltakeeper.kernels.products import NEVER, linears
from deltakeeper.kernels.registration import Operator, Operators, refusal
from deltakeeper.kernels.rows import RowGroups

Tensor = torch.Tensor


def decoder_layer(
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[Tensor],
    norm_slots: Sequence[Tensor],
    terms: Tensor,
    groups: RowGroups,
    turns: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    places: Tensor,
    tables: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    *,
    eps: float,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    merge_from: int | None = None,
) -> Tensor:
    """Norm, queries, keys and values, rotation, attention, output, norm and gated unit, with both residuals.

    The same bits as its parts one after another: `rms_norm`, `linears`, `rotate`, `write_cache_`, `paged_attention`,
    `silu_mul`.

    Args:
        x: bfloat16 `(rows, width)`, contiguous.
        weights: of queries, keys, values, output, gate, up and down, bfloat16 `(out, in)`, without biases.
        norms: before attention and before the gated unit, `(slots, width)` each.
        norm_slots: the row of each norm for each row of `x`, int64 `(rows,)`.
        terms: the tables of the seven weights, int64 `(7, slots, depth)`.
        groups: which rows belong to which slot.
        turns: cosines and sines, `(rows, dim)`.
        cache: keys and values, `(blocks, kv_heads, 16, dim)`; those of these rows are written.
        places: as in `write_cache_`.
        tables: as in `paged_attention`, like `query_starts` and `lengths`.
        query_starts: see `tables`.
        lengths: see `tables`.
        eps: of the norms.
        scale: of the scores, as `window` and `softcap`.
        window: see `scale`.
        softcap: see `scale`.
        merge_from: see `linear`.

    Raises:
        KernelError: shapes, dtypes, slots, places or blocks do not fit.
    """
    most = NEVER if merge_from is None else merge_from
    try:
        y: Tensor = _OPERATORS.ready()[0](
            *(x, weights, norms, norm_slots, terms, groups.slots, groups.starts, *turns, *cache, places),
            *(tables, query_starts, lengths, eps, scale, window, softcap, most),
        )
    except (RuntimeError, IndexError) as error:
        raise refusal("decoder_layer", error) from error
    return y


def _plain(
    x: Tensor,
    weights: list[Tensor],
    norms: list[Tensor],
    norm_slots: list[Tensor],
    terms: Tensor,
    slots: Tensor,
    starts: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    places: Tensor,
    tables: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    eps: float,
    scale: float,
    window: int,
    softcap: float,
    merge_from: int,
) -> Tensor:
    """The parts one after another."""
    groups, rows, dim = RowGroups(slots, starts, norm_slots[0]), x.shape[0], cache_k.shape[3]

    def multiply(given: Tensor, first: int, last: int) -> list[Tensor]:
        return linears(given, weights[first:last], terms[first:last], groups, merge_from=merge_from)

    q, k, v = (part.view(rows, -1, dim) for part in multiply(rms_norm(x, norms[0], norm_slots[0], eps), 0, 3))
    q, k = rotate(q, k, cos, sin)
    write_cache_(cache_k, cache_v, k, v, places)
    seen = paged_attention(
        q, cache_k, cache_v, tables, query_starts, lengths, scale=scale, window=window, softcap=softcap
    )
    x = x + multiply(seen.view(rows, -1), 3, 4)[0]
    gate, up = multiply(rms_norm(x, norms[1], norm_slots[1], eps), 4, 6)
    return x + multiply(silu_mul(gate, up), 6, 7)[0]


def _shape(x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x)


_OPERATORS = Operators(
    Operator(
        "decoder_layer(Tensor x, Tensor[] weights, Tensor[] norms, Tensor[] norm_slots, Tensor terms, Tensor slots, "
        "Tensor starts, Tensor cos, Tensor sin, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor places, Tensor tables, "
        "Tensor query_starts, Tensor lengths, float eps, float scale, int window, float softcap, int merge_from) "
        "-> Tensor",
        _plain,
        _shape,
    ),
)
