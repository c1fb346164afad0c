"""Paged attention against a token-by-token loop in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltakeeper.engine.blocks import BLOCK
from deltakeeper.kernels import attention
from deltakeeper.kernels.attention import paged_attention, write_cache_


@pytest.fixture(params=["plain", "as built"], autouse=True)
def path(request, monkeypatch):
    """The fallback always; and whatever is compiled here, which may be the fallback again."""
    if request.param == "plain":
        plain = SimpleNamespace(ready=lambda: (attention._plain_write, attention._plain_attention))
        monkeypatch.setattr(attention, "_OPERATORS", plain)


def case_of(requests, heads, kv_heads, dim, seed=0, dtype=torch.float32):
    """A cache full of other requests' leftovers (NaN), and the requests' own keys and values written into it."""
    generator = torch.Generator().manual_seed(seed)
    blocks = sum(-(-length // BLOCK) for length, _ in requests) + 2
    cache_k = torch.full((blocks, kv_heads, BLOCK, dim), math.nan, dtype=dtype)
    cache_v = cache_k.clone()
    free = torch.randperm(blocks, generator=generator).tolist()
    tables = torch.zeros(len(requests), max(-(-length // BLOCK) for length, _ in requests), dtype=torch.int32)
    keys, values = [], []
    for row, (length, _) in enumerate(requests):
        for at in range(-(-length // BLOCK)):
            tables[row, at] = free.pop()
        k, v = (torch.randn(length, kv_heads, dim, generator=generator).to(dtype) for _ in range(2))
        at = torch.arange(length)
        write_cache_(cache_k, cache_v, k, v, tables[row].long()[at // BLOCK] * BLOCK + at % BLOCK)
        keys.append(k)
        values.append(v)
    sizes = torch.tensor([0, *(new for _, new in requests)])
    q = torch.randn(int(sizes.sum()), heads, dim, generator=generator).to(dtype)
    starts = sizes.cumsum(0).to(torch.int32)
    lengths = torch.tensor([length for length, _ in requests], dtype=torch.int32)
    return q, keys, values, cache_k, cache_v, tables, starts, lengths


def expected_of(q, keys, values, requests, scale, window, softcap):
    out = torch.empty(q.shape, dtype=torch.float64)
    row = 0
    for (length, new), k, v in zip(requests, keys, values, strict=True):
        sharing = q.shape[1] // k.shape[1]
        for position in range(length - new, length):
            first = max(0, position + 1 - window) if window else 0
            for head in range(q.shape[1]):
                seen = k[first : position + 1, head // sharing].double()
                scores = seen @ q[row, head].double() * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                out[row, head] = scores.softmax(0) @ v[first : position + 1, head // sharing].double()
            row += 1
    return out


@given(
    requests=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=4),
    heads=st.sampled_from([(4, 4), (4, 2), (5, 1)]),
    window=st.sampled_from([0, 1, 7, 40]),
    softcap=st.sampled_from([0.0, 2.0]),
    decode_only=st.booleans(),
    seed=st.integers(0, 100),
)
def test_it_is_attention(requests, heads, window, softcap, decode_only, seed):
    requests = [(max(a, b), 1 if decode_only else min(a, b)) for a, b in requests]
    q, keys, values, cache_k, cache_v, tables, starts, lengths = case_of(requests, *heads, 8, seed)
    out = paged_attention(q, cache_k, cache_v, tables, starts, lengths, scale=0.3, window=window, softcap=softcap)
    assert out.shape == q.shape and out.dtype == q.dtype
    expected = expected_of(q, keys, values, requests, 0.3, window, softcap)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_as_exact_as_its_format():
    requests = [(20, 1), (33, 9), (1, 1)]
    q, keys, values, cache_k, cache_v, tables, starts, lengths = case_of(requests, 4, 2, 16, dtype=torch.bfloat16)
    out = paged_attention(q, cache_k, cache_v, tables, starts, lengths, scale=0.25, window=0, softcap=0.0)
    assert out.dtype == torch.bfloat16
    expected = expected_of(q, keys, values, requests, 0.25, 0, 0.0)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)


def test_writing_touches_its_places_alone():
    cache_k = torch.zeros(4, 2, BLOCK, 3)
    cache_v = torch.zeros(4, 2, BLOCK, 3)
    places = torch.tensor([5, 2 * BLOCK + 15, 3 * BLOCK])
    k, v = torch.randn(2, 3, 3).transpose(0, 1), torch.randn(3, 2, 3)  # (tokens, kv_heads, dim); keys in strides
    write_cache_(cache_k, cache_v, k, v, places)
    for token, (block, offset) in enumerate([(0, 5), (2, 15), (3, 0)]):
        assert torch.equal(cache_k[block, :, offset], k[token])
        assert torch.equal(cache_v[block, :, offset], v[token])
    assert int((cache_k != 0).sum()) == 18 and int((cache_v != 0).sum()) == 18
