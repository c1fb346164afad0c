"""One key floods, another asks for one token: what the second one waits, counted in passes of the engine."""

from __future__ import annotations

import time
from contextlib import contextmanager

import pytest
from service_cases import PROMPT, FakeGate, SilentObserver, opened_services, served, wait_until

from deltakeeper.engine.parties import PATIENCE
from deltakeeper.service.access import Principal
from deltakeeper.service.settings import ServiceSettings
from deltakeeper.service.tenancy.database import open_state
from deltakeeper.service.tenancy.gate import StateGate
from deltakeeper.service.tenancy.quotas import Limits, Quota

FLOOD = {"model": "signs", "prompt": PROMPT, "max_tokens": 50, "ignore_eos": True, "n": 64, "stream": True}
ONE = {"model": "ranks", "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
JSON = {"Content-Type": "application/json"}
KEYS = {name: Principal(name, "tenant") for name in ("flood", "quiet")}


@contextmanager
def measured(engine):
    """Passes from the submission of each of the quiet one's answers to its first word, by an engine in no hurry."""
    submit, step, passes = engine.submit, engine._core.step, []

    def slow_step():
        time.sleep(0.01)
        return step()

    def counted_submit(request, wake):
        began, heard = engine._core.counters.steps, []

        def tell():
            heard.append(engine._core.counters.steps)
            if request.owner == "quiet" and len(heard) == 1:
                passes.append(heard[0] - began)
            wake()

        return submit(request, tell)

    engine.submit, engine._core.step = counted_submit, slow_step
    try:
        yield passes
    finally:
        engine.submit, engine._core.step = submit, step


@pytest.mark.parametrize("model", ["ranks", "signs"])
def test_a_request_that_takes_every_place_holds_another_key_up_for_some_passes(service_folder, model):
    sizes = {"max_running": 4, "max_waiting": 200}
    with (
        opened_services(service_folder, gate=FakeGate(dict(KEYS)), engine=sizes) as services,
        served(services) as live,
        measured(services.engine) as passes,
        live.client("flood") as flood,
        live.client("quiet") as quiet,
        flood.stream("POST", "/v1/completions", json=FLOOD) as answer,
    ):
        assert answer.status_code == 200
        wait_until(lambda: services.engine.stats().running == 4)
        assert quiet.post("/v1/completions", json=ONE | {"model": model}).status_code == 200
        with live.client("flood") as again:  # its part of the line is full, and the other's is not
            full = again.post("/v1/completions", json=FLOOD | {"n": 128, "stream": False})
            assert (full.status_code, full.json()["error"]["code"]) == (503, "queue_full")
        assert quiet.post("/v1/completions", json=ONE | {"model": model, "n": 3, "temperature": 1}).status_code == 200
        wait_until(lambda: services.engine.stats().running == 4)
        assert services.engine.stats().waiting > 10  # the flood goes on meanwhile
    assert len(passes) == 4 and passes[0] <= PATIENCE + 4 and max(passes) <= 2 * PATIENCE + 8, passes


def test_a_key_over_its_quota_is_stopped_before_its_body_is_read_and_loads_nothing(service_folder, tmp_path):
    opened = open_state(tmp_path / "state.db")
    gate, refused = StateGate(opened), []

    class Metrics(SilentObserver):
        def rejected(self, reason):
            refused.append(reason)

    key = gate.keys.create("team", "tenant", ["signs", "ranks"])
    limits = ServiceSettings(max_choices=8, max_new_tokens=3)
    try:
        with (
            opened_services(service_folder, gate=gate, metrics=Metrics(), settings=limits) as services,
            served(services) as live,
            live.client(key.secret) as client,
        ):
            gate.quotas.set(Quota("key", "*", Limits(requests_per_minute=3)))
            gate.refresh()
            answers = [client.post("/v1/completions", content=b"[" * 1000, headers=JSON) for _ in range(5)]
            assert [answer.status_code for answer in answers] == [400] * 3 + [429] * 2  # a mistake counts too
            assert int(answers[-1].headers["retry-after"]) >= 19
            assert client.get("/v1/models").status_code == 429 and refused == ["quota"] * 3

            gate.quotas.set(Quota("key", "*", Limits(concurrent=2, tokens_per_minute=1000)))
            gate.refresh()
            never = client.post("/v1/completions", json=ONE | {"n": 3})
            assert (never.status_code, never.json()["error"]["code"]) == (400, "quota_too_small")
            with gate.admit(gate.identify(f"Bearer {key.secret}"), "signs", 1, 2):
                busy = client.post("/v1/completions", json=ONE)
                assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
            assert services.store.stats().loads == 0

            whole = client.post("/v1/completions", json=ONE | {"n": 2, "max_tokens": 40, "ignore_eos": True})
            assert whole.json()["usage"]["completion_tokens"] == 2 * 3  # no more than the operator allows
            assert gate._meter._accounts["key", key.key.id].slots.running == {}
            many = client.post("/v1/completions", json=ONE | {"n": 9})
            assert (many.status_code, many.json()["error"]["param"]) == (400, "n")
    finally:
        gate.close()
        opened.close()
