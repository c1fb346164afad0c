"""Streams on the wire: frames, silence, quotas, and clients that go."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import threading
import time

import pytest
import torch
from service_cases import LONG, FakeGate, SilentObserver, held, opened_services, own, served, wait_until

from deltakeeper.errors import TenantError
from deltakeeper.service.access import Principal
from deltakeeper.service.openai import call
from deltakeeper.service.tenants import Model
from deltakeeper.service.texts import Words


@pytest.fixture(scope="module")
def shared(service_folder):
    with opened_services(service_folder) as services, served(services) as live:
        yield live


def test_frames_are_what_clients_split_at(shared):
    with shared.client() as client:
        for path, asked in (
            ("/v1/completions", LONG),
            ("/v1/chat/completions", {"model": "signs", "messages": [{"role": "user", "content": "w3"}]}),
        ):
            asked = asked | {"stream": True, "max_tokens": 5, "stream_options": {"include_usage": True}}
            answer = client.post(path, json=asked)
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers["cache-control"] == "no-store"
            frames = answer.text.split("\n\n")
            assert frames[-2:] == ["data: [DONE]", ""]
            chunks = [json.loads(re.fullmatch(r"data: (.*)", frame)[1]) for frame in frames[:-2]]
            assert all(set(c) == {"id", "object", "created", "model", "choices", "usage"} for c in chunks)
            assert [bool(c["choices"]) for c in chunks] == [True] * (len(chunks) - 1) + [False]
            reasons = [c["choices"][0]["finish_reason"] for c in chunks[:-1]]
            assert reasons[-1] in ("length", "stop") and set(reasons[:-1]) <= {None}


def test_usage_in_every_chunk_counts_up(shared):
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "logprobs": 0}
    with shared.client() as client:
        text = client.post("/v1/completions", json=LONG | {"stream": True, "max_tokens": 6} | options).text
    chunks = [json.loads(frame[6:]) for frame in text.split("\n\n")[:-2]]
    fresh = [len(choice["logprobs"]["tokens"]) for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    # a chunk carries as many tokens as have come by then, so that only their sums are sure
    assert counts[: len(fresh)] == list(itertools.accumulate(fresh)) and counts[-1] == 6


def test_a_silent_stream_says_that_it_lives(service_folder):
    with (
        own(service_folder, keep_alive_seconds=0.05) as live,
        live.client() as client,
        held(live.services) as go,
        client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer,
    ):
        lines = answer.iter_lines()
        assert next(line for line in lines if line) == ": still at work"
        go.set()
        assert [line for line in lines if line][-1] == "data: [DONE]"


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_goes_ends_its_answers_and_gives_its_places_back(service_folder, streaming):
    gate = FakeGate()
    with own(service_folder, gate=gate) as live, held(live.services) as go:
        engine = live.services.engine
        with live.client() as client:
            if streaming:
                with client.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": 2}) as answer:
                    assert answer.status_code == 200
            else:
                with pytest.raises(Exception, match="timed out"):
                    client.post("/v1/completions", json=LONG | {"n": 2}, timeout=0.3)
        go.set()
        wait_until(lambda: engine.stats().finished.get("cancelled") == 2)
        wait_until(lambda: [(one.answers, one.closed) for one in gate.admitted] == [(2, True)])
        assert engine.stats().kv_blocks_used == 0


def test_quotas_are_charged_at_once_and_by_token_and_refused_with_a_time(service_folder):
    gate = FakeGate({"k": Principal("k", "tenant")}, most=3)
    with own(service_folder, gate=gate) as live, live.client("k") as client:
        assert client.post("/v1/completions", json=LONG | {"n": 2, "max_tokens": 3}).status_code == 200
        assert [(one.prompt_tokens, one.answers, one.tokens, one.closed) for one in gate.admitted] == [(4, 2, 6, True)]
        refused = client.post("/v1/completions", json=LONG | {"n": 4})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")
        assert refused.json()["error"]["type"] == "RateLimitError"
        assert all(one.closed for one in gate.admitted) and live.services.engine.stats().waiting == 0


def test_the_time_to_the_first_token_counts_the_wait_for_a_cold_tenant(service_folder):
    told = []

    class Observer(SilentObserver):
        def first_token(self, model, seconds):
            told.append((model, seconds))

        def rejected(self, reason):
            told.append(reason)

    with opened_services(service_folder, metrics=Observer()) as services, served(services) as live:
        acquire, began = services.store.acquire, time.monotonic()

        def cold(name):
            return acquire(name) if time.monotonic() - began > 1 else None

        services.store.load("signs").result(30)
        services.store.acquire = cold  # what the service asks for first
        with live.client() as client:
            client.post("/v1/completions", json=LONG | {"model": "signs", "max_tokens": 3})
        ((model, seconds),) = told
        assert model == "signs" and seconds > 0.3


def test_metrics_hear_of_first_tokens_while_answers_run_and_of_a_prompt_when_all_its_answers_have_ended(service_folder):
    told = []

    class Observer(SilentObserver):
        def answered(self, model, stream, tokens):
            told.append(("answered", tokens))

        def first_token(self, model, seconds):
            told.append(("first", model))

        def prompt_done(self, tokens, allowed):
            told.append(("prompt", tokens, allowed))

    with (
        opened_services(service_folder, metrics=Observer()) as services,
        served(services) as live,
        live.client() as client,
    ):
        step, go = services.engine._core.step, threading.Event()

        def wait_once_it_is_told():
            time.sleep(0.01)
            return step() if not told or go.wait(30) else None

        services.engine._core.step = wait_once_it_is_told
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
            next(line for line in answer.iter_lines() if line)
            wait_until(lambda: told)
            assert told == [("first", "base")]  # it is still running
            go.set()
        wait_until(lambda: len(told) == 3)
        services.engine._core.step = step
        assert told[1][0] == "answered" and told[2] == ("prompt", [told[1][1]], LONG["max_tokens"])
        told.clear()
        body = LONG | {"prompt": [[5, 6], [7, 8]], "n": 2, "temperature": 1, "max_tokens": 3}
        assert client.post("/v1/completions", json=body).status_code == 200
        wait_until(lambda: len(told) == 10)
        assert sorted(told[:4]) == [("first", "base")] * 4 and told[-2:] == [("prompt", [3, 3], 3)] * 2
        told.clear()
        rated = client.post("/v1/completions", json=LONG | {"echo": True, "logprobs": 1, "max_tokens": 0})
        assert rated.status_code == 200
        wait_until(lambda: len(told) == 3)
        assert told[-1] == ("prompt", [0], 0)


def test_a_full_engine_is_503_and_says_when(service_folder):
    gate = FakeGate()
    with own(service_folder, gate=gate, engine={"max_waiting": 2}) as live, held(live.services) as go:
        with live.client() as client:
            full = client.post("/v1/completions", json=LONG | {"n": 3})
            assert (full.status_code, full.json()["error"]["code"]) == (503, "queue_full")
            assert int(full.headers["retry-after"]) >= 1
        go.set()
        wait_until(lambda: not live.services.engine._unfinished)
        assert all(one.closed for one in gate.admitted)


def test_requests_of_different_keys_share_no_blocks(service_folder):
    gate = FakeGate({name: Principal(name, "tenant") for name in ("a", "b")})
    asked = LONG | {"prompt": [5] * 40, "max_tokens": 2}
    with own(service_folder, gate=gate) as live:
        cached = []
        for key in ("a", "a", "b"):
            with live.client(key) as client:
                usage = client.post("/v1/completions", json=asked).json()["usage"]
                cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == cached[2] == 0 and cached[1] >= 32


def test_a_tenant_whose_files_were_altered_is_422_without_a_word_on_paths(service_folder, tmp_path):
    shutil.copytree(service_folder, tmp_path / "own")
    (payload,) = (tmp_path / "own" / "deltas" / "signs").glob("*.safetensors")
    raw = bytearray(payload.read_bytes())
    raw[-1] ^= 1
    payload.write_bytes(raw)
    with own(tmp_path / "own") as live, live.client() as client:
        for _ in range(2):
            answer = client.post("/v1/completions", json=LONG | {"model": "signs"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "model_unusable")
            assert str(tmp_path) not in answer.text and "retry-after" not in answer.headers
        assert client.post("/v1/completions", json=LONG | {"model": "ranks"}).status_code == 200


@pytest.mark.parametrize(("change", "status"), [("remove", 404), ("unload", 503)])
def test_a_tenant_that_goes_while_a_request_waits_is_no_failure_of_the_service(service_folder, change, status):
    with own(service_folder) as live, held(live.services) as go:
        store, answers = live.services.store, []
        text = live.services.base.tokenizer

        async def found(services, texts, principal, name):
            return Model(name, name, Words(text))  # as if it had been loaded a moment ago

        def ask():
            with live.client() as client:
                answers.append(client.post("/v1/completions", json=LONG | {"model": "signs"}))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(call, "find_model", found)
            thread = threading.Thread(target=ask)
            thread.start()
            wait_until(lambda: live.services.engine.stats().waiting == 1)
            store.acquire = lambda name: (_ for _ in ()).throw(TenantError("a secret path"))
            if change == "remove":
                store.remove("signs")
            go.set()
            thread.join(30)
        assert answers[0].status_code == status and "secret" not in answers[0].text


def test_a_model_whose_logits_are_not_numbers_is_a_failure_that_is_logged(service_folder, caplog):
    with own(service_folder) as live, live.client() as client:
        with torch.no_grad():
            live.services.base.model.lm_head.weight.fill_(float("nan"))
        answer = client.post("/v1/completions", json=LONG, headers={"X-Request-Id": "mine"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "InternalServerError")
        assert "request mine: an answer of base broke off" in caplog.text and "not numbers" in caplog.text
        last = client.post("/v1/completions", json=LONG | {"stream": True}).text.split("\n\n")[-2]
        assert json.loads(last[6:])["error"] == answer.json()["error"]
        assert "not numbers" not in answer.text


def test_a_tenant_whose_folder_comes_later_is_found_by_its_name(service_folder, tmp_path):
    shutil.copytree(service_folder, tmp_path / "own")
    deltas = tmp_path / "own" / "deltas"
    outside = tmp_path / "outside"
    shutil.copytree(deltas / "signs", outside)
    with own(tmp_path / "own") as live, live.client() as client:
        asked = LONG | {"max_tokens": 2}
        assert client.post("/v1/completions", json=asked | {"model": "later"}).status_code == 404
        shutil.copytree(deltas / "signs", deltas / "later")
        (deltas / "linked").symlink_to(outside)
        texts = [client.post("/v1/completions", json=asked | {"model": name}) for name in ("later", "signs")]
        assert texts[0].json()["choices"] == texts[1].json()["choices"]
        for name in ("linked", "../outside", ".", "..", "later/", "x" * 200):
            assert client.post("/v1/completions", json=asked | {"model": name}).status_code == 404


def test_a_template_that_never_ends_holds_up_its_own_tenant_alone(service_folder, tmp_path):
    shutil.copytree(service_folder, tmp_path / "own")
    with own(tmp_path / "own", encode_seconds=1.0) as live, live.client() as client:
        chat = {"model": "signs", "messages": [{"role": "user", "content": "w1"}], "max_tokens": 2}
        assert client.post("/v1/chat/completions", json=chat).status_code == 200
        (task,) = live.server.config.app.state.texts._kept.values()
        let_go, codes, hung = threading.Event(), [], []

        def hang(turns):
            hung.append(turns)
            let_go.wait(20)

        task.result().encode_chat = hang

        def ask():
            with live.client() as other:
                codes.append(other.post("/v1/chat/completions", json=chat).status_code)

        asking = [threading.Thread(target=ask) for _ in range(40)]
        for thread in asking:
            thread.start()
        began = time.monotonic()
        for model in ("base", "ranks"):
            assert client.post("/v1/chat/completions", json=chat | {"model": model}).status_code == 200
        assert time.monotonic() - began < 10
        for thread in asking:
            thread.join()
        assert codes == [503] * 40 and len(hung) == 1
        ask()
        assert codes[-1] == 503 and len(hung) == 1
        let_go.set()
