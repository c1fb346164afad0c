"""What asking costs others of a shared quota: nothing is kept for a request that nobody will make."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from unittest.mock import Mock

import pytest
from admission_parts import serving, write_judge
from service_cases import PROMPT, FakeGate, opened_services, served
from tenancy_cases import Clock

from deltakeeper.service.access import Principal
from deltakeeper.service.errors import TooManyRequests
from deltakeeper.service.tenancy.database import open_state
from deltakeeper.service.tenancy.gate import StateGate
from deltakeeper.service.tenancy.metering import Meter
from deltakeeper.service.tenancy.quotas import Limits, Quota

ONE = {"model": "signs", "prompt": PROMPT, "max_tokens": 1}


@contextmanager
def running(folder, place, limits):
    """A live service with two keys, and limits by scope and subject; time stands still for its quotas."""
    opened = open_state(place)
    gate = StateGate(opened, clock=Clock())
    secrets = [gate.keys.create(name, "tenant").secret for name in ("one", "two")]
    for (scope, subject), wanted in limits.items():
        gate.quotas.set(Quota(scope, subject, wanted))
    gate.refresh()
    try:
        with (
            opened_services(folder, gate=gate) as services,
            served(services) as live,
            live.client(secrets[0]) as one,
            live.client(secrets[1]) as two,
        ):
            yield live, one, two
    finally:
        gate.close()
        opened.close()


@contextmanager
def taken(live):
    """All slots of `signs` are taken by somebody else."""
    with live.services.gate.admit(Principal("key-other", "tenant"), "signs", 1, 2):
        yield


def statuses(client, *bodies):
    return [client.post("/v1/completions", json=body).status_code for body in bodies]


LIMITS = {("model", "signs"): Limits(concurrent=2)}


def test_to_make_tokens_takes_no_slot_and_keeps_none(service_folder, tmp_path):
    text = {"model": "signs", "prompt": PROMPT}
    with running(service_folder, tmp_path / "state.db", LIMITS) as (live, one, two):
        with taken(live):
            assert one.post("/tokenize", json=text).status_code == 200  # it needs no slot
        slots = live.services.gate._meter._accounts["model", "signs"].slots
        slots._ended.clear()
        assert one.post("/tokenize", json=text).status_code == 200
        assert not slots._claims and not slots._ended and not slots.running
        assert statuses(two, ONE | {"n": 2}) == [200]


@pytest.mark.parametrize("bad", [{"prompt": [10**6]}, {"prompt": "w5 " * 500}])
def test_a_request_that_is_refused_after_the_quota_let_it_through_keeps_no_place(service_folder, tmp_path, bad):
    with running(service_folder, tmp_path / "state.db", LIMITS) as (live, one, two):
        with taken(live):
            assert statuses(one, ONE | bad) == [429]  # nobody has read it yet
        assert statuses(two, ONE | {"n": 2}) == [429]  # and it would be next
        assert statuses(one, ONE | bad) == [400]
        live.services.gate._meter._accounts["model", "signs"].slots._ended.clear()
        assert statuses(two, ONE | {"n": 2}) == [200]


def test_who_is_refused_for_want_of_a_slot_stands_in_the_line_wherever_that_was_found():
    meter = Meter(Clock())
    meter.set_limits({("model", "a"): Limits(concurrent=1)})
    with meter.admit("flood", "a", 1):
        with pytest.raises(TooManyRequests):
            meter.check("checked", "a", 1, 1)
        with pytest.raises(TooManyRequests):
            meter.admit("admitted", "a", 1)
    for refused in ("flood", "admitted"):
        with pytest.raises(TooManyRequests):
            meter.check(refused, "a", 1, 1)
    meter.check("checked", "a", 1, 1)  # it is let through, and nobody else until it is in
    with pytest.raises(TooManyRequests):
        meter.admit("flood", "a", 1)
    with meter.admit("checked", "a", 1):
        pass
    with meter.admit("admitted", "a", 1):
        pass


def test_to_make_tokens_is_a_request_of_the_model_and_to_list_models_one_of_the_key(service_folder, tmp_path):
    limits = {("model", "signs"): Limits(requests_per_minute=2), ("key", "*"): Limits(requests_per_minute=4)}
    with running(service_folder, tmp_path / "state.db", limits) as (_, one, two):
        text = {"model": "signs", "prompt": PROMPT}
        assert [one.post("/tokenize", json=text).status_code for _ in range(3)] == [200, 200, 429]
        assert statuses(two, ONE) == [429]
        assert [one.get(path).status_code for path in ("/v1/models", "/v1/models/base")] == [200, 429]


def test_no_tokens_are_made_for_a_delta_before_its_canary_has_passed(world, here, monkeypatch):
    write_judge(here, "w0")
    rules = {"refusals_at_least": 0.0, "broken_at_most": 1.0}
    with serving(world, here, canary=rules) as parts:
        canary = parts.admission._trials.canary
        real, go_on, begun = canary.measure, threading.Event(), threading.Event()

        def held_up(tenant, tokenizer=None):
            begun.set()
            assert go_on.wait(30)
            return real(tenant, tokenizer)

        monkeypatch.setattr(canary, "measure", held_up)
        answers = []

        def ask():
            answers.append(parts.client.post("/tokenize", json={"model": "signs", "prompt": PROMPT}))

        asking = threading.Thread(target=ask)
        asking.start()
        assert begun.wait(30)
        asking.join(0.3)
        assert not answers  # it waits, as an answer would
        go_on.set()
        asking.join(30)
        assert answers[0].status_code == 200 and parts.admission.known("signs").verdict == "admitted"
    (here / "log.jsonl").unlink()
    with serving(world, here, canary=rules | {"refusals_at_least": 1.0}) as parts:
        refused = parts.client.post("/tokenize", json={"model": "signs", "prompt": PROMPT})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "not_admitted")


def test_what_is_not_taken_is_counted_once_by_its_reason(service_folder):
    told, base = [], ONE | {"model": "base"}
    observer = Mock(rejected=told.append)
    gate = FakeGate(most=3)
    with (
        opened_services(service_folder, gate=gate, metrics=observer, engine={"max_waiting": 2}) as services,
        served(services) as live,
        live.client() as client,
    ):
        step, go = services.engine._core.step, threading.Event()
        services.engine._core.step = lambda: go.wait(30) and step()
        assert statuses(client, base | {"n": 3}) == [503] and told == ["queue_full"]
        go.set()
        assert statuses(client, base | {"n": 4}) == [429] and told[1:] == ["quota"]
        services.drain.begin()
        tokens = client.post("/tokenize", json={"model": "signs", "prompt": PROMPT})
        assert statuses(client, base) == [503] and tokens.status_code == 503 and told[2:] == ["draining"] * 2
