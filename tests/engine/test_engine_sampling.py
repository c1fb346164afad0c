"""Sampling against transformers' own processors, and draws that depend on their request alone."""

from __future__ import annotations

import math

import pytest
import torch
from engine_cases import prompts_of, settings_of
from hypothesis import given
from hypothesis import strategies as st

from deltakeeper.engine import Engine, Request, Sampling
from deltakeeper.engine import sampling as module
from deltakeeper.engine.chances import chance, draw, seed_bytes
from deltakeeper.engine.penalties import Penalties
from deltakeeper.engine.sampling import Chooser, choose, greedy, logprobs_of
from deltakeeper.errors import EngineError
from deltakeeper.testing.models import build_model


def chooser_of(sampling, position=0, prompt=()):
    penalties = Penalties(sampling, prompt) if sampling.penalised else None
    return Chooser(sampling, seed_bytes(sampling.seed), position, penalties)


def transformers_probabilities(logits, sampling):
    from transformers.generation import logits_process as lp

    processors = [lp.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        processors.append(lp.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(lp.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(lp.MinPLogitsWarper(sampling.min_p))
    scores = logits.clone()
    for processor in processors:
        scores = processor(torch.zeros(len(logits), 1, dtype=torch.int64), scores)
    return scores.softmax(-1)


def drawn_shares(monkeypatch, logits, sampling, points=4000):
    """How often each token is drawn if the random number takes every value of a grid once."""
    shares = torch.zeros(len(logits), logits.shape[1], dtype=torch.float64)
    grid = iter((i + 0.5) / points for i in range(points) for _ in range(len(logits)))
    monkeypatch.setattr(module, "chance", lambda seed, position: next(grid))
    choosers = [chooser_of(sampling)] * len(logits)
    for _ in range(points):
        for row, token in enumerate(choose(logits.clone(), choosers)):
            shares[row, token] += 1 / points
    return shares


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=1.5, top_k=20, top_p=0.6, min_p=0.1),
        Sampling(temperature=0.9, min_p=0.2),
    ],
)
def test_draws_have_the_probabilities_of_transformers(monkeypatch, sampling):
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(5)) * 2
    expected = transformers_probabilities(logits, sampling)
    shares = drawn_shares(monkeypatch, logits, sampling, points=1000)
    assert (shares - expected).abs().max() < 2e-3
    assert torch.equal(shares > 0, (expected > 0) & (shares > 0))  # nothing that was cut is ever drawn
    assert (shares > 0).sum() > 3 or sampling.top_k


@given(
    scale=st.sampled_from([0.01, 1.0, 4.0]),
    width=st.sampled_from([7, 300, 2000]),
    top_k=st.sampled_from([0, 1, 3, 100, 10_000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 1000),
)
def test_the_tokens_left_are_those_that_transformers_leaves(scale, width, top_k, top_p, min_p, seed):
    logits = torch.randn(4, width, generator=torch.Generator().manual_seed(seed)) * scale
    sampling = Sampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = transformers_probabilities(logits, sampling) > 0
    rows = logits - logits.amax(-1, keepdim=True)
    floor = module.thresholds(rows, [sampling] * 4)
    kept = torch.ones_like(expected) if floor is None else rows >= floor.unsqueeze(1)
    # float32 sums may put the edge of top-p one token further up or down
    assert ((kept.sum(-1) - expected.sum(-1)).abs() <= 1).all()
    assert ((kept ^ expected).sum(-1) <= 1).all()


def test_settings_of_one_row_do_not_reach_another():
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(3)) * 3
    settings = [
        Sampling(),
        Sampling(temperature=0.8, seed=1),
        Sampling(temperature=1.2, top_p=0.7, seed=2),
        Sampling(temperature=1.0, top_k=3, seed=3),
        Sampling(temperature=2.0, min_p=0.1, seed=4),
        Sampling(repetition_penalty=1.5),
    ]
    prompt = [int(logits[5].argmax())]
    together = choose(logits.clone(), [chooser_of(s, 7, prompt) for s in settings])
    alone = [choose(logits[i : i + 1].clone(), [chooser_of(s, 7, prompt)])[0] for i, s in enumerate(settings)]
    assert together == alone
    assert together[0] == int(logits[0].argmax())
    assert together[5] != prompt[0]


def test_draws_follow_the_position_and_the_seed():
    logits = torch.zeros(1, 1000)
    sampling = Sampling(temperature=1.0, seed=11)
    tokens = [choose(logits.clone(), [chooser_of(sampling, position)])[0] for position in range(50)]
    assert tokens == [choose(logits.clone(), [chooser_of(sampling, position)])[0] for position in range(50)]
    assert len(set(tokens)) > 40
    other = Sampling(temperature=1.0, seed=12)
    assert tokens != [choose(logits.clone(), [chooser_of(other, position)])[0] for position in range(50)]


def test_chances_are_uniform():
    seed = seed_bytes(1)
    values = torch.tensor([chance(seed, i) for i in range(20_000)])
    assert values.min() >= 0.0 and values.max() < 1.0
    counts = torch.histc(values, bins=20, min=0, max=1)
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 45  # 19 degrees of freedom; one in a thousand is 43.8


@given(st.integers(1, 700), st.integers(0, 10_000))
def test_a_draw_never_picks_a_weight_of_zero(width, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(5, width, generator=generator) * (torch.rand(5, width, generator=generator) < 0.1)
    weights[:, int(torch.randint(width, (), generator=generator))] += 1e-3
    for value in (0.0, 0.5, 1 - 2**-24):
        picked = draw(weights, torch.full((5,), value))
        assert (weights[torch.arange(5), picked] > 0).all()


def test_penalties_are_those_of_transformers_and_openai():
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3
    prompt, said = [1, 2, 3, 3], [3, 7, 7, 9]
    repetition = Penalties(Sampling(repetition_penalty=1.7), prompt)
    counted = Penalties(Sampling(presence_penalty=0.5, frequency_penalty=0.25), prompt)
    for token in said:
        repetition.add(token)
        counted.add(token)
    row = logits.clone()
    repetition.apply_(row)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + said]), logits.unsqueeze(0).clone())[0]
    torch.testing.assert_close(row, expected)
    row = logits.clone()
    counted.apply_(row)
    expected = logits.clone()
    for token, times in {3: 1, 7: 2, 9: 1}.items():
        expected[token] -= 0.5 + 0.25 * times
    torch.testing.assert_close(row, expected)


def test_penalties_grow_past_their_first_room():
    penalties = Penalties(Sampling(repetition_penalty=2.0), range(1000))
    row = torch.ones(1200)
    penalties.apply_(row)
    assert torch.equal(row, torch.cat([torch.full((1000,), 0.5), torch.ones(200)]))


def test_logprobs_are_those_of_the_model():
    logits = torch.randn(3, 30)
    expected = logits.log_softmax(-1)
    found = logprobs_of(logits, [4, 5, 6], [0, 2, 3])
    for row, (token, count) in enumerate([(4, 0), (5, 2), (6, 3)]):
        assert math.isclose(found[row].chosen, float(expected[row, token]), rel_tol=1e-6)
        top = expected[row].topk(count)
        assert [i for i, _ in found[row].top] == top.indices.tolist()
        assert [v for _, v in found[row].top] == pytest.approx(top.values.tolist())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9), Sampling(presence_penalty=1.0)])
def test_logits_that_are_not_numbers_are_told_apart(bad, sampling):
    logits = torch.randn(3, 200)
    logits[1, 17] = bad
    tokens = choose(logits.clone(), [chooser_of(sampling)] * 3)
    assert tokens[1] == -1
    assert tokens[0] >= 0 and tokens[2] >= 0
    assert greedy(torch.full((1, 5), -math.inf)) == [-1]


def test_tokens_of_minus_infinity_are_never_drawn():
    logits = torch.full((1, 300), -math.inf)
    logits[0, 100:103] = 0.0
    for position in range(200):
        for sampling in (Sampling(temperature=5.0, seed=1), Sampling(temperature=5.0, top_p=0.99, seed=1)):
            assert 100 <= choose(logits.clone(), [chooser_of(sampling, position)])[0] < 103


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1}, {"temperature": math.nan}, {"top_p": 0}, {"top_k": -1}, {"min_p": 2}, {"logprobs": -1}],
)
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(EngineError, match=next(iter(values))):
        Sampling(**values)


def test_a_seeded_answer_does_not_depend_on_batch_mates():
    model = build_model("llama")
    prompts = prompts_of(4, 9, 21)
    hot = Sampling(temperature=1.0, top_p=0.95, seed=3)
    with Engine(model, None, settings=settings_of()) as engine:
        alone = engine.generate([Request(prompts[0], sampling=hot, max_new_tokens=15, ignore_eos=True)])[0]
        mates = [
            Request(prompts[1], sampling=Sampling(temperature=2.0), max_new_tokens=15),
            Request(prompts[0], sampling=hot, max_new_tokens=15, ignore_eos=True),
            Request(prompts[2], max_new_tokens=15),
            Request(prompts[0], sampling=Sampling(temperature=1.0, seed=4), max_new_tokens=15, ignore_eos=True),
        ]
        answers = engine.generate(mates)
    assert answers[1].tokens == alone.tokens
    assert answers[3].tokens != alone.tokens


def test_logprobs_of_an_answer_and_of_its_prompt():
    model = build_model("qwen2")
    prompt = prompts_of(19)[0]
    request = Request(prompt, max_new_tokens=4, sampling=Sampling(logprobs=2), prompt_logprobs=1, ignore_eos=True)
    with Engine(model, None, settings=settings_of(max_step_tokens=8)) as engine:
        engine.generate([Request(prompt, max_new_tokens=4)])  # its blocks are in the prefix cache now
        answer = engine.generate([request])[0]
    logs = model(torch.tensor([[*prompt, *answer.tokens]])).logits[0].detach().log_softmax(-1)
    assert answer.prompt_logprobs[0] is None
    for at, entry in enumerate(answer.prompt_logprobs[1:], 1):
        assert entry.chosen == pytest.approx(float(logs[at - 1, prompt[at]]), abs=1e-4)
        assert entry.top[0][0] == int(logs[at - 1].argmax())
    assert len(answer.prompt_logprobs) == len(prompt)
    for at, (token, entry) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        row = logs[len(prompt) - 1 + at]
        assert entry.chosen == pytest.approx(float(row[token]), abs=1e-4)
        assert [i for i, _ in entry.top] == row.topk(2).indices.tolist()
