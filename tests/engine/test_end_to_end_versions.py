"""Versions of tenants end to end: no keys shared between them, swaps and unloads that no running request notices."""

from __future__ import annotations

import itertools

import pytest
from end_to_end_cases import (
    answer_alone,
    at_rest,
    engine_of,
    opened_store,
    run_dry,
    same_until_a_tie,
    service_of,
    step_until,
)
from engine_cases import prompts_of

from deltakeeper.engine import Request
from deltakeeper.engine import sequence as sequence_module

PROMPT = prompts_of(40, seed=8)[0]
SHORT, LONG = 3, 24
SOURCES = {"first": ("one", None), "coarse": ("one", 1), "second": ("two", None)}
"""What stands behind the name `a`: an artifact, and the planes served of it."""
ASKED = ("base", "b", *SOURCES)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    service = service_of("llama", tmp_path_factory.mktemp("made"), layers=1)
    for seed, name in enumerate(("one", "two", "b")):
        service.tune(name, "bitdelta:bits=2", seed=seed, planes=(1,) if name == "one" else ())
    return service


@pytest.fixture(params=[1], ids=["loads beside passes"])
def opened(service, request):
    with opened_store(service, loaders=request.param) as (overlay, store):
        store.register("a", service.tenants["one"].path)
        yield overlay, store


@pytest.fixture(scope="module")
def cold(service):
    """Answers of fresh engines, each checked against the merged model."""
    names = {"base": None, "b": "b", "first": "one", "coarse": "one-1", "second": "two"}
    with opened_store(service) as (overlay, store):
        answers = {asked: answer_alone(overlay, store, name, PROMPT, LONG) for asked, name in names.items()}
    for asked, name in names.items():
        assert same_until_a_tie(answers[asked], service.merged_answer(name, PROMPT, LONG)) >= SHORT
    assert len({tuple(answer[:SHORT]) for answer in answers.values()}) == len(names)
    return answers


def put(store, engine, service, asked):
    """Make the name `a` stand for a source, if it does not yet."""
    tenant, planes = SOURCES[asked]
    done = store.replace("a", service.tenants[tenant].path, planes=planes)
    step_until(engine, done.done)
    return done.result()


def ask_in_order(opened, service, order):
    """Tokens of each in one engine, and how many came out of the cache; the name `a` is replaced in between."""
    overlay, store = opened
    found = []
    with engine_of(overlay, store) as engine:
        for asked in order:
            if asked in SOURCES:
                put(store, engine, service, asked)
            tenant = {"base": None, "b": "b"}.get(asked, "a")
            (answer,) = engine.generate([Request(PROMPT, tenant=tenant, max_new_tokens=SHORT)])
            assert answer.error is None
            found.append((list(answer.tokens), answer.cached_tokens))
        at_rest(engine, store)
    return found


@pytest.mark.parametrize("opened", [0], indirect=True, ids=["loads between passes"])
def test_in_every_order_each_is_answered_as_if_it_were_cold(opened, service, cold):
    for order in itertools.permutations(ASKED):
        assert ask_in_order(opened, service, order) == [(cold[asked][:SHORT], 0) for asked in order], order


def test_who_comes_back_finds_its_own_keys_again(opened, service, cold):
    for order in itertools.islice(itertools.permutations(ASKED), 0, None, 17):
        answers = ask_in_order(opened, service, [*order, *reversed(order)])
        assert [tokens for tokens, _ in answers] == [cold[asked][:SHORT] for asked in [*order, *reversed(order)]]
        assert [cached for _, cached in answers] == [0] * 5 + [32] * 5


def test_without_the_version_in_their_seed_keys_would_be_shared(opened, service, cold, monkeypatch):
    """The tests above can fail: leave the version out, and a replaced tenant is answered from the old one's keys."""
    real = sequence_module.seed_key
    monkeypatch.setattr(sequence_module, "seed_key", lambda version, tenant, salt: real("", tenant, salt))
    wrong = 0
    for order in itertools.permutations(SOURCES, 2):
        (first, none), (second, cached) = ask_in_order(opened, service, order)
        assert (first, none, cached) == (cold[order[0]][:SHORT], 0, 32)
        wrong += second != cold[order[1]][:SHORT]
    assert wrong >= 3


def test_swaps_while_streams_are_read_on_other_threads(opened, service, cold):
    """The engine runs on its own thread; each stream ends on the version that it began with."""
    overlay, store = opened
    turns = ["first", "second", "coarse", "first", "coarse", "second"]
    with engine_of(overlay, store, max_running=16) as engine:
        engine.start()
        streams = []
        for asked in turns:
            tenant, planes = SOURCES[asked]
            store.replace("a", service.tenants[tenant].path, planes=planes).result(timeout=30)
            for _ in range(2):
                stream = engine.submit(Request(PROMPT, tenant="a", max_new_tokens=LONG))
                streams.append((asked, stream, [stream.get(timeout=30).id]))  # its first token: it is admitted
        for asked, stream, tokens in streams:
            tokens += [token.id for token in stream]
            assert tokens == cold[asked] and stream.error is None
        assert engine.drain(timeout=30)
        at_rest(engine, store)
    assert store.stats().tenants["a"].evictions["replaced"] == len(turns) - 1


def test_a_request_that_runs_when_its_tenant_is_unloaded_is_finished(opened, service, cold):
    overlay, store = opened
    with engine_of(overlay, store) as engine:
        put(store, engine, service, "second")
        running = engine.submit(Request(PROMPT, tenant="a", max_new_tokens=LONG))
        for _ in range(3):
            engine.step()
        before = store.stats().tenants["a"]
        store.unload("a")
        engine.step()
        assert store.state("a") == "draining" and store.stats().tenants["a"].pins == 1
        fresh = engine.submit(Request(PROMPT, tenant="a", max_new_tokens=LONG))
        run_dry(engine)
        assert list(running.result().tokens) == list(fresh.result().tokens) == cold["second"]
        assert store.stats().tenants["a"].loads == before.loads + 1
        store.unload("a")
        step_until(engine, lambda: not store.stats().tenants["a"].versions)
        assert set(overlay.published) == set()


def test_a_name_that_is_removed_finishes_what_runs_and_takes_nothing_new(opened, cold):
    overlay, store = opened
    with engine_of(overlay, store) as engine:
        running = engine.submit(Request(PROMPT, tenant="a", max_new_tokens=LONG))
        while not running.take():
            engine.step()
        store.remove("a")
        late = engine.submit(Request(PROMPT, tenant="a", max_new_tokens=LONG))
        run_dry(engine)
        assert list(running.result().tokens) == cold["first"]
        assert late.result().finish_reason == "error" and "no tenant 'a'" in late.result().error
        at_rest(engine, store)
