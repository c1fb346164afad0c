"""Sizes told from shape and settings alone are those of the terms that `encode` gives."""

from __future__ import annotations

import pytest
import torch

from deltakeeper.codecs import CODECS, parse_codec

SPELLINGS = (
    "bitdelta:zero=plus",
    "bitdelta:bits=3,zero=zero,scale=row",
    "bitdelta:bits=2,zero=minus,scale=column",
    "bitdelta:bits=2",
    "svd:rank=4",
    "svd:rank=500,factors=float32",
    "magnitude:keep=0.2",
    "magnitude:keep=0.3,per=row,values=float32",
    "dare:p=0.7",
    "dare:p=0.5,values=float32",
    "dare:q=0.5,values=int4",
    "deltazip:pattern=unstructured",
    "rtn:bits=3,group=7,symmetric=false",
    "dqrelo:factors=int3,zero=plus",
    "random_sign:scale=row",
    "shrink",
    "bitdelta:zero=plus+svd:rank=2",
    "bitdelta+magnitude:keep=0.1",
    *sorted(set(CODECS) - {"svd", "dense"}),
)
SHAPES = ((96, 160), (33, 70), (1, 1), (5, 300))


def delta(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_size_that_is_promised_is_kept(spelling, shape):
    codec = parse_codec(spelling)
    taken = sum(term.nbytes for term in codec.encode(delta(shape), name="w"))
    promised = codec.payload_bytes(shape)
    assert promised is None or promised == taken
    if promised is not None:
        zeros = sum(term.nbytes for term in codec.encode(torch.zeros(shape), name="w"))
        assert zeros == promised


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_size_that_is_expected_is_near(spelling):
    codec, shape = parse_codec(spelling), (256, 320)
    expected = codec.expected_bytes(shape)
    taken = sum(term.nbytes for term in codec.encode(delta(shape), name="w"))
    assert expected == pytest.approx(taken, rel=0.25)


def test_sizes_that_hang_on_the_data_are_not_promised():
    shape = (64, 64)
    for spelling in ("bitdelta", "magnitude", "dare", "svd:energy=0.5", "bitdelta+svd:rank=1"):
        assert parse_codec(spelling).payload_bytes(shape) is None, spelling
    assert parse_codec("svd:energy=0.5").expected_bytes(shape) is None
    assert parse_codec("svd:energy=0.5+svd:rank=1").expected_bytes(shape) is None
