"""Directions find what was planted, find nothing where nothing was, and their controls come as often as they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kstest, mannwhitneyu
from scipy.stats import rankdata as scipy_ranks

from deltakeeper.errors import DataError
from deltakeeper.lens.controls import HARMLESS, ISOTROPIC, MATCHED, SHUFFLED, separate_beside_controls, share_reached
from deltakeeper.lens.directions import compare_directions, fit_direction, project
from deltakeeper.lens.separation import average_ranks, measure_effect, separate, standard_scores

LAYERS, WIDTH = 3, 24


def draw_streams(n, shift=0.0, seed=0):
    """Correlated normal streams; `shift` moves the last layer only, along one axis."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99)) / WIDTH**0.5
    streams = torch.randn(n, LAYERS, WIDTH, generator=generator) @ mixing
    streams[:, -1, 5] += shift
    return streams


def planted(shift, seed=0, n=40):
    bad, good, held_bad, held_good = (draw_streams(n, s, 4 * seed + i) for i, s in enumerate((shift, 0, shift, 0)))
    return (bad, good), (held_bad, held_good)


def test_direction_is_the_unit_difference_of_means_and_projection_a_dot_product():
    bad, good = draw_streams(7, 2.0), draw_streams(9, seed=1)
    direction = fit_direction(bad, good)
    difference = bad.double().numpy().mean(0) - good.double().numpy().mean(0)
    np.testing.assert_allclose(direction.lengths, np.linalg.norm(difference, axis=-1))
    np.testing.assert_allclose(
        direction.vectors * direction.lengths[:, None], torch.from_numpy(difference), rtol=1e-6, atol=1e-12
    )
    scores = project(direction.vectors, bad)
    for i in range(7):
        for layer in range(LAYERS):
            expected = float(bad[i, layer].double() @ direction.vectors[layer])
            assert scores[i, layer] == pytest.approx(expected)
    assert compare_directions(direction, direction) == pytest.approx([1] * LAYERS)
    assert (direction.harmful, direction.harmless) == (7, 9)


def test_effect_and_auc_equal_textbook_numbers():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(8, 2)), rng.normal(size=(11, 2)).round(1) + 0.5
    found = separate(one, other)
    for layer in range(2):
        a, b = one[:, layer], other[:, layer]
        deviation = np.sqrt((7 * a.var(ddof=1) + 10 * b.var(ddof=1)) / 17)
        d = (a.mean() - b.mean()) / deviation
        error = np.sqrt(19 / 88 + d**2 / 38)
        assert found.effect[layer] == pytest.approx(d)
        assert (found.low[layer], found.high[layer]) == pytest.approx((d - 1.959964 * error, d + 1.959964 * error))
        assert found.auc[layer] == pytest.approx(mannwhitneyu(a, b).statistic / 88)
        high, low = standard_scores(one, other)
        assert (high[:, layer].mean(), low[:, layer].mean()) == pytest.approx((d, 0), abs=1e-12)
    np.testing.assert_allclose(average_ranks(other), scipy_ranks(other, axis=0))


def test_groups_without_spread_have_no_effect():
    assert np.isnan(measure_effect(np.ones((3, 1)), np.zeros((3, 1)))).all()
    assert np.isnan(share_reached(np.array([np.nan]), np.zeros((5, 1)))).all()
    with pytest.raises(ValueError, match="at least two"):
        separate(np.ones((1, 1)), np.ones((4, 1)))


def test_a_planted_direction_separates_where_it_was_planted_and_controls_do_not():
    found = separate_beside_controls(*planted(4.0))
    assert found.separation.auc[-1] > 0.95 and found.separation.low[-1] > 1
    assert all(found.reached[name][-1] <= 0.05 for name in (ISOTROPIC, MATCHED, HARMLESS))
    assert found.reached[SHUFFLED][-1] <= 0.1  # half the labels are right by chance, so these come nearer
    assert (np.abs(found.separation.effect[:-1]) < 1).all()
    assert {name: effects.shape for name, effects in found.controls.items()} == dict.fromkeys(
        (ISOTROPIC, MATCHED, SHUFFLED, HARMLESS), (100, LAYERS)
    )


def test_shuffled_data_separate_nothing():
    (bad, good), (held_bad, held_good) = planted(4.0)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    mixed = torch.cat([bad, good])[order]
    found = separate_beside_controls((mixed[:40], mixed[40:]), (held_bad, held_good))
    assert found.reached[SHUFFLED][-1] > 0.05
    held = torch.cat([held_bad, held_good])[order]
    found = separate_beside_controls((bad, good), (held[:40], held[40:]))
    assert abs(found.separation.auc[-1] - 0.5) < 0.2


@pytest.mark.parametrize("name", [SHUFFLED, MATCHED])
def test_controls_come_as_often_as_they_should_where_nothing_was_planted(name):
    reached = [
        separate_beside_controls(*planted(0.0, seed, n=20), count=39, seed=seed).reached[name][0] for seed in range(120)
    ]
    assert kstest(reached, "uniform").pvalue > 0.01
    assert np.mean(np.array(reached) <= 0.1) < 0.2


def test_a_direction_of_topic_is_caught_by_the_harmless_control():
    """Harmful prompts are long ones, and so is one kind of the harmless: the direction measures length."""
    bad, held_bad = draw_streams(40, 4.0), draw_streams(40, 4.0, 1)
    kinds = [i < 20 for i in range(40)]
    good = torch.cat([draw_streams(20, 4.0, 2), draw_streams(20, 0.0, 3)])
    held_good = draw_streams(40, 0.0, 4)
    found = separate_beside_controls((bad, good), (held_bad, held_good), harmless_kinds=kinds)
    assert found.controls[HARMLESS].shape == (1, LAYERS)
    assert found.separation.auc[-1] > 0.95
    assert abs(found.controls[HARMLESS][0, -1]) > 1


def test_draws_follow_the_seed():
    one, same, other = (separate_beside_controls(*planted(1.0), count=5, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.controls[MATCHED], same.controls[MATCHED])
    assert (one.controls[ISOTROPIC] != other.controls[ISOTROPIC]).all()


def test_matched_draws_have_the_covariance_within_kinds():
    from deltakeeper.lens.controls import _matched

    bad, good = draw_streams(60, 6.0).double(), draw_streams(60, 0.0, 1).double()
    drawn = _matched(bad, good, 20_000, torch.Generator().manual_seed(0))[:, -1].numpy()
    rows = np.concatenate(
        [bad[:, -1].numpy() - bad[:, -1].numpy().mean(0), good[:, -1].numpy() - good[:, -1].numpy().mean(0)]
    )
    np.testing.assert_allclose(np.cov(drawn.T), rows.T @ rows / 118, atol=0.08)


def test_streams_that_do_not_fit_are_refused():
    streams = draw_streams(4)
    with pytest.raises(DataError, match="differ in layers or width"):
        fit_direction(streams, streams[:, :2])
    with pytest.raises(DataError, match="at least two prompts"):
        fit_direction(streams[:1], streams)
    with pytest.raises(DataError, match="3 kinds are given for 4"):
        separate_beside_controls((streams, streams), (streams, streams), harmless_kinds=[True] * 3)
