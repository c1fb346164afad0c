"""Two sets of prompts: a direction fitted on one half tells of the other half what it should, and of noise nothing."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from lens_families import build_family
from lens_planted import disturb
from lens_traces import LAYERS, make_traces

from deltakeeper.errors import DataError, LensError
from deltakeeper.lens import Models, capture
from deltakeeper.lens.contrast import draw_contrast, reach_of
from deltakeeper.lens.contrasting import contrast_prompts, effect_left_out
from deltakeeper.lens.controls import SHUFFLED
from deltakeeper.lens.directions import fit_direction
from deltakeeper.lens.divergence import find_divergence
from deltakeeper.lens.divergences import TO_BASE, draw_divergences, find_divergences, to_json
from deltakeeper.lens.prompt_streams import read_streams
from deltakeeper.lens.readings import encode_readings
from deltakeeper.lens.separation import measure_effect


class Digits:
    """A tokenizer of numbers."""

    chat_template, pad_token_id = None, 0

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}


def draw_prompts(count, last, seed):
    """Random numbers of several lengths; all end alike where `last` says how."""
    rng = np.random.default_rng(seed)
    return [" ".join(map(str, [*rng.integers(3, 60, rng.integers(2, 6)), *last])) for _ in range(count)]


@pytest.fixture(scope="module")
def models():
    base = build_family("llama")
    return Models({"base": base, "same": base, "tuned": disturb(base, [1])})


@pytest.fixture(scope="module")
def sets():
    return draw_prompts(13, [7], 0), draw_prompts(10, [8], 1)


def by_hand(model, prompt):
    ids = torch.tensor([[int(word) for word in prompt.split()]])
    return capture(model, ids, positions=[-1]).block[:, 0, 0].double()


def test_streams_are_those_of_each_prompt_alone(models, sets):
    readings = encode_readings(Digits(), sets[0])
    found = read_streams(models, Digits(), readings, memory=1 << 20)
    one = read_streams(models, Digits(), readings, only="tuned", memory=1 << 20)
    with models.serving("tuned") as (tuned, _):
        for row, prompt in enumerate(sets[0]):
            assert torch.allclose(found["tuned"][row].double(), by_hand(tuned, prompt), atol=1e-5)
    assert torch.allclose(one["tuned"], found["tuned"], atol=1e-6)
    with pytest.raises(LensError, match="streams of 13 prompts and 3 variants take"):
        read_streams(models, Digits(), readings, memory=1000)


def test_numbers_are_those_of_the_definitions(models, sets):
    found = contrast_prompts(models, Digits(), *sets)
    assert (found.fitted, found.judged) == ((7, 5), (6, 5)) and found.layers == (0, 1)
    streams = {}
    for name in ("base", "tuned"):
        with models.serving(name) as (model, _):
            streams[name] = [torch.stack([by_hand(model, prompt) for prompt in own]) for own in sets]
    direction = fit_direction(*(own[0::2] for own in streams["base"])).vectors
    scores = {k: [torch.einsum("nld,ld->nl", s[1::2], direction).numpy() for s in own] for k, own in streams.items()}
    gaps = {name: one.mean(0) - other.mean(0) for name, (one, other) in scores.items()}
    for name, own in scores.items():
        assert found.variants[name].found.separation.effect == pytest.approx(measure_effect(*own), rel=1e-3)
        assert found.variants[name].kept == pytest.approx(gaps[name] / gaps["base"], rel=1e-3)
    one = found.variants["tuned"]
    assert (one.kept_low <= one.kept + 1e-9).all() and (one.kept <= one.kept_high + 1e-9).all()
    assert found.variants["same"].kept == pytest.approx([1, 1])
    zero, spread = scores["base"][1].mean(0), gaps["base"] / measure_effect(*scores["base"])
    assert one.asked.median == pytest.approx(np.median((scores["tuned"][0] - zero) / spread, 0), rel=1e-3, abs=1e-3)


def test_the_last_token_is_told_apart_and_noise_is_not(models, sets):
    told = contrast_prompts(models, Digits(), *sets).variants["base"].found
    assert (told.separation.low > 1).all() and (told.separation.auc == 1).all()
    noise = contrast_prompts(models, Digits(), draw_prompts(20, [], 2), draw_prompts(20, [], 3)).variants["base"]
    assert (noise.found.reached[SHUFFLED] > 0.05).all()
    assert np.isnan(noise.kept).all(), "the base does not hold them apart, so there is nothing to keep"


def test_the_layer_is_chosen_without_the_prompts_that_judge(models, sets, monkeypatch):
    found = contrast_prompts(models, Digits(), *sets)
    monkeypatch.setattr("deltakeeper.lens.contrasting.effect_left_out", lambda one, other: np.array([1.0, 0.0]))
    assert contrast_prompts(models, Digits(), *sets).layer == 0
    monkeypatch.undo()
    assert contrast_prompts(models, Digits(), *sets, layers=[1]).layer == 1
    with models.serving("base") as (base, _):
        fit = [torch.stack([by_hand(base, prompt) for prompt in own[0::2]]) for own in sets]
    assert found.place == int(np.argmax(effect_left_out(*fit)))
    with pytest.raises(LensError, match="layers 0 to 1"):
        contrast_prompts(models, Digits(), *sets, layers=[2])


@pytest.mark.parametrize("sizes", [(6, 6), (6, 5)])
def test_a_prompt_is_projected_on_a_direction_that_it_is_not_in(sizes):
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(n, 2, 5, generator=generator, dtype=torch.float64) for n in sizes)
    alike, keep = sizes[0] == sizes[1], lambda rows, out: torch.cat([rows[:out], rows[out + 1 :]])
    scores = [[], []]
    for i in range(sizes[0]):
        vectors = fit_direction(keep(one, i), keep(other, i) if alike else other).vectors
        scores[0].append((one[i] * vectors).sum(-1).numpy())
    for i in range(sizes[1]):
        vectors = fit_direction(keep(one, i) if alike else one, keep(other, i)).vectors
        scores[1].append((other[i] * vectors).sum(-1).numpy())
    assert effect_left_out(one, other) == pytest.approx(measure_effect(*map(np.stack, scores)))


def test_it_is_told_as_json_and_drawn_beside_its_controls(models, sets):
    found = contrast_prompts(models, Digits(), *sets)
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    base, one = value["variants"]["base"], found.variants["base"].found
    assert base["apart"] == pytest.approx(one.separation.effect.tolist(), rel=1e-4)
    assert base["controls"][SHUFFLED]["share"] == pytest.approx(one.reached[SHUFFLED].tolist(), rel=1e-4)
    largest = np.sort(np.abs(one.controls[SHUFFLED]), axis=0)
    assert (largest[94] <= reach_of(one.controls[SHUFFLED])).all() and value["judged"] == [6, 5]
    text = draw_contrast(found).svg()
    assert all(name in text for name in (*found.variants, *one.controls))


@pytest.mark.parametrize(("first", "second"), [(3, 9), (9, 3)])
def test_sets_too_small_to_split_are_refused(models, first, second):
    with pytest.raises(LensError, match="4 prompts a set are the least"):
        contrast_prompts(models, Digits(), draw_prompts(first, [], 0), draw_prompts(second, [], 1))


def with_distance(trace, values):
    """A trace whose JS to the base is what is given by layer."""
    return dataclasses.replace(trace, js={"base": np.repeat(np.array(values, dtype=np.float32)[:, None], 2, 1)})


def draw_pairs(count, shift):
    """Pairs whose members are far more alike than the pairs are; the first is moved by `shift`."""
    rng, trace = np.random.default_rng(0), make_traces()["half"]
    of_pair = 0.3 + 0.05 * rng.normal(size=(count, LAYERS))
    return (
        [with_distance(trace, own + shift + 0.001 * rng.normal(size=LAYERS)) for own in of_pair],
        [with_distance(trace, own + 0.001 * rng.normal(size=LAYERS)) for own in of_pair],
    )


def test_pairs_show_what_sets_hide():
    first, second = draw_pairs(12, np.array([0, 0, 0.02, 0.02]))
    assert find_divergence(first, second, "js:base").layer is None
    found = find_divergence(first, second, "js:base", paired=True)
    assert found.layer == 2 and "within pairs" in found.definition
    with pytest.raises(DataError, match="12 and 11 prompts make no pairs"):
        find_divergence(first, second[:-1], "js:base", paired=True)


@pytest.mark.parametrize(("pairs", "layer"), [(5, None), (6, 0)])
def test_six_pairs_are_the_least_that_can_part(pairs, layer):
    first, second = draw_pairs(pairs, np.full(LAYERS, 0.6))
    assert find_divergence(first, second, "js:base", paired=True).layer == layer


def test_shuffled_pairs_pass_the_bar_in_one_of_twenty():
    rng, passed = np.random.default_rng(1), 0
    for _ in range(60):
        swapped = [pair if rng.random() < 0.5 else pair[::-1] for pair in zip(*draw_pairs(8, 0.1), strict=True)]
        first, second = (list(side) for side in zip(*swapped, strict=True))
        found = find_divergence(first, second, "js:base", paired=True, draws=199)
        passed += bool((found.separation > found.bar).any())
    assert passed <= 8


def test_every_variant_and_statistic_is_told_and_the_base_has_no_distance_to_itself():
    first, second = draw_pairs(12, np.array([0, 0, 0.02, 0.02]))
    found = find_divergences({"base": first, "half": first}, {"base": second, "half": second}, base="base")
    assert set(found["base"]) == {"refusal"} and set(found["half"]) == {TO_BASE, "refusal"}
    assert found["half"][TO_BASE].found.layer == 2 and found["half"]["refusal"].found.layer is None
    value = json.loads(json.dumps(to_json(found), allow_nan=False))
    assert value["pairs"] == 12 and value["variants"]["half"][TO_BASE]["layer"] == 2
    medians = value["variants"]["half"][TO_BASE]["bands"]["prompts"]["median"]
    assert medians == pytest.approx(np.median([t.js["base"][:, 0] for t in first], 0), rel=1e-4)
    assert "half" in draw_divergences(found).svg() and draw_divergences({"base": found["base"]}) is None
