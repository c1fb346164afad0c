import numpy as np
import pytest
import torch

from deltakeeper.codecs import BitDelta, DQRelo, Svd
from deltakeeper.errors import CodecError
from deltakeeper.layouts import GroupedInt


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lowrank_plus_noise(out=96, columns=80, rank=4):
    return gaussian(out, columns) + 0.7 * gaussian(out, rank, seed=1) @ gaussian(rank, columns, seed=2)


def decode(terms):
    return sum(term.to_dense() for term in terms)


def error(codec, delta):
    return float((decode(codec.encode(delta, name="w")).double() - delta).norm() / delta.double().norm())


@pytest.mark.parametrize(("scale", "axis"), [("tensor", None), ("row", 1), ("column", 0)])
def test_terms_equal_the_definition(scale, axis):
    delta = lowrank_plus_noise(36, 30)
    exact = delta.numpy().astype(np.float64)
    one_bit = np.abs(exact).mean(axis=axis, keepdims=True) * np.where(exact >= 0, 1.0, -1.0)
    u, s, vt = np.linalg.svd(exact - one_bit)
    wanted = one_bit + sum(s[i] * np.outer(u[:, i], vt[i]) for i in range(5))
    terms = DQRelo(rank=5, factors="float32", scale=scale, zero="plus").encode(delta, name="w")
    assert [term.name for term in terms] == ["signs", "lowrank"]
    np.testing.assert_allclose(decode(terms).numpy(), wanted, rtol=0, atol=1e-4)
    found = np.linalg.norm(decode(terms).numpy() - exact)
    assert found == pytest.approx(np.linalg.norm(wanted - exact), rel=1e-4)


def test_it_is_the_sum_of_bitdelta_and_svd():
    delta = lowrank_plus_noise()
    one_bit = BitDelta().encode(delta, name="w")
    rest = Svd(rank=6).encode(delta - one_bit[0].to_dense(), name="w")
    assert torch.equal(decode(DQRelo(rank=6).encode(delta, name="w")), decode([*one_bit, *rest]))


def test_whole_numbers_are_those_of_the_singular_vectors():
    delta = lowrank_plus_noise()
    _, floats = DQRelo(rank=6, factors="float32").encode(delta, name="w")
    _, packed = DQRelo(rank=6, factors="int3", group=16).encode(delta, name="w")
    left = GroupedInt.from_matrix(floats.left.T.contiguous(), 3, 16).to_dense()
    right = GroupedInt.from_matrix(floats.right, 3, 16).to_dense()
    torch.testing.assert_close(packed.to_dense(), left.T @ right)
    assert [factor.bits for factor in packed.packed] == [3, 3]


@pytest.mark.parametrize("factors", ["float32", "int3"])
@pytest.mark.parametrize("zero", ["plus", "zero"])
@pytest.mark.parametrize("scale", ["tensor", "row", "column"])
def test_refit_is_the_least_squares_solution(scale, zero, factors):
    delta = lowrank_plus_noise(24, 20) * (gaussian(24, 20, seed=5) > -0.8)
    settings = {"rank": 3, "factors": factors, "scale": scale, "zero": zero}
    _, plain = DQRelo(**settings).encode(delta, name="w")
    terms = DQRelo(**settings, refit=True).encode(delta, name="w")
    exact = delta.numpy().astype(np.float64)
    sign = np.where(exact >= 0, 1.0, -1.0) * ((exact != 0) if zero == "zero" else 1)
    rows, columns = np.indices(exact.shape)
    shared = {"tensor": 0 * rows, "row": rows, "column": columns}[scale]
    basis = [(sign * (shared == k)).ravel() for k in range(shared.max() + 1)]
    basis.append(plain.to_dense().double().numpy().ravel())
    found, *_ = np.linalg.lstsq(np.stack(basis, axis=1), exact.ravel(), rcond=None)
    wanted = (np.stack(basis, axis=1) @ found).reshape(exact.shape)
    np.testing.assert_allclose(decode(terms).double().numpy(), wanted, rtol=0, atol=1e-4)
    np.testing.assert_allclose(terms[0].scales[0].numpy().ravel(), found[:-1], rtol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("factors", ["float16", "int2", "int4"])
def test_refit_lowers_the_error_at_every_magnitude(factors, size):
    delta = lowrank_plus_noise() * size
    plain, refitted = (error(DQRelo(rank=4, factors=factors, refit=refit), delta) for refit in (False, True))
    assert refitted < plain


def test_refit_keeps_a_term_that_the_signs_already_say():
    for delta in (torch.ones(3, 4), torch.zeros(3, 4), torch.tensor([[2.0]])):
        terms = DQRelo(rank=2, refit=True).encode(delta, name="w")
        torch.testing.assert_close(decode(terms), delta, rtol=1e-6, atol=1e-6)


def test_a_low_rank_term_is_worth_more_than_its_bytes_of_signs():
    delta = lowrank_plus_noise(256, 256) - 0.8 * gaussian(256, 256)
    packed = DQRelo(rank=8, factors="int8", refit=True)
    assert packed.expected_bytes((256, 256)) < BitDelta(bits=2).expected_bytes((256, 256))
    assert error(packed, delta) < error(BitDelta(bits=2), delta)


@pytest.mark.parametrize("factors", ["float16", "float32", "int2", "int7"])
@pytest.mark.parametrize("zero", ["plus", "minus", "zero"])
@pytest.mark.parametrize("scale", ["tensor", "row", "column"])
def test_bytes_are_known_beforehand(scale, zero, factors):
    codec = DQRelo(rank=40, factors=factors, scale=scale, zero=zero, group=16)
    terms = codec.encode(gaussian(70, 33), name="w")
    assert codec.payload_bytes((70, 33)) == sum(term.nbytes for term in terms)
    assert DQRelo(zero="auto").payload_bytes((70, 33)) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "'rank'"),
        ({"factors": "int9"}, "'factors'"),
        ({"group": -1}, "'group'"),
        ({"refit": 1}, "'refit'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(CodecError, match=message):
        DQRelo(**settings)
