"""The divisor of DAREx-q and the whole-number values of DARE, against loops and simulation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakeeper.codecs import Dare, Inputs
from deltakeeper.codecs.rescale import bound_q, least_error_q
from deltakeeper.errors import CodecError
from deltakeeper.layouts.bits import unpack_bits


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(samples):
    return Inputs(samples.T @ samples / len(samples), samples.mean(dim=0), len(samples))


def correlated(tokens, columns, seed=1):
    """Inputs that share a direction, so that an output does not average its weights' errors away."""
    return gaussian(tokens, columns, seed=seed) * 0.3 + gaussian(tokens, 1, seed=seed + 1).abs()


def output_error(delta, p, q, samples):
    """Expected squared output error over all masks, term by term: bias squared plus variance."""
    total = 0.0
    for row in delta.double():
        for x in samples.double():
            c = row * x
            total += float(((1 - (1 - p) / q) * c.sum()) ** 2 + p * (1 - p) / q**2 * (c**2).sum())
    return total


@pytest.mark.parametrize("p", [0.3, 0.9, 0.99])
def test_the_closed_form_has_the_least_output_error(p):
    delta, samples = gaussian(6, 12) + 0.5, correlated(20, 12)
    q = least_error_q(delta, p, inputs_of(samples))
    assert 1 - p < q < 1
    best = output_error(delta, p, q, samples)
    for other in (q * 0.99, q * 1.01, 1 - p, 1.0):
        assert output_error(delta, p, other, samples) > best


def test_the_error_formula_is_what_masks_do():
    delta, samples, p, q = gaussian(3, 40), correlated(4, 40), 0.8, 0.5
    found = 0.0
    for seed in range(400):
        (term,) = Dare(p=p, q=q, values="float32", seed=seed).encode(delta, name="w")
        found += float(((term.to_dense() - delta) @ samples.T).square().sum()) / 400
    assert found == pytest.approx(output_error(delta, p, q, samples), rel=0.06)


@pytest.mark.parametrize("fit_q", ["error", "bound"])
def test_without_inputs_the_error_of_the_weights_is_least(fit_q):
    delta = gaussian(200, 300)
    codec = Dare(p=0.9, fit_q=fit_q, values="float32")
    assert codec.uses_inputs
    (term,) = codec.encode(delta, name="w")
    assert torch.equal(term.to_dense(), Dare(p=0.9, q=1.0, values="float32").encode(delta, name="w")[0].to_dense())
    error = float((term.to_dense() - delta).norm() / delta.norm())
    assert error**2 == pytest.approx(0.9, rel=0.02)


def test_fitting_lowers_the_output_error():
    delta, samples = gaussian(50, 200) * 1e-3, correlated(300, 200)
    inputs = inputs_of(samples)

    def error(codec):
        (term,) = codec.encode(delta, name="w", inputs=inputs)
        return float(((term.to_dense() - delta) @ samples.T).norm() / (delta @ samples.T).norm())

    fitted = error(Dare(p=0.9, fit_q="error"))
    assert fitted < error(Dare(p=0.9))
    assert fitted < 1.0


def test_a_delta_that_no_input_sees_keeps_its_size():
    inputs = Inputs(torch.zeros(4, 4), torch.zeros(4), 1)
    assert least_error_q(gaussian(3, 4), 0.9, inputs) == 1.0
    assert least_error_q(torch.zeros(3, 4), 0.9, Inputs(torch.eye(4), torch.ones(4), 1)) == 1.0


def by_the_paper(delta, p, x, eta):
    """Row by row and step by step, as equation and stopping rule of the paper's code say."""
    rows = [[float(d) * float(v) for d, v in zip(row, x, strict=True)] for row in delta.double()]
    phi = (1 - 2 * p) / math.log((1 - p) / p)
    found, best, passed = [1 - p] * len(rows), [math.inf] * len(rows), [False] * len(rows)
    for thousandth in range(1, 999):
        q = thousandth / 1000
        if q < 1 - p - 1e-9:
            continue
        for i, c in enumerate(rows):
            bound = eta * (1 - (1 - p) / q) * sum(c)
            bound += eta**2 * phi * sum(value**2 for value in c) / (4 * q**2) + math.log(2 / (1 - 0.95))
            if abs(bound) >= best[i]:
                passed[i] = True
            if abs(bound) <= best[i]:
                best[i], found[i] = abs(bound), q
        if sum(passed) >= 0.8 * len(rows):
            break
    return sum(found) / len(found)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([0.3, 0.75, 0.9, 0.99]), st.sampled_from([1.0, 10.0, 60.0]), st.integers(0, 50))
def test_the_bound_equals_a_loop(p, size, seed):
    delta, x = gaussian(5, 8, seed=seed) * size, gaussian(8, seed=seed + 1)
    assert bound_q(delta, p, x, 0.45) == pytest.approx(by_the_paper(delta, p, x, 0.45), abs=1e-9)


def test_the_bound_is_used_where_there_are_inputs():
    delta = gaussian(8, 16) * 20
    inputs = inputs_of(correlated(50, 16))
    q = bound_q(delta, 0.9, inputs.mean, 2.0)
    assert 0.1 < q < 1
    codec = Dare(p=0.9, fit_q="bound", eta=2.0, values="float32")
    (term,) = codec.encode(delta, name="w", inputs=inputs)
    mask = unpack_bits(term.mask, 16)
    torch.testing.assert_close(term.to_dense(), torch.where(mask, delta / q, 0.0))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_bound_at_its_removable_points(p):
    q = bound_q(gaussian(5, 8), p, torch.ones(8), 0.45)
    assert 1 - p <= q <= 1


@pytest.mark.parametrize(("values", "bits"), [("int8", 8), ("int4", 4)])
def test_whole_numbers_are_rounded_to_nearest(values, bits):
    delta = gaussian(20, 33)
    (term,) = Dare(p=0.5, q=0.8, values=values).encode(delta, name="w")
    mask = unpack_bits(term.mask, 33)
    kept = [float(value) / 0.8 for value in delta[mask]]
    step = max(abs(value) for value in kept) / (2 ** (bits - 1) - 0.5)
    wanted = [step * min(2 ** (bits - 1) - 1, max(-(2 ** (bits - 1)), round(value / step))) for value in kept]
    torch.testing.assert_close(term.to_dense()[mask], torch.tensor(wanted), rtol=1e-5, atol=0.0)
    assert not term.to_dense()[~mask].any()


@pytest.mark.parametrize(("values", "bits"), [("float16", 16), ("int8", 8), ("int4", 4)])
def test_the_expected_size_counts_values_alone(values, bits):
    delta = gaussian(200, 400)
    codec = Dare(values=values)
    (term,) = codec.encode(delta, name="w")
    assert term.nbytes == pytest.approx(8000 * bits / 8, rel=0.03)
    assert codec.expected_bytes((200, 400)) == pytest.approx(term.nbytes, rel=0.03)


def test_a_divisor_is_given_or_found():
    with pytest.raises(CodecError, match="not both"):
        Dare(q=0.5, fit_q="error")
    assert not Dare(q=0.5).uses_inputs
    with pytest.raises(CodecError, match="above 0"):
        Dare(fit_q="bound", eta=0.0)


def test_whole_numbers_past_float32_are_refused():
    with pytest.raises(CodecError, match="overflows float32"):
        Dare(p=0.999, values="int4").encode(torch.full((100, 100), 3e38), name="w")
