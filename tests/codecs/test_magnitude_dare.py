import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from deltakeeper.codecs import Dare, Magnitude
from deltakeeper.errors import CodecError
from deltakeeper.layouts.bits import unpack_bits

deltas = arrays(
    np.float32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.sampled_from([0, -1, 1, 2, -3, 4.5])
)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encode(codec, delta, name="w"):
    (term,) = codec.encode(delta, name=name)
    return term


def error(term, delta):
    return float((term.to_dense() - delta).norm() / delta.norm())


@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize(("keep", "wanted"), [(0.5, 0.27), (0.1, 0.75), (0.01, 0.96)])
def test_gaussian_magnitude_error(keep, wanted, per):
    delta = gaussian(500, 1000)
    assert error(encode(Magnitude(keep=keep, per=per), delta), delta) == pytest.approx(wanted, abs=0.006)


@given(deltas, st.floats(0.01, 1.0))
def test_the_largest_are_kept_and_the_rest_is_zero(array, keep):
    delta = torch.from_numpy(array)
    decoded = encode(Magnitude(keep=keep, values="float32"), delta).to_dense()
    kept = decoded != 0
    count = min(math.ceil(keep * delta.numel()), int((delta != 0).sum()))
    assert int(kept.sum()) == count
    assert torch.equal(decoded[kept], delta[kept])
    dropped = delta.abs()[~kept]
    assert not count or not dropped.numel() or dropped.max() <= delta.abs()[kept].min()


@given(deltas, st.floats(0.01, 1.0))
def test_each_row_keeps_its_own_share(array, keep):
    delta = torch.from_numpy(array)
    kept = encode(Magnitude(keep=keep, per="row", values="float32"), delta).to_dense() != 0
    for row, chosen in zip(delta, kept, strict=True):
        assert int(chosen.sum()) == min(math.ceil(keep * row.numel()), int((row != 0).sum()))
        assert not chosen.any() or chosen.all() or row.abs()[~chosen].max() <= row.abs()[chosen].min()


@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize(("keep", "kind"), [(0.02, "gaps"), (0.5, "bits")])
def test_the_smaller_mask_is_stored(keep, kind, per):
    delta = gaussian(200, 1024)
    codec = Magnitude(keep=keep, per=per)
    term = encode(codec, delta)
    assert term.settings()["mask"] == kind
    assert term.nbytes == pytest.approx(codec.expected_bytes((200, 1024)), rel=0.01)


def test_of_equal_entries_the_first_are_kept():
    decoded = encode(Magnitude(keep=0.5), torch.ones(2, 4)).to_dense()
    assert decoded.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    decoded = encode(Magnitude(keep=0.5, per="row"), torch.ones(2, 4)).to_dense()
    assert decoded.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]


def test_rescale_divides_by_the_share():
    delta = gaussian(30, 40)
    plain = encode(Magnitude(keep=0.25, values="float32"), delta).to_dense()
    rescaled = encode(Magnitude(keep=0.25, values="float32", rescale=True), delta).to_dense()
    assert torch.equal(rescaled, plain * 4)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_gaussian_dare_error(p):
    delta = gaussian(1000, 1000)
    assert error(encode(Dare(p=p), delta), delta) ** 2 == pytest.approx(p / (1 - p), rel=0.05)


@pytest.mark.parametrize(("p", "q"), [(0.9, 0.3), (0.9, 1.0), (0.5, 0.7)])
def test_gaussian_darex_error(p, q):
    delta = gaussian(1000, 1000)
    wanted = (1 - p) * (1 / q - 1) ** 2 + p
    assert error(encode(Dare(p=p, q=q), delta), delta) ** 2 == pytest.approx(wanted, rel=0.03)


def test_dare_is_unbiased():
    delta = gaussian(300, 400)
    mean = sum(encode(Dare(p=0.5, seed=s), delta).to_dense() for s in range(64)) / 64
    assert float((mean - delta).norm() / delta.norm()) == pytest.approx(1 / 8, rel=0.05)


def test_kept_entries_are_scaled_and_stored_without_indices():
    delta = gaussian(64, 96)
    term = encode(Dare(p=0.75, values="float32"), delta)
    mask = unpack_bits(term.mask, 96)
    assert torch.equal(term.to_dense(), torch.where(mask, delta * 4, 0.0))
    assert set(term.tensors()) == {"delta_values", "delta_gain"}
    assert term.settings()["tensor"] == "w"


def test_nothing_dropped_is_nothing_changed():
    delta = gaussian(7, 33)
    assert torch.equal(encode(Dare(p=0.0, values="float32"), delta).to_dense(), delta)


@pytest.mark.parametrize("codec", [Magnitude(keep=0.01, rescale=True), Dare(p=0.5, seed=1)])
def test_rescaling_past_float32_is_refused(codec):
    with pytest.raises(CodecError, match="overflows float32"):
        codec.encode(torch.full((40, 50), 3e38), name="w")


@pytest.mark.parametrize(
    ("codec", "settings", "message"),
    [
        (Magnitude, {"keep": 0.0}, "above 0 and at most 1"),
        (Magnitude, {"keep": 1.5}, "above 0 and at most 1"),
        (Magnitude, {"keep": True}, "must be a number"),
        (Magnitude, {"keep": float("nan")}, "must be a number"),
        (Magnitude, {"rescale": "false"}, "true or false"),
        (Magnitude, {"rescale": 1}, "true or false"),
        (Magnitude, {"per": "column"}, "one of tensor, row"),
        (Dare, {"p": 1.0}, "at most 0.9999"),
        (Dare, {"p": -0.1}, "at least 0"),
        (Dare, {"q": 0.0}, "above 0"),
        (Dare, {"seed": -1}, "at least 0"),
        (Dare, {"seed": 1.0}, "whole number"),
        (Dare, {"values": "int2"}, "one of float16"),
    ],
)
def test_settings_out_of_range_are_refused(codec, settings, message):
    with pytest.raises(CodecError, match=message):
        codec(**settings)
