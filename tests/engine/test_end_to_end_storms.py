"""Too many tenants, broken ones and cancelled requests, end to end: all are told the truth and nothing is left over."""

from __future__ import annotations

import gc
import random
import shutil
import threading

import pytest
from end_to_end_cases import answer_alone, at_rest, engine_of, opened_store, service_of, step_until
from engine_cases import prompts_of
from store_overlay import corrupt

from deltakeeper.engine import Request, Sampling
from deltakeeper.kernels.terms import held_terms

PROMPTS = prompts_of(3, 18, 40, seed=2)
NEW = 6
TWELVE = tuple(f"t{i}" for i in range(12))


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    service = service_of("llama", tmp_path_factory.mktemp("made"), layers=1)
    for seed, name in enumerate(TWELVE):
        service.tune(name, ("bitdelta:bits=2", "svd:rank=4", "bitdelta")[seed % 3], seed=seed)
    return service


@pytest.fixture(scope="module")
def alone(service):
    """Answers of fresh engines, and the bytes that the largest delta really holds."""
    with opened_store(service) as (overlay, store):
        answers = {
            (name, prompt): answer_alone(overlay, store, name, prompt, NEW)
            for name in (None, *TWELVE)
            for prompt in PROMPTS
        }
        largest = max(delta.nbytes for delta in overlay.published.values())
    assert len({answers[name, PROMPTS[-1]][0] for name in TWELVE}) > 3
    return answers, largest


@pytest.fixture(autouse=True)
def no_term_stays():
    gc.collect()
    before = held_terms()
    yield
    gc.collect()
    assert held_terms() == before


def empty(store, engine, overlay):
    """Unload every tenant, and see that every byte comes back."""
    for name in store.names():
        store.unload(name)
    step_until(engine, lambda: not store.stats().residents)
    stats = store.stats()
    assert (stats.resident_bytes, stats.reserved_bytes, stats.pins, stats.waiting) == (0, 0, 0, 0)
    assert not overlay.published


@pytest.mark.parametrize(("seed", "loaders", "grace"), [(0, 0, 2.0), (1, 1, 0.5), (2, 2, 2.0)])
def test_twelve_tenants_in_the_room_of_three(service, alone, seed, loaders, grace):
    answers, largest = alone
    chance = random.Random(seed)
    asked = [(name, prompt) for name in (None, *TWELVE) for prompt in PROMPTS for _ in range(2)]
    chance.shuffle(asked)
    budget = 3 * largest + largest // 2
    with (
        opened_store(service, budget=budget, loaders=loaders, grace_seconds=grace) as (overlay, store),
        engine_of(overlay, store, max_step_tokens=48, max_running=12) as engine,
    ):
        streams = []
        while len(streams) < len(asked) or engine._unfinished:
            for name, prompt in asked[len(streams) : len(streams) + chance.randint(0, 5)]:
                streams.append(engine.submit(Request(prompt, tenant=name, max_new_tokens=NEW)))
            engine.step()
            stats = store.stats()
            assert stats.resident_bytes + stats.reserved_bytes <= budget
            assert sum(delta.nbytes for delta in overlay.published.values()) <= budget
        for (name, prompt), stream in zip(asked, streams, strict=True):
            answer = stream.result()
            assert answer.error is None and list(answer.tokens) == answers[name, prompt]
        at_rest(engine, store)
        assert store.stats().evictions["room"] >= len(TWELVE) - 4
        empty(store, engine, overlay)


def test_two_threads_that_ask_for_a_cold_tenant_load_it_once(service, alone):
    with opened_store(service) as (overlay, store), engine_of(overlay, store) as engine:
        engine.start()
        found, start = {}, threading.Barrier(2)

        def ask(number):
            start.wait()
            stream = engine.submit(Request(PROMPTS[number], tenant="t0", max_new_tokens=NEW))
            found[number] = stream.result(timeout=30)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        for number in range(2):
            assert list(found[number].tokens) == alone[0]["t0", PROMPTS[number]]
        assert engine.drain(timeout=30)
        assert store.stats().loads == store.stats().tenants["t0"].loads == len(overlay.published) == 1
        at_rest(engine, store)


def test_a_corrupt_artifact_fails_its_own_requests_until_it_is_repaired(service, alone, tmp_path):
    now = [0.0]
    broken = shutil.copytree(service.tenants["t0"].path, tmp_path / "broken")
    corrupt(broken)
    with (
        opened_store(service, clock=lambda: now[0], backoff_seconds=5.0) as (overlay, store),
        engine_of(overlay, store) as engine,
    ):
        store.register("broken", broken)

        def ask(*names):
            return engine.generate([Request(PROMPTS[1], tenant=name, max_new_tokens=NEW) for name in names])

        names = ("broken", "t0", None, "broken", "t1")
        for told in ("was altered", "tried again in 5.0 s"):  # the load that failed, and the refusal after it
            for name, answer in zip(names, ask(*names), strict=True):
                if name == "broken":
                    assert answer.finish_reason == "error" and not answer.tokens
                    assert "was altered" in answer.error and told in answer.error
                else:
                    assert answer.error is None and list(answer.tokens) == alone[0][name, PROMPTS[1]]
        assert store.stats().tenants["broken"].failures == 1
        shutil.copytree(service.tenants["t0"].path, broken, dirs_exist_ok=True)
        now[0] = 4.9
        assert "tried again in 0.1 s" in ask("broken")[0].error
        now[0] = 5.1
        (answer,) = ask("broken")
        assert answer.error is None and list(answer.tokens) == alone[0]["t0", PROMPTS[1]]
        at_rest(engine, store)
        empty(store, engine, overlay)


def test_ten_thousand_requests_of_tenants_cancelled_at_random_leave_nothing(service, alone):
    """Room for three of five tenants: requests are cancelled before, while and after they run or wait for a load."""
    chance = random.Random(0)
    names = (None, *TWELVE[:5])
    limits = {"max_running": 256, "max_step_tokens": 2048, "max_waiting": 20_000}
    with (
        opened_store(service, budget=3 * alone[1] + alone[1] // 2) as (overlay, store),
        engine_of(overlay, store, kv_bytes=300 * 2 * 2 * 12 * 16 * 4, **limits) as engine,
    ):
        streams = []
        for number in range(10_000):
            length, hot = chance.randint(1, 20), chance.random() < 0.1
            sampling = Sampling(temperature=1.0, seed=number) if hot else Sampling()
            prompt = (5 + length,) * length
            tenant = names[min(len(names) - 1, int(chance.expovariate(0.5)))]
            request = Request(prompt, tenant=tenant, max_new_tokens=chance.randint(1, 4), sampling=sampling)
            streams.append(engine.submit(request))
            if chance.random() < 0.2:
                chance.choice(streams[-200:]).cancel()
            if number % 125 == 124:
                engine.step()
        while engine.step():
            if chance.random() < 0.3:
                chance.choice(streams).cancel()
        at_rest(engine, store)
        finished = engine.stats().finished
        assert sum(finished.values()) == 10_000 and set(finished) <= {"stop", "length", "cancelled"}
        assert finished["cancelled"] > 500 and finished["length"] > 5_000
        assert all(stream.finish_reason is not None for stream in streams)
        # what runs now is answered as if nothing had been
        assert store.stats().evictions["room"] >= 1
        for name in names:
            (answer,) = engine.generate([Request(PROMPTS[2], tenant=name, max_new_tokens=NEW)])
            assert list(answer.tokens) == alone[0][name, PROMPTS[2]]
        at_rest(engine, store)
        empty(store, engine, overlay)
