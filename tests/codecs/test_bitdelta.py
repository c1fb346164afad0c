import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from deltakeeper.codecs import BitDelta
from deltakeeper.errors import CodecError

GAUSSIAN_ERRORS = (0.603, 0.362, 0.242, 0.182, 0.151, 0.133, 0.122, 0.114)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encode(delta, **settings):
    (term,) = BitDelta(**settings).encode(delta, name="w")
    return term


def error(term, delta):
    return float((term.to_dense().double() - delta).norm() / delta.double().norm())


def partly_zero(share):
    delta = gaussian(600, 500)
    return delta * (torch.rand(delta.shape, generator=torch.Generator().manual_seed(1)) >= share)


def test_gaussian_oracle():
    delta = gaussian(1000, 1000) * 5e-4
    term = encode(delta, bits=8)
    for planes, wanted in enumerate(GAUSSIAN_ERRORS, start=1):
        assert error(term.with_planes(planes), delta) == pytest.approx(wanted, abs=0.003)


def test_a_coarser_fit_is_the_first_planes_of_a_finer_one():
    delta = partly_zero(0.7)
    fine = encode(delta, bits=6)
    for bits in (1, 3):
        coarse = encode(delta, bits=bits)
        assert torch.equal(fine.with_planes(bits).to_dense(), coarse.to_dense())
        assert coarse.zero == fine.zero


def reference(delta, bits, axes, zero):
    """The definition in float64, without packing."""
    left, total = delta.double(), torch.zeros_like(delta).double()
    present = delta != 0 if zero == "zero" else torch.ones_like(delta, dtype=torch.bool)
    for _ in range(bits):
        sign = torch.where(left > 0 if zero == "minus" else left >= 0, 1.0, -1.0) * present
        count = present.double().sum(axes, keepdim=True).clamp(min=1)
        scale = left.abs().sum(axes, keepdim=True) / count
        left, total = left - scale * sign, total + scale * sign
    return total


@pytest.mark.parametrize("zero", ["plus", "minus", "zero"])
@pytest.mark.parametrize(("scale", "axes"), [("tensor", (0, 1)), ("row", (1,)), ("column", (0,))])
def test_planes_equal_the_definition(scale, axes, zero):
    delta = gaussian(37, 45) * (gaussian(37, 45, seed=1) > 0)
    decoded = encode(delta, bits=3, scale=scale, zero=zero).to_dense()
    torch.testing.assert_close(decoded.double(), reference(delta, 3, axes, zero), rtol=1e-5, atol=1e-6)


@given(
    arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, max_side=40),
        elements=st.floats(-1, 1, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6),
    ),
    st.sampled_from(["tensor", "row", "column"]),
    st.sampled_from(["plus", "minus", "zero", "auto"]),
)
def test_a_plane_never_makes_the_error_larger(array, scale, zero):
    delta = torch.from_numpy(array)
    errors = [float((encode(delta, bits=b, scale=scale, zero=zero).to_dense() - delta).norm()) for b in (1, 2, 4)]
    assert errors[0] <= float(delta.norm()) + 1e-5
    assert errors[2] - 1e-5 <= errors[1] <= errors[0] + 1e-5


def test_finer_scales_lower_the_error():
    delta = gaussian(200, 300) * torch.logspace(-2, 0, 200)[:, None]
    assert error(encode(delta, scale="row"), delta) == pytest.approx(0.603, abs=0.003)
    assert error(encode(delta, scale="tensor"), delta) > 0.65
    assert error(encode(delta.T, scale="column"), delta.T) == pytest.approx(0.603, abs=0.003)


def test_scale_shapes_follow_the_names():
    delta = gaussian(6, 9)
    shapes = {s: tuple(encode(delta, scale=s).scales[0].shape) for s in ("tensor", "row", "column")}
    assert shapes == {"tensor": (1,), "row": (6, 1), "column": (1, 9)}


@pytest.mark.parametrize(("zero", "wanted"), [("plus", (1 - 2 / np.pi * 0.5) ** 0.5), ("zero", 0.603)])
def test_error_with_half_the_entries_zero(zero, wanted):
    delta = partly_zero(0.5)
    assert error(encode(delta, zero=zero), delta) == pytest.approx(wanted, abs=0.003)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_auto_spends_the_mask_bit_only_where_it_beats_a_second_plane(share):
    delta = partly_zero(share)
    masked, finer = encode(delta, zero="zero"), encode(delta, bits=2, zero="plus")
    wanted = "zero" if error(masked, delta) < error(finer, delta) else "plus"
    assert encode(delta).zero == wanted


def test_auto_finds_both_answers():
    assert {encode(partly_zero(share)).zero for share in (0.1, 0.9)} == {"plus", "zero"}


def test_auto_sees_a_few_changed_rows_of_a_large_matrix():
    delta = torch.zeros(30000, 64)
    delta[12345] = gaussian(64)
    term = encode(delta)
    assert term.zero == "zero"
    assert not term.to_dense()[:12345].any()


@pytest.mark.parametrize("zero", ["auto", "plus", "minus", "zero"])
def test_nothing_stays_nothing(zero):
    assert not encode(torch.zeros(5, 40), bits=4, zero=zero).to_dense().any()


def test_constant_magnitude_is_lossless():
    delta = torch.where(gaussian(20, 70) > 0, 0.25, -0.25)
    assert torch.equal(encode(delta).to_dense(), delta)


def test_a_scale_that_underflows_is_refused():
    delta = torch.zeros(64, 64)
    delta[0, 0] = 1e-45
    with pytest.raises(CodecError, match="underflows"):
        encode(delta, zero="plus")


def test_one_bit_costs_one_bit():
    assert encode(gaussian(64, 128)).nbytes == 64 * 128 // 8 + 4
    assert encode(gaussian(64, 128), bits=3, zero="zero").nbytes == 4 * 64 * 128 // 8 + 3 * 4
