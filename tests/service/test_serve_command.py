"""`deltakeeper serve` as a process: its notice, keys made beside it, a policy, signals, and what a kill leaves."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from service_cases import opened_services, served

from deltakeeper import cli
from deltakeeper.live_base import open_base
from deltakeeper.loopback import is_loopback
from deltakeeper.service.assembly import Plan, assembled
from deltakeeper.service.guard import guarded_routes
from deltakeeper.service.web.page import FILES

PROMPT = {"prompt": "w5 w6 w7", "max_tokens": 2, "temperature": 0}
COMMAND = (sys.executable, "-m", "deltakeeper")


class Process:
    """A service in a process of its own, and what it said."""

    def __init__(self, child, log):
        self.child, self.log = child, log

    @property
    def said(self):
        return self.log.read_text()

    def ready(self, seconds=60):
        end = time.monotonic() + seconds
        while (found := re.search(r" on (http://\S+)", self.said)) is None:
            assert self.child.poll() is None and time.monotonic() < end, self.said
            time.sleep(0.05)
        return found[1]


@contextmanager
def serving(folder, *arguments):
    log = folder / "log"
    command = (*COMMAND, "serve", "--base", folder / "base", "--deltas", folder / "deltas", "--port", "0")
    with log.open("wb") as out:
        child = subprocess.Popen([*map(str, command), *map(str, arguments)], stdout=out, stderr=out)
    try:
        yield Process(child, log)
    finally:
        child.kill()
        child.wait()


@pytest.fixture
def folder(service_folder, tmp_path):
    """A copy of the service that a test may change."""
    return Path(shutil.copytree(service_folder, tmp_path / "own"))


def client(url, key=None):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False)


def make_key(state, *arguments):
    command = (*COMMAND, "keys", "create", "--state", state, "--name", "test", *arguments)
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout.strip()


def test_a_service_is_open_until_the_first_key_whose_keys_outlive_a_kill_and_stops_in_order(folder):
    state = folder / "deltas" / ".deltakeeper" / "state.db"
    with serving(folder, "--kv-gib", "0.01") as process:
        url = process.ready()
        assert "Serving base and 2 tenants" in process.said and f"keys create --state {state}" in process.said
        with client(url) as anybody:
            assert anybody.post("/v1/completions", json=PROMPT | {"model": "signs"}).status_code == 200
            assert anybody.get("/admin/keys").json()["data"] == []
            assert anybody.get("/health", headers={"Host": "evil.example"}).status_code == 403
            key = make_key(state, "--model", "signs")
            end = time.monotonic() + 10
            while anybody.get("/v1/models").status_code != 401:
                assert time.monotonic() < end
        with client(url, key) as holder:
            assert [card["id"] for card in holder.get("/v1/models").json()["data"]] == ["signs"]
            assert holder.get("/admin/keys").status_code == 403
        process.child.kill()
        process.child.wait()
        assert key not in process.said
    with serving(folder, "--kv-gib", "0.01") as process:
        url = process.ready()
        assert "No key was made yet" not in process.said
        with client(url) as anybody, client(url, key) as holder:
            assert anybody.get("/v1/models").status_code == 401
            assert holder.post("/v1/completions", json=PROMPT | {"model": "signs"}).status_code == 200
            assert holder.post("/v1/completions", json=PROMPT | {"model": "ranks"}).status_code == 404
            asked = PROMPT | {"model": "signs", "max_tokens": 55, "stream": True, "ignore_eos": True}
            with holder.stream("POST", "/v1/completions", json=asked) as answer:
                process.child.send_signal(signal.SIGTERM)
                lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert process.child.wait(30) == 0


def test_a_policy_keeps_out_what_it_does_not_allow(folder):
    policy = folder / "policy.yaml"
    policy.write_text("codecs: [svd]\n")
    deltas = folder / "deltas"
    plan = Plan(deltas, folder / "state.db", folder / "decisions.jsonl", "base", policy=policy)
    with (
        assembled(open_base(folder / "base"), plan) as service,
        served(service.services, app=service.app) as live,
        live.client() as anybody,
    ):
        assert anybody.post("/v1/completions", json=PROMPT | {"model": "ranks"}).status_code == 200
        for _ in range(2):
            refused = anybody.post("/v1/completions", json=PROMPT | {"model": "signs"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (422, "not_admitted")
            assert str(folder) not in refused.text
        found = {entry["name"]: entry for entry in anybody.get("/admin/decisions").json()["data"]}
        assert found["signs"]["verdict"] == "refused" and "bitdelta" in found["signs"]["reasons"][0]
        assert found["ranks"]["verdict"] == "admitted"
        assert [card["id"] for card in anybody.get("/v1/models").json()["data"]] == ["base", "ranks"]
        ended = 'vllm:request_success_total{engine="0",finished_reason="length",model_name="base"} 1.0'
        assert ended in anybody.get("/metrics").text.splitlines()
        assert [card["id"] for card in anybody.get("/admin/deltas").json()["data"]] == ["ranks", "signs"]


def test_every_route_of_a_whole_service_is_closed_but_for_a_few(folder):
    """The walk over `app.routes`, with every router that the command line serves."""
    for public in (False, True):
        plan = Plan(folder / "deltas", folder / "state.db", folder / "log", "base", public_metrics=public)
        with assembled(open_base(folder / "base"), plan) as service:
            service.services.gate.keys.create("first", "admin")
            service.services.gate.refresh()
            kinds = {route.path: kind for route, kind in guarded_routes(service.app.routes)}
            asks = {path for path, kind in kinds.items() if kind == "ask"}
            opened = {path for path, kind in kinds.items() if kind == "public"}
            inference = {"/v1/completions", "/v1/chat/completions", "/tokenize"}
            assert asks == {"/v1/models", "/v1/models/{model:path}", *inference}
            about = {"/health", "/ready", "/ping", "/version", "/openapi.json", *FILES}
            assert opened == about | ({"/metrics"} if public else set())
            assert len(kinds) - len(asks) - len(opened) >= 8
            with served(service.services, app=service.app) as live, live.client() as anybody:
                for route, kind in guarded_routes(service.app.routes):
                    path = re.sub(r"\{[^}]*\}", "x", route.path)
                    codes = {anybody.request(method, path).status_code for method in route.methods}
                    assert (codes == {401}) == (kind != "public"), route.path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0"), "there is no key yet; make one with `deltakeeper keys create"),
        (("--host", "::"), "there is no key yet"),
        (("--deltas", "{folder}/none"), "there is no folder"),
        (("--name", "signs"), "give the base another with --name"),
        (("--policy", "{folder}/none.yaml"), "none.yaml"),
        (("--state", "mysql://a:secret@b/c"), "PostgreSQL"),
        (("--kv-gib", "-1"), "kv_bytes"),
        (("--lame-duck-seconds", "-1"), "lame_duck_seconds is -1.0; give 0 or more"),
    ],
)
def test_what_cannot_be_served_is_one_sentence_and_status_2(
    service_folder, tmp_path, monkeypatch, capsys, arguments, said
):
    state = ("--state", tmp_path / "state.db")
    given = [argument.format(folder=service_folder) for argument in arguments]
    command = ["deltakeeper", "serve", "--base", service_folder / "base", "--deltas", service_folder / "deltas", *state]
    monkeypatch.setattr("sys.argv", [*map(str, command), *given])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and said in err and "secret" not in err
    assert err.splitlines()[-1].startswith("deltakeeper: ")


def test_the_python_of_the_docs_runs(folder, capsys):
    page = (Path(__file__).parents[2] / "docs" / "service.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    shutil.copytree(folder / "deltas" / "signs", folder / "deltas" / "support")
    with opened_services(folder) as services, served(services) as live:
        names = {}
        exec(compile(code.replace("http://127.0.0.1:8000", live.url), "service.md", "exec"), names)
        names["client"].close()
    assert len(capsys.readouterr().out.split()) > 2


def test_help_has_an_example(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["deltakeeper", "serve", "--help"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code in (0, None) and "Example: deltakeeper serve" in capsys.readouterr().out


def test_only_addresses_of_this_machine_are_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "", "localhost.example", "127.0.0.1.example")))
