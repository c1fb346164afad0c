"""The choice against brute force, against a relaxation that bounds it, and its thinning at scale."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakeeper.budget import solve
from deltakeeper.budget.solve import choose

CURVES = st.lists(
    st.lists(st.tuples(st.integers(0, 60), st.floats(0, 100)), min_size=1, max_size=4), min_size=1, max_size=4
)


def brute_force(curves, budget):
    every = itertools.product(*curves)
    fitting = [sum(e for _, e in picked) for picked in every if sum(s for s, _ in picked) <= budget]
    return min(fitting, default=None)


def total(curves, chosen):
    picked = [curve[i] for curve, i in zip(curves, chosen, strict=True)]
    return sum(s for s, _ in picked), sum(e for _, e in picked)


@given(CURVES, st.integers(0, 200))
def test_the_choice_is_the_optimum(curves, budget):
    chosen, best = choose(curves, budget), brute_force(curves, budget)
    if best is None:
        assert chosen is None
    else:
        size, error = total(curves, chosen)
        assert size <= budget and error == pytest.approx(best)


def test_three_tensors_with_four_candidates_each():
    curves = [
        [(0, 9.0), (100, 4.0), (200, 2.0), (300, 1.5)],
        [(0, 1.0), (100, 0.5), (200, 0.4), (300, 0.3)],
        [(0, 30.0), (150, 20.0), (300, 3.0), (450, 2.9)],
    ]
    for budget in range(0, 1100, 25):
        assert total(curves, choose(curves, budget))[1] == pytest.approx(brute_force(curves, budget))


def many(count, seed=0):
    """Curves like those of sign planes: convex, of very different sizes."""
    random = np.random.default_rng(seed)
    curves = []
    for _ in range(count):
        plane, energy = int(random.integers(5_000, 500_000)), float(random.lognormal(0, 2))
        curves.append([(plane * k, energy * 0.3**k) for k in range(9)])
    return curves


def hull_bound(curves, budget):
    """A lower bound: the Lagrangian relaxation, best over many prices."""
    prices = np.geomspace(1e-12, 1e-2, 400)
    return max(sum(min(e + p * s for s, e in curve) for curve in curves) - p * budget for p in prices)


def test_hundreds_of_tensors_come_within_a_percent_of_the_bound():
    curves = many(300)
    budget = sum(curve[2][0] for curve in curves)
    size, error = total(curves, choose(curves, budget))
    assert 0.999 * budget <= size <= budget
    assert error <= 1.01 * hull_bound(curves, budget)


def test_more_bytes_never_give_more_error(monkeypatch):
    monkeypatch.setattr(solve, "STATES", 64)  # so that sums are thinned
    curves = many(12)
    full = sum(curve[-1][0] for curve in curves)
    errors = [total(curves, choose(curves, budget))[1] for budget in range(0, full, full // 50)]
    assert errors == sorted(errors, reverse=True)
