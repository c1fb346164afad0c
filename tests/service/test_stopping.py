"""The end of a service: a drain, a load balancer that has to notice, signals, and an engine that dies."""

from __future__ import annotations

import json
import signal
import time

import pytest
from service_cases import LONG, held, own, wait_until


def test_a_drain_refuses_new_requests_and_lets_streams_finish(service_folder):
    with own(service_folder) as live, live.client() as client, held(live.services) as go:
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
            assert answer.status_code == 200
            live.server.drain()
            with live.client() as other:
                assert other.get("/ready").status_code == 503 and other.get("/health").status_code == 200
                refused = other.post("/v1/completions", json=LONG)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
                assert refused.headers["retry-after"]
            go.set()
            lines = [line for line in answer.iter_lines() if line]
            assert lines[-1] == "data: [DONE]" and "length" in lines[-2]
        wait_until(lambda: live.server.should_exit)


def test_requests_are_taken_for_a_while_after_readiness_is_off(service_folder):
    with own(service_folder, lame_duck_seconds=60.0) as live, live.client() as client:
        live.server.handle_exit(signal.SIGTERM, None)
        assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
        assert client.post("/v1/completions", json=LONG | {"max_tokens": 2}).status_code == 200
        assert not live.services.drain.begun and not live.server.should_exit


def test_after_that_while_the_service_drains(service_folder):
    with own(service_folder, lame_duck_seconds=0.2) as live:
        live.server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: live.server.should_exit)
        assert live.services.drain.begun and not live.server.force_exit


@pytest.mark.parametrize(("signals", "forced"), [((signal.SIGINT,), False), ((signal.SIGTERM, signal.SIGTERM), True)])
def test_somebody_at_a_terminal_and_a_second_signal_do_not_wait_for_a_load_balancer(service_folder, signals, forced):
    with own(service_folder, lame_duck_seconds=60.0) as live:
        for number in signals:
            live.server.handle_exit(number, None)
        wait_until(lambda: live.server.should_exit, 10)
        assert live.server.force_exit == forced


def test_a_drain_that_takes_too_long_ends_streams_with_an_error(service_folder):
    with (
        own(service_folder, drain_seconds=0.1) as live,
        live.client() as client,
        held(live.services) as go,
        client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer,
    ):
        live.server.drain()
        time.sleep(0.3)
        go.set()
        last = [line for line in answer.iter_lines() if line][-1]
        assert json.loads(last[6:])["error"]["code"] == "stopped"


def test_a_second_signal_does_not_wait_for_streams(service_folder):
    with (
        own(service_folder) as live,
        live.client() as client,
        held(live.services),
        client.stream("POST", "/v1/completions", json=LONG | {"stream": True}),
    ):
        live.server.handle_exit(signal.SIGTERM, None)
        assert live.services.drain.begun and not live.server.should_exit
        live.server.handle_exit(signal.SIGTERM, None)
        assert live.server.should_exit and live.server.force_exit


def test_an_engine_that_dies_is_said_to_all_and_to_health(service_folder):
    with own(service_folder) as live, live.client() as client:
        core = live.services.engine._core

        def fail():
            raise RuntimeError("a secret path")

        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
            core.step = fail
            text = "".join(answer.iter_text())
        if "[DONE]" not in text:  # it had not ended before
            assert json.loads(text.strip().split("\n\n")[-1][6:])["error"]["type"] == "ServiceUnavailableError"
        live.services.engine._woken.set()
        wait_until(lambda: not live.services.engine.alive)
        assert client.get("/health").status_code == client.get("/ready").status_code == 503
        refused = client.post("/v1/completions", json=LONG)
        assert refused.status_code == 503 and "secret" not in refused.text + text
