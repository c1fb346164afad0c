"""Every formula against a few lines that spell it out, and what must hold of any distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from lens_traces import random_log_probs

from deltakeeper.lens import metrics

logits = arrays(np.float64, (2, 9), elements=st.floats(-30, 30))


def both(values):
    return torch.from_numpy(values).log_softmax(-1)


def brute_kl(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a > 0)


def test_entropy_kl_js_and_tv_equal_sums_over_tokens():
    log_p, log_q = random_log_probs(3, 2, 17).double(), random_log_probs(3, 2, 17, seed=1).double()
    p, q = log_p.exp(), log_q.exp()
    for cell in np.ndindex(3, 2):
        a, b = p[cell], q[cell]
        m = (a + b) / 2
        assert metrics.entropy(log_p)[cell].item() == pytest.approx(-sum(x * math.log(x) for x in a.tolist()), rel=1e-6)
        assert metrics.kl(log_p, log_q)[cell].item() == pytest.approx(brute_kl(a, b), rel=1e-6)
        expected = (brute_kl(a, m) + brute_kl(b, m)) / 2
        assert metrics.js(log_p, log_q)[cell].item() == pytest.approx(expected, rel=1e-6)
        assert metrics.total_variation(log_p, log_q)[cell].item() == pytest.approx((a - b).abs().sum().item() / 2)


@given(logits)
def test_divergences_keep_their_bounds(values):
    log_p, log_q = both(values)
    assert metrics.kl(log_p, log_q) >= 0
    assert 0 <= metrics.js(log_p, log_q) <= math.log(2)
    torch.testing.assert_close(metrics.js(log_p, log_q), metrics.js(log_q, log_p))
    torch.testing.assert_close(metrics.total_variation(log_p, log_q), metrics.total_variation(log_q, log_p))
    assert metrics.kl(log_p, log_p) == 0 and metrics.js(log_p, log_p) == 0
    assert metrics.total_variation(log_p, log_q) ** 2 <= metrics.kl(log_p, log_q) / 2 + 1e-9  # Pinsker


def test_tokens_that_are_masked_in_both_add_nothing_and_in_one_make_kl_infinite():
    log_p = torch.tensor([0.0, 1.0, -math.inf]).log_softmax(-1)
    log_q = torch.tensor([1.0, -math.inf, -math.inf]).log_softmax(-1)
    assert metrics.entropy(log_p).item() == pytest.approx(metrics.entropy(log_p[:2]).item())
    assert metrics.kl(log_p, log_p) == 0 and metrics.js(log_p, log_q) < math.log(2)
    assert metrics.kl(log_p, log_q) == math.inf and metrics.kl(log_q, log_p).isfinite()


def test_numbers_that_are_none_are_not_taken_for_masked_tokens():
    log_p = torch.tensor([math.nan, -1.0, -2.0])
    assert metrics.entropy(log_p).isnan() and metrics.js(log_p, log_p).isnan()
    assert metrics.kl(log_p, log_p).isnan() and metrics.kl(torch.tensor([-1.0, -1.0, -2.0]), log_p).isnan()


def test_js_of_nearly_equal_distributions_keeps_its_digits():
    log_q = random_log_probs(40).double()
    log_p = (log_q + 1e-4 * torch.randn(40, generator=torch.Generator().manual_seed(1))).log_softmax(-1)
    expected = ((log_p - log_q) ** 2 * log_q.exp()).sum().item() / 8  # second order
    assert metrics.js(log_p, log_q).item() == pytest.approx(expected, rel=1e-3)
    assert metrics.js(log_p.float(), log_q.float()).item() == pytest.approx(expected, rel=0.05)


def test_rank_set_probability_and_top_k_equal_sorting():
    log_p = random_log_probs(4, 11)
    ids = torch.tensor([2, 9])
    for row in range(4):
        order = sorted(range(11), key=lambda token, row=row: -log_p[row, token].item())
        assert metrics.rank(log_p, ids)[row] == min(order.index(2), order.index(9))
        expected = math.log(sum(math.exp(log_p[row, token]) for token in (2, 9)))
        assert metrics.set_log_prob(log_p, ids)[row].item() == pytest.approx(expected, rel=1e-5)
        found, probs = metrics.top_k(log_p, 3)
        assert found[row].tolist() == order[:3]
        assert probs[row].tolist() == pytest.approx([math.exp(log_p[row, token]) for token in order[:3]])
    one_each = torch.tensor([[1], [2], [3], [4]])
    assert metrics.set_log_prob(log_p, one_each).tolist() == pytest.approx([log_p[i, i + 1].item() for i in range(4)])
    assert metrics.rank(log_p, one_each)[2] == (log_p[2] > log_p[2, 3]).sum()


def test_rank_of_equal_logits_counts_larger_ones_only():
    assert metrics.rank(torch.zeros(5).log_softmax(-1), torch.tensor([4])) == 0


def test_top_k_overlap_counts_shared_tokens():
    assert metrics.top_k_overlap(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[4, 9, 1, 8]])).tolist() == [0.5]


@pytest.mark.parametrize(
    ("holds", "layer"),
    [("0000", None), ("1110", None), ("0001", 3), ("1011", 2), ("1111", 0)],
)
def test_commitment_is_the_first_layer_of_the_last_unbroken_run(holds, layer):
    found = metrics.commitment(torch.tensor([[c == "1"] for c in holds])).item()
    assert math.isnan(found) if layer is None else found == layer


@given(logits, st.integers(1, 9))
def test_coarsened_kl_is_a_lower_bound(values, k):
    log_p, log_q = both(values)
    ids, probs = metrics.top_k(log_p, k)
    others, other_probs = metrics.top_k(log_q, k)
    found = metrics.coarse_kl(ids.tolist(), probs.tolist(), others.tolist(), other_probs.tolist())
    assert 0 <= found <= metrics.kl(log_p, log_q).item() + 1e-9


def test_coarsened_kl_equals_the_binned_sum():
    found = metrics.coarse_kl([1, 2], [0.5, 0.3], [2, 7], [0.6, 0.2])
    assert found == pytest.approx(0.3 * math.log(0.3 / 0.6) + 0.7 * math.log(0.7 / 0.4))


def test_kept_stream_equals_a_projection_and_is_one_zero_and_half_where_it_must():
    base, tuned, other = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    share, remainder = metrics.kept_stream(metrics.stream_shift(other, base, tuned))
    for row in range(5):
        own, whole = (other - base)[row].numpy(), (tuned - base)[row].numpy()
        kappa = own @ whole / (whole @ whole)
        assert share[row].item() == pytest.approx(kappa)
        assert remainder[row].item() == pytest.approx(np.linalg.norm(own - kappa * whole) / np.linalg.norm(whole))
    for kept, stream in ((1, tuned), (0, base), (0.5, (base + tuned) / 2)):
        share, remainder = metrics.kept_stream(metrics.stream_shift(stream, base, tuned))
        assert share.tolist() == pytest.approx([kept] * 5) and remainder.tolist() == pytest.approx([0] * 5, abs=1e-9)


def test_shares_of_nothing_are_not_numbers():
    stream = torch.ones(1, 4)
    assert all(part.isnan().all() for part in metrics.stream_shift(stream + 1, stream, stream))
    assert metrics.kept_output(torch.tensor([0.0, 0.1]), torch.tensor([0.0, 1e-6])).isnan().all()


def test_kept_output_is_one_for_the_fine_tune_and_zero_for_the_base():
    js = metrics.js(random_log_probs(6, 9), random_log_probs(6, 9, seed=1))
    assert (metrics.kept_output(torch.zeros(6), js) == 1).all()
    assert (metrics.kept_output(js, js) == 0).all()
    assert metrics.kept_output(js / 4, js).tolist() == pytest.approx([0.5] * 6)


def test_cosine_has_no_value_for_a_vector_without_length():
    assert metrics.cosine(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])).item() == pytest.approx(24 / 25)
    assert metrics.cosine(torch.zeros(3), torch.ones(3)).isnan()
