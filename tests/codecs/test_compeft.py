"""ComPEFT against its formula written as a loop over the sorted flat delta."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from deltakeeper.codecs import ComPeft
from deltakeeper.errors import CodecError

deltas = arrays(
    np.float32, array_shapes(min_dims=2, max_dims=2, max_side=30), elements=st.sampled_from([0, -1, 1, 2, -3, 4.5])
)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decode(codec, delta):
    (term,) = codec.encode(delta, name="w")
    return term.to_dense()


def by_the_paper(delta, keep, scale, alpha):
    """Sort the flat entries, keep the sign of the top share, times a magnitude (Yadav et al. 2023, algorithm 1)."""
    flat = [float(value) for value in delta.flatten()]
    order = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))
    kept = [i for i in order[: math.ceil(keep * len(flat))] if flat[i] != 0]
    if scale == "mean":
        magnitude = math.fsum(abs(flat[i]) for i in kept) / len(kept) if kept else 0.0
    else:
        mean = math.fsum(flat) / len(flat)
        magnitude = math.sqrt(math.fsum((value - mean) ** 2 for value in flat) / len(flat))
    found = [0.0] * len(flat)
    for i in kept:
        found[i] = alpha * magnitude * (1 if flat[i] > 0 else -1)
    return torch.tensor(found).view(delta.shape)


@settings(max_examples=60, deadline=None)
@given(deltas, st.floats(0.01, 1.0), st.sampled_from(["mean", "std"]), st.sampled_from([0.5, 1.0, 3.0]))
def test_the_formula(array, keep, scale, alpha):
    delta = torch.from_numpy(array)
    found = decode(ComPeft(keep=keep, scale=scale, alpha=alpha), delta)
    torch.testing.assert_close(found, by_the_paper(delta, keep, scale, alpha), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("codec", "wanted"), [(ComPeft(), 0.758), (ComPeft(scale="std"), 0.829)])
def test_gaussian_error(codec, wanted):
    delta = gaussian(500, 1000)
    assert float((decode(codec, delta) - delta).norm() / delta.norm()) == pytest.approx(wanted, abs=0.004)


@pytest.mark.parametrize("alpha", [0.9, 1.1])
def test_the_mean_has_the_least_error(alpha):
    delta = gaussian(60, 80)
    best = float((decode(ComPeft(), delta) - delta).norm())
    assert float((decode(ComPeft(alpha=alpha), delta) - delta).norm()) > best


@pytest.mark.parametrize(("keep", "bits"), [(0.02, 0.18), (0.05, 0.45), (0.5, 1.5)])
def test_size_is_a_byte_and_a_bit_per_kept_entry_or_a_mask(keep, bits):
    delta = gaussian(400, 4096)
    (term,) = ComPeft(keep=keep).encode(delta, name="w")
    assert 8 * term.nbytes / delta.numel() == pytest.approx(bits, rel=0.07)
    assert ComPeft(keep=keep).expected_bytes((400, 4096)) == pytest.approx(term.nbytes, rel=0.01)


def test_zeros_are_never_given_a_sign():
    delta = torch.zeros(4, 5)
    delta[1, 2] = -2.0
    assert torch.equal(decode(ComPeft(keep=1.0), delta), delta)


def test_a_magnitude_past_float32_is_refused():
    with pytest.raises(CodecError, match="'w' overflows float32"):
        ComPeft(alpha=100).encode(torch.full((3, 4), 3e38), name="w")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, "above 0"),
        ({"keep": 1.1}, "at most 1"),
        ({"alpha": 0.0}, "above 0"),
        ({"alpha": -1.0}, "above 0"),
        ({"scale": "median"}, "one of mean, std"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(CodecError, match=message):
        ComPeft(**settings)
