import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakeeper.codecs import ImPart
from deltakeeper.errors import CodecError
from deltakeeper.layouts.philox import philox
from deltakeeper.testing import check_layout

BITS = {"float16": 16, "bfloat16": 16, "float32": 32, "int8": 8, "int4": 4}
SEED = 5


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decaying(out, columns, seed=0):
    """A matrix whose singular values fall from 1 to about 0.1."""
    u, s, vt = torch.linalg.svd(gaussian(out, columns, seed=seed), full_matrices=False)
    return (u * torch.linspace(1, 0.1, len(s))) @ vt


def rates_of(terms):
    return torch.cat([term.packed[0].places.keep for term in terms]).double().tolist()


def drawn(name, index):
    """The random number of one entry in 32 bits, from the published recipe."""
    digest = hashlib.sha256(SEED.to_bytes(8, "little") + name.encode()).digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
    return int(philox(key, index // 4, 1)[0, index % 4])


def algorithm_1(values, gamma, c, vectors):
    """The paper's rates `1 - p` of the vectors left by the first cut, those that end with p = 1 left out."""
    scores = [s**c for s in values[:vectors]]
    p = [(1 - s / max(scores)) * gamma for s in scores]
    last = vectors - 1
    while last >= 0 and sum(p) / vectors < gamma - 1e-9:
        p[last] = 1
        last -= 1
    return [1 - share for share in p[: last + 1]]


@pytest.mark.parametrize("rescale", ["mean", "none"])
@pytest.mark.parametrize(
    ("shape", "cr", "beta", "c"), [((40, 48), 1.5, 0.2, 2), ((60, 20), 1.5, 0.2, 3), ((30, 34), 1.5, 0.1, 4)]
)
def test_the_paper_vector_by_vector(shape, cr, beta, c, rescale):
    out, columns = shape
    delta = decaying(out, columns)
    codec = ImPart(cr=cr, beta=beta, c=c, values="float32", rescale=rescale, seed=SEED)
    (term,) = codec.encode(delta, name="w")
    rates = rates_of([term])
    u, s, vt = np.linalg.svd(delta.double().numpy(), full_matrices=False)
    vectors = int(min(shape) * min(1, (1 - beta) * 2 * max(shape) / (out + columns)))
    words = {
        name: [[drawn(f"w::{name}.0", i * length + j) for j in range(length)] for i in range(vectors)]
        for name, length in (("U", out), ("V", columns))
    }

    def kept(name, i, rate):
        return [j for j, word in enumerate(words[name][i]) if word < int(np.float32(rate) * 2.0**32)]

    def size(tried):
        return 12 + sum(8 + 4 * (len(kept("U", i, rate)) + len(kept("V", i, rate))) for i, rate in enumerate(tried))

    budget = 2 * out * columns / cr
    gamma = next(g / 500 for g in range(501) if size(algorithm_1(s, g / 500, c, vectors)) <= budget)
    assert len(rates) == len(algorithm_1(s, gamma, c, vectors))
    # With that many vectors, all rates rise together while the bytes allow it.
    gamma = (1 - rates[1]) / (1 - (s[1] / s[0]) ** c)
    assert rates == pytest.approx([1 - (1 - (value / s[0]) ** c) * gamma for value in s[: len(rates)]], abs=1e-5)
    assert term.nbytes == size(rates) <= budget
    assert 0.1 < gamma < 1
    more = [1 - (1 - (value / s[0]) ** c) * (gamma - 0.01) for value in s[: len(rates)]]
    assert size(more) > budget - 20

    wanted = np.zeros(shape)
    for i, rate in enumerate(rates):
        left, right = np.zeros(out), np.zeros(columns)
        for j in kept("U", i, rate):
            left[j] = u[j, i] / (rate if rescale == "mean" else 1)
        for j in kept("V", i, rate):
            right[j] = vt[i, j] / (rate if rescale == "mean" else 1)
        wanted += s[i] * np.outer(left, right)
    np.testing.assert_allclose(term.to_dense().numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "alpha", "beta"),
    [((512, 512), (2 - 1 / 8) / 2, 0.8), ((540, 200), (0.55 + 1.45 * 7 / 8) / 2, 1 - (1 - 0.8) * 1.45)],
)
def test_the_shape_gives_the_papers_settings_for_attention_and_mlp(shape, alpha, beta):
    vectors = min(shape)
    (term,) = ImPart(cr=8).encode(decaying(*shape), name="w")
    rates = rates_of([term])
    assert rates[0] == 1
    assert sum(rates) == pytest.approx(vectors * (1 - alpha), rel=0.03)

    steep = gaussian(*shape) * 1e-3 + torch.ones(shape)
    (term,) = ImPart(cr=8, c=8).encode(steep, name="w")  # nearly all that are not cut share one rate
    rates = rates_of([term])
    gamma = (alpha - beta) / (1 - beta)
    assert int(vectors * (1 - beta)) - 6 <= len(rates) <= int(vectors * (1 - beta))
    assert rates[5] == pytest.approx(1 - gamma, rel=0.1)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 50),
    st.integers(1, 50),
    st.floats(1, 200),
    st.sampled_from([0.0, 0.5, 0.8, 0.99]),
    st.sampled_from(["float16", "float32", "int8", "int4", "bands"]),
    st.integers(0, 99),
)
def test_never_more_bytes_than_the_ratio_allows(out, columns, cr, beta, values, seed):
    codec = ImPart(cr=cr, beta=beta, values=values, seed=seed)
    terms = codec.encode(decaying(out, columns, seed), name="w")
    for term in terms:
        check_layout(term)
    assert sum(term.nbytes for term in terms) <= max(2 * out * columns / cr, 20)
    assert codec.expected_bytes((out, columns)) <= 2 * out * columns / cr


@pytest.mark.parametrize("values", ["float16", "int8", "bands"])
def test_most_of_the_bytes_are_used(values):
    codec = ImPart(values=values, c=1)
    terms = codec.encode(decaying(300, 500), name="w")
    used = sum(term.nbytes for term in terms) / codec.expected_bytes((300, 500))
    assert 0.8 < used <= 1


def test_bands_have_8_3_and_2_bits():
    terms = ImPart(cr=4, values="bands").encode(decaying(200, 150), name="w")
    assert [(term.packed[0].bits, term.packed[1].bits) for term in terms] == [(8, 8), (3, 3), (2, 2)]
    assert [term.rank for term in terms][:2] == [2, 32]
    whole = sum(
        term.to_dense()
        for term in ImPart(cr=1, beta=0, values="bands", rescale="none").encode(decaying(200, 150), name="w")
    )
    delta = decaying(200, 150)
    assert float((whole - delta).norm()) < 0.4 * float(delta.norm())


def test_rescaled_vectors_are_unbiased():
    delta = decaying(24, 32)
    codecs = [ImPart(cr=2, beta=0, c=1, values="float32", seed=seed) for seed in range(400)]
    found = [sum(t.to_dense() for t in codec.encode(delta, name="w")) for codec in codecs]
    kept = min(len(rates_of(codec.encode(delta, name="w"))) for codec in codecs[:20])
    u, s, vt = torch.linalg.svd(delta)
    mean = sum(found) / len(found)
    for i in range(3):  # vectors that every seed keeps, the first one whole
        assert kept >= 3
        assert float(u[:, i] @ mean @ vt[i]) == pytest.approx(float(s[i]), rel=0.05)


def test_without_rescaling_the_error_is_less_than_one():
    delta = decaying(64, 64)
    plain, rescaled = (
        float((sum(t.to_dense() for t in ImPart(cr=2, c=4, beta=0, rescale=r).encode(delta, name="w")) - delta).norm())
        for r in ("none", "mean")
    )
    assert plain < rescaled
    assert plain < float(delta.norm())


def test_a_cut_is_lowered_where_all_the_rest_fits():
    delta = decaying(60, 60)
    (term,) = ImPart(cr=2, beta=0.9).encode(delta, name="w")
    assert rates_of([term]) == [1.0] * term.rank
    assert term.rank == (2 * 3600 // 2) // (2 * 120) - 1  # for the rates and gains
    best = float(torch.linalg.svdvals(delta)[term.rank :].norm())
    assert float((term.to_dense() - delta).norm()) == pytest.approx(best, rel=0.01)


def test_the_decomposition_widens_until_the_rates_end():
    x = gaussian(400, 2) @ gaussian(2, 400, seed=1) * 100 + decaying(400, 400)
    (term,) = ImPart(cr=20, c=2, beta=0.5, rescale="none").encode(x, name="w")
    exact = torch.linalg.svdvals(x)
    rates = rates_of([term])
    gamma = (1 - rates[1]) / (1 - float(exact[1] / exact[0]) ** 2)
    wanted = 1 - (1 - (exact[: len(rates)] / exact[0]).double() ** 2) * gamma
    assert rates == pytest.approx(wanted.tolist(), abs=0.01)
    assert len(rates) > 60


def test_what_overflows_is_refused():
    with pytest.raises(CodecError, match="rescaling 'w' overflows float32"):
        ImPart().encode(torch.full((100, 100), 3e38), name="w")
    for bad in ({"cr": 0.5}, {"beta": 1.0}, {"c": -1.0}, {"values": "int2"}):
        with pytest.raises(CodecError):
            ImPart(**bad)


def test_expected_bytes_are_the_ratio():
    assert ImPart(cr=10).expected_bytes((100, 70)) == math.floor(2 * 7000 / 10)
