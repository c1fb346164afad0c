import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakeeper.codecs import Svd
from deltakeeper.errors import CodecError


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decaying(out, columns, seed=0):
    """A matrix with singular values 1, 1/2, 1/4, ..."""
    side = min(out, columns)
    u = torch.linalg.qr(gaussian(out, side, seed=seed)).Q
    v = torch.linalg.qr(gaussian(columns, side, seed=seed + 1)).Q
    return (u * 0.5 ** torch.arange(side)) @ v.T


def encode(delta, **settings):
    (term,) = Svd(**settings).encode(delta, name="w")
    return term


def relative(term, delta):
    return float((term.to_dense() - delta).norm() / delta.norm())


@settings(max_examples=15)
@given(st.integers(1, 6), st.sampled_from([1e-8, 1e-4, 1.0]), st.booleans())
def test_a_low_rank_delta_is_kept_whole(rank, std, exact):
    delta = gaussian(90, rank, seed=rank) @ gaussian(rank, 120, seed=9) * std
    term = encode(delta, rank=rank, method="exact" if exact else "randomised")
    assert relative(term, delta) < 2e-3
    assert term.rank == rank


@pytest.mark.parametrize("method", ["randomised", "exact"])
def test_the_error_is_what_the_dropped_singular_values_say(method):
    delta = gaussian(200, 150)
    values = torch.linalg.svdvals(delta)
    term = encode(delta, rank=20, method=method, factors="float32")
    wanted = float(values[20:].square().sum().sqrt() / values.square().sum().sqrt())
    assert relative(term, delta) == pytest.approx(wanted, rel=0.01 if method == "randomised" else 1e-4)


@pytest.mark.parametrize("method", ["randomised", "exact"])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.999])
def test_energy_takes_the_least_rank(method, energy):
    delta = decaying(130, 100)
    kept = torch.linalg.svdvals(delta).square().cumsum(0) / delta.square().sum()
    term = encode(delta, energy=energy, method=method, factors="float32")
    assert term.rank == int((kept < energy).sum()) + 1


def test_energy_grows_the_search_until_it_is_enough():
    delta = gaussian(300, 300)
    term = encode(delta, energy=0.7, factors="float32", niter=2)
    assert relative(term, delta) ** 2 <= 0.3 + 1e-4
    assert term.rank > 64


def test_rank_is_capped_at_the_smaller_side():
    delta = gaussian(5, 40)
    term = encode(delta, rank=64, factors="float32")
    assert term.rank == 5
    assert relative(term, delta) < 1e-5


def test_a_zero_delta_keeps_the_stated_rank():
    assert encode(torch.zeros(20, 30), rank=4).rank == 4
    assert encode(torch.zeros(20, 30), energy=0.5).rank == 1


def test_seed_and_name_decide_the_random_directions():
    delta = gaussian(200, 200)
    codec = Svd(rank=4, niter=0, oversample=0, factors="float32")

    def left(seed, name):
        return Svd(rank=4, niter=0, oversample=0, factors="float32", seed=seed).encode(delta, name=name)[0].left

    assert torch.equal(left(0, "a"), codec.encode(delta, name="a")[0].left)
    assert not torch.allclose(left(0, "a"), left(1, "a"))
    assert not torch.allclose(left(0, "a"), left(0, "b"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_factor_dtype_is_honoured(dtype):
    assert str(encode(gaussian(20, 30), rank=2, factors=dtype).left.dtype) == f"torch.{dtype}"


def test_factors_past_float32_are_refused_by_name():
    with pytest.raises(CodecError, match="'w' leave float32"):
        encode(gaussian(8, 8).sign() * 3e38, rank=8)


@pytest.mark.parametrize("settings", [{}, {"rank": 2, "energy": 0.5}])
def test_exactly_one_of_rank_and_energy(settings):
    with pytest.raises(CodecError, match="exactly one of 'rank' and 'energy'"):
        Svd(**settings)
