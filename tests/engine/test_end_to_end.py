"""The whole stack under mixed batches: every codec and number of planes, any company, any order, any chunks."""

from __future__ import annotations

import random

import pytest
import torch
from end_to_end_cases import answer_alone, at_rest, engine_of, opened_store, run_dry, same_until_a_tie, service_of
from engine_cases import prompts_of
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakeeper.engine import Request, Sampling
from deltakeeper.kernels.library import compiled

CODECS = {
    "one-bit": "bitdelta",
    "nested": "bitdelta:bits=3",
    "svd": "svd:rank=4",
    "magnitude": "magnitude:keep=0.1",
    "rtn": "rtn:bits=4",
    "compeft": "compeft",
    "dare": "dare:p=0.5",
    "mixed-precision": "delta_come",
    "sum": "bitdelta+svd:rank=2",
    "dense": "dense",
}
LENGTHS = (1, 4, 15, 16, 17, 33, 48)
# Equal beginnings, so that tenants are tempted to share blocks; two of each length, so that they do not always.
PROMPTS = tuple(long[:length] for long in prompts_of(48, 48, seed=8) for length in LENGTHS)
NEW = 8


def full_service(folder, dtype):
    service = service_of("llama", folder, dtype=dtype)
    for seed, (name, codec) in enumerate(CODECS.items()):
        service.tune(name, codec, seed=seed, planes=(1, 2) if name == "nested" else ())
    return service


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """In float32, all tenants cold; loads go on while others are served."""
    service = full_service(tmp_path_factory.mktemp("exact"), torch.float32)
    with opened_store(service) as (overlay, store):
        yield service, overlay, store, {}


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """The same in bfloat16."""
    service = full_service(tmp_path_factory.mktemp("rounded"), torch.bfloat16)
    with opened_store(service) as (overlay, store):
        yield service, overlay, store, {}


NAMES = (None, *CODECS, "nested-1", "nested-2")


@st.composite
def traffic(draw):
    """Requests in order of arrival, how many steps go by before each, and an engine's settings."""
    requests = draw(
        st.lists(
            st.tuples(st.sampled_from(NAMES), st.sampled_from(PROMPTS), st.integers(0, 4)), min_size=2, max_size=10
        )
    )
    limits = {
        "max_step_tokens": draw(st.sampled_from([1, 7, 16, 40, 256])),
        "max_running": draw(st.sampled_from([2, 5, 16])),
        "prefix_sharing": draw(st.booleans()),
    }
    return requests, limits, draw(st.sets(st.sampled_from(NAMES[1:]), max_size=2))


def serve(overlay, store, requests, limits, unloaded=()):
    """Tokens of requests that arrive between steps; some tenants are cold at first."""
    for name in unloaded:
        store.unload(name)
    with engine_of(overlay, store, **limits) as engine:
        streams = []
        for tenant, prompt, wait in requests:
            for _ in range(wait):
                engine.step()
            streams.append(engine.submit(Request(prompt, tenant=tenant, max_new_tokens=NEW)))
        run_dry(engine)
        at_rest(engine, store)
    answers = [stream.result() for stream in streams]
    assert [answer.error for answer in answers] == [None] * len(answers)
    return [list(answer.tokens) for answer in answers]


def alone(world, tenant, prompt):
    """Answers in a fresh engine, remembered."""
    _, overlay, store, known = world
    if (tenant, prompt) not in known:
        known[tenant, prompt] = answer_alone(overlay, store, tenant, prompt, NEW)
    return known[tenant, prompt]


def test_tenants_answer_differently(exact):
    """Or else nothing below would show anything."""
    answers = {name: tuple(alone(exact, name, PROMPTS[-1])) for name in NAMES}
    assert len(set(answers.values())) >= len(NAMES) - 1


@pytest.mark.parametrize("name", NAMES)
def test_alone_every_codec_answers_as_its_merged_model(exact, name):
    service = exact[0]
    compared = sum(
        same_until_a_tie(alone(exact, name, prompt), service.merged_answer(name, prompt, NEW))
        for prompt in PROMPTS[::3]
    )
    assert compared >= 0.6 * NEW * len(PROMPTS[::3])


@given(case=traffic())
@settings(max_examples=40)
def test_in_any_company_answers_are_those_given_alone(exact, case):
    service, overlay, store, _ = exact
    for (tenant, prompt, _), tokens in zip(case[0], serve(overlay, store, *case), strict=True):
        same = same_until_a_tie(tokens, service.merged_answer(tenant, prompt, NEW))
        assert tokens[:same] == alone(exact, tenant, prompt)[:same], (tenant, prompt)


def entries(answers):
    """Tokens and log-probabilities, to the bit."""
    assert [answer.error for answer in answers] == [None] * len(answers)
    return [(answer.tokens, answer.logprobs) for answer in answers]


@pytest.mark.skipif(not compiled(), reason="promised by compiled code")
@pytest.mark.parametrize(("step", "sharing"), [(7, True), (40, False), (512, True)])
def test_in_bfloat16_the_bits_of_an_answer_do_not_depend_on_its_company(rounded, step, sharing):
    """Tokens and log-probabilities, of every codec, in chunks and whole, with shared blocks and without."""
    _, overlay, store, _ = rounded
    asked = [
        Request(PROMPTS[(3 * i + step) % len(PROMPTS)], tenant=name, max_new_tokens=NEW, sampling=Sampling(logprobs=2))
        for i, name in enumerate(NAMES)
    ]
    chance = random.Random(step)
    chance.shuffle(asked)
    with engine_of(overlay, store, max_step_tokens=step, prefix_sharing=sharing) as engine:
        streams = []
        for request in asked:
            streams.append(engine.submit(request))
            for _ in range(chance.randint(0, 3)):
                engine.step()
        run_dry(engine)
    together = entries([stream.result() for stream in streams])
    for request, found in zip(asked, together, strict=True):
        with engine_of(overlay, store) as engine:
            assert entries(engine.generate([request])) == [found], request.tenant
