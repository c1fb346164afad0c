"""How requests end that cannot be answered to the end, and what is kept and told of them then."""

from __future__ import annotations

import json
import logging
import shutil
import threading

import pytest
import torch
from admission_parts import serving
from service_cases import PROMPT, own, wait_until

from deltakeeper.errors import TenantError
from deltakeeper.service.admission import decisions
from deltakeeper.service.openai import call, completions
from deltakeeper.service.repeats import Repeats
from deltakeeper.service.tenants import find_model

ONE = {"model": "signs", "prompt": PROMPT, "max_tokens": 3, "ignore_eos": True}


def test_what_nobody_foresaw_in_a_stream_is_a_failure_of_the_service(service_folder, monkeypatch):
    async def chunks(*_):
        raise RuntimeError("a secret path")
        yield

    monkeypatch.setattr(completions, "_chunks", chunks)
    with own(service_folder) as live, live.client() as client:
        last = client.post("/v1/completions", json=ONE | {"stream": True}).text.split("\n\n")[-2]
    assert json.loads(last[6:])["error"]["type"] == "InternalServerError" and "secret" not in last


def test_who_is_stopped_is_told_when_to_come_back(service_folder):
    with own(service_folder, drain_seconds=0.1) as live:
        step, go, answers = live.services.engine._core.step, threading.Event(), []
        live.services.engine._core.step = lambda: go.wait(30) and step()

        def ask():
            with live.client() as client:
                answers.append(client.post("/v1/completions", json=ONE | {"model": "base"}))

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: live.services.engine._unfinished)
        live.server.drain()
        asking.join(0.5)
        go.set()
        asking.join(30)
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "stopped")
        assert answers[0].headers["retry-after"] == "1"


def test_a_tenant_that_is_removed_before_the_engine_hears_of_it_is_404(service_folder, monkeypatch):
    with own(service_folder) as live, live.client() as client:

        async def found(services, *arguments):
            model = await find_model(services, *arguments)
            services.store.remove("signs")
            return model

        def submit(request, wake):  # as the engine of a cluster does
            raise TenantError("There is no tenant 'signs'.")

        monkeypatch.setattr(call, "find_model", found)
        monkeypatch.setattr(live.services.engine, "submit", submit)
        answer = client.post("/v1/completions", json=ONE)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_a_decision_that_cannot_be_written_is_told_and_not_made(world, here, monkeypatch):
    def full(file, data):
        raise OSError(28, "No space left on device")

    with serving(world, here, codecs=["svd"]) as parts:
        with monkeypatch.context() as patch:
            patch.setattr(decisions, "_write_all", full)
            answer = parts.client.put("/admin/deltas/new", json={"path": "signs"})
            assert answer.status_code == 503 and "No space left" in answer.json()["error"]["message"]
            assert answer.headers["retry-after"] and str(here) not in answer.text
        assert parts.admission.history() == [] and not (here / "deltas" / "new").exists()
        assert parts.client.put("/admin/deltas/new", json={"path": "signs"}).status_code == 422


def test_a_fault_of_every_request_is_told_once_and_then_counted(service_folder, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "deltakeeper.service")
    with own(service_folder) as live, live.client() as client:
        with torch.no_grad():
            live.services.base.model.lm_head.weight.fill_(float("nan"))
        for stream in (False, True):
            for number in range(3):
                asked = ONE | {"model": "base", "stream": stream}
                client.post("/v1/completions", json=asked, headers={"X-Request-Id": f"mine-{stream}-{number}"})
        lines = [record for record in caplog.records if "broke off" in record.getMessage()]
        assert {f"mine-True-{n}" in record.getMessage() for record in lines for n in range(3)} == {False, True}
        assert [record.levelname for record in lines if record.levelno > logging.INFO] == ["ERROR", "WARNING"]
        assert len(lines) == 9  # by its id, which the client was told, each is found


def test_what_is_counted_is_told_with_the_next_line():
    now, told = [0.0], []

    class Log:
        def log(self, level, text, *arguments):
            told.append((logging.getLevelName(level), text % arguments))

    repeats = Repeats(60.0, lambda: now[0])
    for at, model, why in ((0, "a", "x"), (1, "a", "x"), (2, "b", "x"), (3, "a", "y"), (59, "a", "x"), (61, "a", "x")):
        now[0] = at
        repeats.log(Log(), logging.WARNING, model, why, "%s: %s", model, why)
    now[0] = 200
    repeats.log(Log(), logging.WARNING, "a", "x", "%s: %s", "a", "x")
    assert told == [
        ("WARNING", "a: x"),
        ("INFO", "a: x"),
        ("WARNING", "b: x"),
        ("WARNING", "a: y"),
        ("INFO", "a: x"),
        ("WARNING", "a: x (and 2 times since this was last told)"),
        ("WARNING", "a: x"),
    ]
    for number in range(5000):
        repeats.log(Log(), logging.WARNING, "a", f"{number}", "%s", number)
    assert len(repeats._told) <= 1024


@pytest.mark.parametrize("change", ["remove", "unload"])
def test_the_words_of_a_tenant_go_with_it(service_folder, tmp_path, change):
    shutil.copytree(service_folder, tmp_path / "own")
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 1}
    with own(tmp_path / "own") as live, live.client() as client:
        for model in ("signs", "ranks"):
            assert client.post("/v1/chat/completions", json=chat | {"model": model}).status_code == 200
        kept = live.server.config.app.state.texts._kept
        assert len(kept) == 2
        getattr(live.services.store, change)("signs")
        wait_until(lambda: len(kept) == 1)
        again = client.post("/v1/chat/completions", json=chat | {"model": "signs"})  # which finds its folder anew
        assert again.status_code == 200 and len(kept) == 2
