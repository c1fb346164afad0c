"""Restored shares over prompts, rankings of layers, and outcomes: formulas and strict reading."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from deltakeeper.errors import DataError, LensError
from deltakeeper.lens.outcomes import token_margin, token_mass
from deltakeeper.lens.ranking import LayerRanking, Origin, rank_places
from deltakeeper.lens.restored import Place, Sweep


def test_shares_are_ratios_of_sums():
    places = (Place("layer", (0,)), Place("layer", (1,)))
    patched = np.array([[0.2, 0.9], [0.3, 0.5], [0.5, 0.5]])
    sweep = Sweep(places, patched, np.array([1.0, 0.6, 0.505]), np.array([0.1, 0.2, 0.5]), "base", "tuned", "t")
    assert sweep.ratios()[:2] == pytest.approx(np.array([[0.1 / 0.9, 0.8 / 0.9], [0.25, 0.75]]))
    assert np.isnan(sweep.ratios()[2]).all()
    assert sweep.restored() == pytest.approx([0.2 / 1.305, 1.1 / 1.305])
    counts = np.array([[2, 1, 0], [0, 0, 3], [1, 1, 1]])
    drawn = sweep.restored(counts)
    assert drawn[0] == pytest.approx([0.3 / 2.2, 1.9 / 2.2])
    assert np.isnan(drawn[1]).all() and drawn[2] == pytest.approx(sweep.restored())
    assert sweep.gained() == pytest.approx([0.2 / 1.305, 0.9 / 1.305])
    with pytest.raises(LensError, match="not of 3 prompts"):
        sweep.restored(np.ones((2, 4)))
    with pytest.raises(ValueError, match="a sweep needs"):
        Sweep(places, patched[:, :1], sweep.clean, sweep.corrupted, "base", "tuned", "t")


def test_rankings_are_plain_and_read_strictly():
    generator = np.random.default_rng(0)
    places = tuple(Place("attention", (layer, layer + 1)) for layer in range(3))
    effect = np.array([0.1, 0.8, 0.4])
    clean = 0.8 + 0.1 * generator.random(40)
    patched = effect * clean[:, None] + 0.02 * generator.standard_normal((40, 3))
    sweep = Sweep(places, patched, clean, np.zeros(40), "base", "tuned", "t")
    counts = generator.multinomial(40, np.full(40, 1 / 40), size=200)
    ranking = rank_places(sweep, counts)
    assert [entry.place.layers[0] for entry in ranking.places] == [1, 2, 0]
    assert all(entry.low < entry.share < entry.high and entry.high - entry.low < 0.05 for entry in ranking.places)
    value = json.loads(json.dumps(ranking.to_json(), allow_nan=False))
    assert LayerRanking.from_json(value) == ranking and ranking.prompts == 40
    flat = rank_places(Sweep(places, patched, clean, clean, "base", "tuned", "t"), counts)
    assert [entry.share for entry in flat.places] == [None] * 3 and flat.places[0].low is None
    assert LayerRanking.from_json(flat.to_json()) == flat
    known = replace(ranking, origin=Origin("0" * 64, "0" * 64, "f" * 64))
    assert LayerRanking.from_json(json.loads(json.dumps(known.to_json()))) == known
    for wrong in ("0" * 64, {"base": "0" * 64}, {"base": "0" * 64, "donor": "0" * 64, "receiver": "F" * 64}):
        with pytest.raises(DataError, match="no sound ranking of layers: its origin"):
            LayerRanking.from_json({**value, "origin": wrong})
    for key, wrong in (("version", 3), ("prompts", -1), ("donor", 3), ("share", "all"), ("places", {}), ("more", 1)):
        with pytest.raises(DataError, match="no sound ranking"):
            LayerRanking.from_json({**value, key: wrong})
    for key, wrong in (("share", float("nan")), ("layers", [-1]), ("layers", 3), ("patched", "all"), ("low", "0")):
        with pytest.raises(DataError, match="no sound ranking"):
            LayerRanking.from_json({**value, "places": [{**value["places"][0], key: wrong}]})


def test_outcomes_by_brute_force():
    logits = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1)
    assert torch.allclose(token_mass([1, 4, 4])(logits), (p[..., 1] + p[..., 4]).mean(1))
    odds = ((p[..., 1] + p[..., 2]) / p[..., 3]).log().mean(1)
    assert torch.allclose(token_margin([1, 2], [3])(logits), odds, atol=1e-5)
    for wrong in (lambda: token_mass([]), lambda: token_margin([1], [1])):
        with pytest.raises(LensError):
            wrong()
