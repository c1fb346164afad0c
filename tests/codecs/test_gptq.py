import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakeeper.codecs.gptq import quantise_columns, roots, upper_factor
from deltakeeper.errors import CodecError


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_gram(columns, tokens, seed=0):
    mixed = gaussian(tokens, columns, seed=seed) @ (
        torch.eye(columns) + 0.3 * gaussian(columns, columns, seed=seed + 1)
    )
    return mixed.T @ mixed / tokens


def weighted(error, gram):
    error, gram = error.double(), gram.double()
    return float(((error @ gram) * error).sum())


class Rounding:
    """Symmetric rounding with one scale for each row and span, taken when the span is seen."""

    def __init__(self, bits=3, span=16):
        self.low, self.high, self.span = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, span
        self.seen = []
        self.scales = {}

    def look(self, columns, diagonal, start):
        self.seen.append((start, columns.shape[1]))
        self.scales[start // self.span] = columns.abs().amax(1).clamp_min(1e-30) / (self.high + 0.5)

    def quantise(self, column, index):
        scale = self.scales[index // self.span]
        return (column / scale).round().clamp(self.low, self.high) * scale


class TwoFour(Rounding):
    """Keep the two of each four columns that cost most to lose, as they are."""

    def __init__(self):
        super().__init__(span=4)

    def look(self, columns, diagonal, start):
        loss = columns.square() / diagonal.square()
        self.start, self.keep = start, torch.zeros_like(columns, dtype=torch.bool)
        self.keep.scatter_(1, loss.topk(min(2, columns.shape[1]), 1).indices, True)

    def quantise(self, column, index):
        return column * self.keep[:, index - self.start]


def naive(matrix, gram, rule, damp, order=None):
    """Textbook form: after each column, the inverse of the gram of the free columns is computed anew."""
    work, done = matrix.double().clone(), torch.zeros_like(matrix, dtype=torch.float64)
    columns = matrix.shape[1]
    damped = gram.double() + damp * gram.double().diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    static = order is not None
    order = list(range(columns)) if order is None else order
    if static:
        for start in range(0, columns, rule.span):
            rule.look(work[:, start : start + rule.span].float(), torch.ones(1), start)
    for place, j in enumerate(order):
        free = order[place:]
        inverse = torch.linalg.inv(damped[free][:, free])
        if not static and j % rule.span == 0:
            # Removing columns one after another: the loss of column k once those before it are gone.
            ahead = [float(torch.linalg.inv(damped[k:, k:])[0, 0]) ** 0.5 for k in free[: rule.span]]
            rule.look(work[:, j : j + rule.span].float(), torch.tensor(ahead), j)
        done[:, j] = rule.quantise(work[:, j].float(), j).double()
        error = (work[:, j] - done[:, j]) / inverse[0, 0]
        for k, column in enumerate(free):
            work[:, column] -= error * inverse[0, k]
    return done.float()


@pytest.mark.parametrize("rule", [Rounding, TwoFour])
@pytest.mark.parametrize("block", [1, 7, 16, 128])
def test_the_blocked_loop_equals_the_textbook_one(rule, block):
    matrix, gram = gaussian(9, 50), random_gram(50, 200)
    wanted = naive(matrix, gram, rule(), 0.01)
    found = quantise_columns(matrix, gram, rule(), damp=0.01, block=block)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert float((found - matrix).norm()) > 0.1


@pytest.mark.parametrize("block", [5, 128])
def test_columns_can_go_by_falling_activity(block):
    matrix, gram = gaussian(9, 50), random_gram(50, 200)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True).tolist()
    found = quantise_columns(matrix, gram, Rounding(), block=block, act_order=True)
    torch.testing.assert_close(found, naive(matrix, gram, Rounding(), 0.01, order), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gram", [None, torch.eye(40), 1e-9 * torch.eye(40), torch.zeros(40, 40)])
@pytest.mark.parametrize("act_order", [False, True])
def test_equal_weights_mean_plain_rounding(gram, act_order):
    matrix = gaussian(6, 40)
    rule, plain = Rounding(), Rounding()
    found = quantise_columns(matrix, gram, rule, act_order=act_order)
    for start in range(0, 40, plain.span):
        plain.look(matrix[:, start : start + plain.span], torch.ones(1), start)
    wanted = torch.stack([plain.quantise(matrix[:, j], j) for j in range(40)], 1)
    assert torch.equal(found, wanted)
    assert rule.seen == plain.seen == [(0, 16), (16, 16), (32, 8)]


@settings(max_examples=30)
@given(st.integers(0, 999), st.integers(2, 4), st.sampled_from([16, 24, 60, 300]), st.booleans())
def test_the_weighted_error_is_not_above_plain_rounding(seed, bits, tokens, act_order):
    matrix, gram = gaussian(24, 48, seed=seed), random_gram(48, tokens, seed=seed)
    found = quantise_columns(matrix, gram, Rounding(bits), act_order=act_order)
    plain = quantise_columns(matrix, None, Rounding(bits))
    assert weighted(found - matrix, gram) <= weighted(plain - matrix, gram)


@pytest.mark.parametrize("tokens", [1, 5])
def test_grams_without_full_rank_and_without_damping_still_work(tokens):
    matrix, gram = gaussian(8, 40), random_gram(40, tokens)
    found = quantise_columns(matrix, gram, Rounding(), damp=0.0)
    assert torch.isfinite(found).all()
    plain = quantise_columns(matrix, None, Rounding())
    assert weighted(found - matrix, gram) < 0.5 * weighted(plain - matrix, gram)


def test_dead_inputs_are_rounded_or_dropped():
    matrix, gram = gaussian(8, 40), random_gram(40, 200)
    gram[7], gram[:, 7] = 0.0, 0.0
    kept = quantise_columns(matrix, gram, Rounding(bits=8))
    assert torch.allclose(kept[:, 7], matrix[:, 7], atol=0.05)
    assert not quantise_columns(matrix, gram, Rounding(), zero_dead=True)[:, 7].any()


@pytest.mark.parametrize("factor", [2.0**-100, 0.25, 2.0**100])
def test_the_scale_of_the_gram_does_not_matter(factor):
    matrix, gram = gaussian(8, 40), random_gram(40, 100)
    wanted = quantise_columns(matrix, gram, Rounding())
    assert torch.equal(quantise_columns(matrix, gram * factor, Rounding()), wanted)


def test_the_factor_is_the_root_of_the_inverse():
    gram = random_gram(30, 100)
    upper = upper_factor(gram, 0.01)
    damped = gram.double() + 0.01 * float(gram.diagonal().mean()) * torch.eye(30, dtype=torch.float64)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close((upper.T @ upper).double(), torch.linalg.inv(damped), rtol=1e-4, atol=1e-4)


def test_the_root_belongs_to_the_factor():
    gram = random_gram(30, 100)
    root, upper = roots(gram, 0.01)
    assert torch.equal(root, root.triu())
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(30)
    torch.testing.assert_close(root @ root.T, damped, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(root @ upper, torch.eye(30), rtol=1e-4, atol=1e-4)
    given = quantise_columns(gaussian(8, 30), gram, Rounding(), upper=upper)
    assert torch.equal(given, quantise_columns(gaussian(8, 30), gram, Rounding()))


def test_inputs_are_not_modified():
    matrix, gram = gaussian(8, 40), random_gram(40, 100)
    before = matrix.clone(), gram.clone()
    quantise_columns(matrix, gram, Rounding(), act_order=True, zero_dead=True)
    assert torch.equal(matrix, before[0])
    assert torch.equal(gram, before[1])


def test_a_gram_of_another_layer_is_refused():
    with pytest.raises(CodecError, match="does not fit a matrix of 40 columns"):
        quantise_columns(gaussian(8, 40), torch.eye(41), Rounding())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gram_that_is_not_finite_is_refused(value):
    gram = torch.eye(40)
    gram[3, 3] = value
    with pytest.raises(CodecError, match="not finite"):
        quantise_columns(gaussian(8, 40), gram, Rounding())
