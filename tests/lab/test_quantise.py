"""Whole-model round-to-nearest: error within half a step, honest bytes, vectors untouched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakeeper.lab.quantise import FullModelRTN


@settings(max_examples=30, deadline=None)
@given(bits=st.integers(2, 8), rows=st.integers(1, 5), columns=st.integers(1, 200), seed=st.integers(0, 99))
def test_every_weight_moves_by_at_most_half_a_step(bits, rows, columns, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    rtn = FullModelRTN(bits=bits, group=32)
    [(name, rounded)] = rtn.quantise([("w", weight)])
    assert name == "w"
    assert rounded.shape == weight.shape
    for start in range(0, columns, 32):
        group, got = weight[:, start : start + 32], rounded[:, start : start + 32]
        step = group.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
        slack = 2.0**-11 * 2 ** (bits - 1)  # the scale is stored in float16, which moves the outermost code
        assert torch.all((group - got).abs() <= (0.5 + slack) * step * 1.001 + 1e-6)


def test_bytes_count_codes_scales_and_what_is_left_alone():
    rtn = FullModelRTN(bits=4, group=64)
    norm = torch.ones(100, dtype=torch.bfloat16)
    out = dict(rtn.quantise([("w", torch.randn(10, 100, dtype=torch.bfloat16)), ("norm", norm)]))
    assert torch.equal(out["norm"], norm)
    assert out["w"].dtype == torch.bfloat16
    assert rtn.nbytes == 10 * 100 // 2 + 10 * 2 * 2 + 200


def test_more_bits_are_nearer():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = [float((dict(FullModelRTN(bits=b).quantise([("w", weight)]))["w"] - weight).norm()) for b in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * float(weight.norm())


def test_a_zero_matrix_stays_zero():
    assert torch.equal(dict(FullModelRTN().quantise([("w", torch.zeros(3, 70))]))["w"], torch.zeros(3, 70))


@pytest.mark.parametrize("shape", [(2, 3, 70), (4, 64)])
def test_any_shape_comes_back(shape):
    assert dict(FullModelRTN().quantise([("w", torch.randn(shape))]))["w"].shape == shape
