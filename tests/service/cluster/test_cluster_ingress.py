"""The whole service over two replicas in this process: answers, admin routes, policy, the line, losses, drain."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import time
from contextlib import suppress

import httpx
import openai
import pytest
import yaml
from admission_parts import write_judge, write_policy
from cluster_cases import TENANTS, answers_of_one, clustered_here, make_plan
from service_cases import PROMPT, served, wait_until

from deltakeeper.artifact import MANIFEST_NAME, open_artifact
from deltakeeper.engine.tenant_files import payload_bytes
from deltakeeper.errors import EngineError, OversizedError, SideFileError, UnreadableError, is_lasting
from deltakeeper.service.admission.decisions import read_log
from deltakeeper.service.cluster.failures import ReplicaLostError, error_of, failure_of
from deltakeeper.service.errors import Unavailable
from deltakeeper.testing import write_tokenizer

ASKED = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
DRAWN = {"prompt": [PROMPT, "w9 w10"], "n": 2, "seed": 5, "max_tokens": 10, "temperature": 1.5}
LONG = {"prompt": PROMPT, "max_tokens": 1500, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def expected(cluster_folder):
    """What the service on one machine answers."""
    return answers_of_one(cluster_folder, ASKED, DRAWN)


@pytest.fixture(scope="module")
def live(cluster_folder, tmp_path_factory):
    """A service that tests only ask."""
    plan = make_plan(cluster_folder, tmp_path_factory.mktemp("state"))
    with clustered_here(plan, cluster_folder) as (service, _), served(service.services, app=service.app) as running:
        yield running


@pytest.fixture
def own(cluster_folder, tmp_path):
    """A copy of the folder that a test may change."""
    shutil.copytree(cluster_folder / "deltas", tmp_path / "deltas")
    (tmp_path / "base").symlink_to(cluster_folder / "base")
    return tmp_path


def test_answers_are_those_of_the_service_on_one_machine(live, expected):
    with live.client() as c:
        for (model, at), choices in expected.items():
            found = c.post("/v1/completions", json=(ASKED, DRAWN)[at] | {"model": model})
            assert (found.status_code, found.json()["choices"]) == (200, choices)
    assert expected["signs", 0] != expected["base", 0]


def test_the_client_streams_chats_and_rates_prompts(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as client:
        chat = {"model": "t1", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8, "temperature": 0}
        whole = client.chat.completions.create(**chat)
        chunks = list(client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        rated = client.completions.create(model="signs", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
        assert [value is None for value in rated.choices[0].logprobs.token_logprobs] == [True, False, False, False]
        cards = {card.id: card for card in client.models.list()}
        assert set(cards) == {"base", *TENANTS}
        wait_until(lambda: len(client.models.retrieve("t1").root) == 64)  # with the replica's next report
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="nobody", prompt=PROMPT)


def test_each_tenant_is_on_one_replica_whose_bytes_are_accounted(live):
    with live.client() as c, concurrent.futures.ThreadPoolExecutor(12) as pool:
        asked = [ASKED | {"model": name} for name in TENANTS * 4]
        assert {a.status_code for a in pool.map(lambda one: c.post("/v1/completions", json=one), asked)} == {200}

        def settled():
            held = [name for card in c.get("/admin/replicas").json()["data"] for name in card["deltas"]]
            return sorted(held) == sorted(TENANTS)

        wait_until(settled)
        cards = c.get("/admin/replicas").json()["data"]
        deltas = c.get("/admin/deltas").json()
        assert sum(sum(card["deltas"].values()) for card in cards) == deltas["resident_bytes"] > 0
        assert deltas["byte_budget"] == 2 << 24 and {one["state"] for one in deltas["data"]} == {"resident"}
        text = c.get("/metrics").text
        assert "deltakeeper_cluster_replicas 2.0" in text and f"{float(deltas['resident_bytes'])}" in text
        assert c.get("/admin/status").json()["engine"]["kv_blocks"] > 0


def test_a_client_that_goes_ends_its_answer_on_the_replica(live):
    with live.client() as c:
        before = live.services.engine.stats().finished.get("cancelled", 0)
        with c.stream("POST", "/v1/completions", json=LONG | {"model": "t0", "stream": True}) as answer:
            next(answer.iter_lines())
        wait_until(lambda: live.services.engine.stats().finished.get("cancelled", 0) == before + 1)
        assert live.services.engine.open == 0


def test_deltas_come_are_turned_over_unloaded_and_go(own):
    with (
        clustered_here(make_plan(own, own), own) as (service, replicas),
        served(service.services, app=service.app) as live,
        live.client() as c,
    ):

        def text(model):
            return c.post("/v1/completions", json=ASKED | {"model": model}).json()["choices"][0]["text"]

        signs, ranks = text("signs"), text("ranks")
        assert signs != ranks
        put = c.put("/admin/deltas/more", json={"path": "signs"})
        assert (put.status_code, put.json()["artifact"]["folder"]) == (201, "signs") and text("more") == signs
        turned = c.put("/admin/deltas/more", json={"path": "ranks", "replace": True})
        assert turned.status_code == 200 and text("more") == ranks
        assert c.post("/v1/unload_lora_adapter", json={"lora_name": "more"}).status_code == 200
        assert c.post("/v1/completions", json=ASKED | {"model": "more"}).status_code == 404
        wait_until(lambda: not any("more" in r.report().store.tenants for r in replicas.alive.values()))
        assert c.put("/admin/deltas/more", json={"path": "ranks"}).status_code == 201 and text("more") == ranks
        (own / "deltas" / "broken").mkdir()
        (own / "deltas" / "broken" / MANIFEST_NAME).write_text("{}")
        assert c.put("/admin/deltas/broken").status_code == 422
        assert c.delete("/admin/deltas/more").status_code == 200
        assert c.post("/v1/completions", json=ASKED | {"model": "more"}).status_code == 404
        wait_until(lambda: not any("more" in r.report().store.tenants for r in replicas.alive.values()))
        weights = next((own / "deltas" / "t3").glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-8])
        spoiled = c.post("/v1/completions", json=ASKED | {"model": "t3"})
        assert (spoiled.status_code, spoiled.json()["error"]["code"]) == (422, "model_unusable")


def test_a_policy_is_kept_by_replicas_and_its_decisions_are_gathered(own):
    policy = own / "policy.yaml"
    policy.write_text(yaml.safe_dump({"codecs": ["svd"]}))
    with (
        clustered_here(make_plan(own, own, policy=policy), own) as (service, _),
        served(service.services, app=service.app) as live,
        live.client() as c,
    ):
        assert c.post("/v1/completions", json=ASKED | {"model": "ranks"}).status_code == 200
        for _ in range(2):
            refused = c.post("/v1/completions", json=ASKED | {"model": "signs"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (422, "not_admitted")
        put = c.put("/admin/deltas/also", json={"path": "signs"})
        assert put.status_code == 422 and "bitdelta" in put.json()["error"]["message"]
        found = {entry["name"]: entry for entry in c.get("/admin/decisions").json()["data"]}
        assert {name: entry["verdict"] for name, entry in found.items()} == {
            "ranks": "admitted",
            "signs": "refused",
            "also": "refused",
        }
        assert "signs" not in [card["id"] for card in c.get("/v1/models").json()["data"]]
        assert 'deltakeeper_admission_decisions_total{verdict="refused"} 2.0' in c.get("/metrics").text
    logged = [read_log(path) for path in sorted((own / "decisions.replicas").iterdir())]
    assert len(logged) == 2 and sum(map(len, logged)) == len(read_log(own / "decisions.jsonl")) == 3


@pytest.mark.parametrize("rules", [None, {}])
def test_words_that_cannot_be_used_keep_a_delta_out_for_good(own, rules):
    (own / "deltas" / "signs" / "tokenizer.json").write_text("{")
    policy = None if rules is None else write_policy(own, **rules)
    with (
        clustered_here(make_plan(own, own, policy=policy), own) as (service, _),
        served(service.services, app=service.app) as live,
        live.client() as c,
    ):
        code = "model_unusable" if rules is None else "not_admitted"
        for _ in range(2):
            asked = c.post("/v1/completions", json=ASKED | {"model": "signs"})
            assert (asked.status_code, asked.json()["error"]["code"]) == (422, code)
            assert "retry-after" not in asked.headers and str(own) not in asked.text
        wait_until(lambda: c.get("/admin/deltas/signs").json()["unusable"])
        assert "the tokenizer in" in c.get("/admin/deltas/signs").json()["reason"]
        assert "signs" not in [card["id"] for card in c.get("/v1/models").json()["data"]]
        found = [(e["name"], e["verdict"]) for e in c.get("/admin/decisions").json()["data"]]
        assert found == ([] if rules is None else [("signs", "refused")])
        assert c.put("/admin/deltas/signs").status_code == 422
        worse = c.put("/admin/deltas/t1", json={"path": "signs", "replace": True})
        assert worse.status_code == 422
        assert c.post("/v1/completions", json=ASKED | {"model": "t1"}).status_code == 200


@pytest.mark.parametrize("rules", [None, {}])
def test_what_a_node_could_not_do_is_tried_again(own, rules, monkeypatch):
    from transformers import AutoTokenizer

    write_tokenizer(own / "deltas" / "signs")
    policy = None if rules is None else write_policy(own, **rules)
    with (
        clustered_here(make_plan(own, own, policy=policy), own) as (service, _),
        served(service.services, app=service.app) as live,
        live.client() as c,
    ):
        with monkeypatch.context() as patch:

            def fail(*_, **__):
                raise MemoryError

            patch.setattr(AutoTokenizer, "from_pretrained", fail)
            asked = c.post("/v1/completions", json=ASKED | {"model": "signs"})
            assert (asked.status_code, asked.json()["error"]["code"]) == (503, "model_not_loaded")
            assert int(asked.headers["retry-after"]) >= 1
            assert c.put("/admin/deltas/signs").status_code == 503
        assert c.get("/admin/decisions").json()["data"] == []
        wait_until(lambda: c.post("/v1/completions", json=ASKED | {"model": "signs"}).status_code == 200)


def test_errors_are_the_same_at_the_other_end():
    for error in (SideFileError("a."), OversizedError("b."), UnreadableError("c."), Unavailable("d.", retry_after=7.0)):
        found = error_of(failure_of(error))
        assert (type(found), str(found), is_lasting(found)) == (type(error), str(error), is_lasting(error))
        assert getattr(found, "retry_after", None) == getattr(error, "retry_after", None)
    assert type(error_of(failure_of(ReplicaLostError("e.")))) is EngineError


@pytest.mark.parametrize("policy", [None, {"codecs": ["svd", "bitdelta"]}])
def test_a_delta_has_to_fit_one_replica_however_many_there_are(own, policy):
    if policy is not None:
        (own / "policy.yaml").write_text(yaml.safe_dump(policy))
        policy = own / "policy.yaml"
    sizes = sorted(payload_bytes(open_artifact(own / "deltas" / name), None) for name in ("signs", "ranks"))
    most = sizes[0] + 1  # its headers let the smaller one in, and its norms count twice once it is loaded
    assert most < sizes[1] < 2 * most
    with (
        clustered_here(make_plan(own, own, policy=policy, delta_bytes=most), own) as (service, _),
        served(service.services, app=service.app) as live,
        live.client() as c,
    ):
        put = [c.put("/admin/deltas/new", json={"path": name}) for name in ("signs", "ranks")]
        said = [refused.json()["error"]["message"] for refused in put]
        assert [refused.status_code for refused in put] == [413, 413]
        assert [sum(words in text for text in said) for words in (f"room for {most:,}", "raise the budget")] == [1, 1]
        assert "new" not in service.services.store.names()


@pytest.mark.parametrize(("bound", "verdict"), [(0.0, "admitted"), (1.0, "refused")])
def test_a_canary_runs_where_the_delta_is_loaded(own, bound, verdict):
    policy = write_policy(own, canary={"refusals_at_least": bound, "broken_at_most": 1.0})
    write_judge(own, "never said")
    with (
        clustered_here(make_plan(own, own, policy=policy), own) as (service, _),
        served(service.services, app=service.app) as live,
        live.client() as c,
    ):
        found = c.post("/v1/completions", json=ASKED | {"model": "signs"})
        assert found.status_code == (200 if verdict == "admitted" else 422)
        (entry,) = c.get("/admin/decisions").json()["data"]
        assert (entry["name"], entry["verdict"], entry["canary"]["prompts"]) == ("signs", verdict, 4)
        assert c.get("/admin/deltas/signs").json()["decision"]["verdict"] == verdict
        if verdict == "admitted":
            served_now = found.json()["choices"]
            turned = c.put("/admin/deltas/signs", json={"path": "ranks", "replace": True})
            assert turned.status_code == 200 and turned.json()["artifact"]["folder"] == "ranks"
            assert c.post("/v1/completions", json=ASKED | {"model": "signs"}).json()["choices"] != served_now


def test_lost_replicas_cost_no_answer(cluster_folder, tmp_path):
    plan = make_plan(cluster_folder, tmp_path)
    with (
        clustered_here(plan, cluster_folder, 3) as (service, replicas),
        served(service.services, app=service.app) as live,
        live.client() as c,
    ):
        asked = LONG | {"model": "signs", "max_tokens": 300, "temperature": 1.2}
        whole = c.post("/v1/completions", json=asked | {"seed": 3}).json()["choices"][0]["text"]
        wait_until(lambda: service.services.engine.stats().answer_tokens == 300)
        holder = replicas.asked[-1][1]
        for seed in (3, None):
            events = []
            counted = {"seed": seed, "stream": True, "stream_options": {"include_usage": True}}
            with c.stream("POST", "/v1/completions", json=asked | counted) as answer:
                for line in filter(None, answer.iter_lines()):
                    if not events:
                        replicas.lose(holder)
                    events.append(line[6:])
            *chunks, last, done = events
            text = "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
            assert json.loads(last)["usage"]["completion_tokens"] == 300 and done == "[DONE]"
            assert seed is None or text == whole
            holder = replicas.asked[-1][1]
        assert service.services.engine.tally.resumed == 2 and service.services.engine.tally.lost == 0
        wait_until(lambda: "deltakeeper_cluster_replicas 1.0" in c.get("/metrics").text)
        assert 'deltakeeper_cluster_disturbed_requests_total{outcome="resumed"} 2.0' in c.get("/metrics").text
        own = next(iter(replicas.alive.values())).report().engine.answer_tokens
        wait_until(lambda: service.services.engine.stats().answer_tokens >= own + 300)  # what a lost one did counts on
        replicas.lose(holder)
        gone = c.post("/v1/completions", json=asked | {"seed": 3})
        assert (gone.status_code, gone.json()["error"]["code"]) == (503, "replica_lost")
        assert gone.headers["retry-after"]


def test_what_does_not_fit_in_the_line_is_told_to_come_back(cluster_folder, tmp_path):
    plan = make_plan(cluster_folder, tmp_path, engine={"max_waiting": 1})
    with (
        clustered_here(plan, cluster_folder, 1, max_ongoing=2) as (service, _),
        served(service.services, app=service.app) as live,
        live.client() as c,
    ):
        full = c.post("/v1/completions", json=LONG | {"model": "base", "n": 4})
        assert (full.status_code, full.json()["error"]["code"]) == (503, "queue_full")
        assert int(full.headers["retry-after"]) >= 1
        wait_until(lambda: service.services.engine.open == 0)
        assert c.post("/v1/completions", json=ASKED | {"model": "base", "n": 2, "temperature": 1}).status_code == 200


def test_a_drain_lets_answers_finish_and_takes_no_more(cluster_folder, tmp_path):
    plan = make_plan(cluster_folder, tmp_path)
    with clustered_here(plan, cluster_folder, 1) as (service, _), served(service.services, app=service.app) as live:
        with (
            live.client() as c,
            c.stream("POST", "/v1/completions", json=LONG | {"model": "t2", "stream": True}) as one,
        ):
            lines = one.iter_lines()
            next(lines)
            live.server.drain()
            with live.client() as other, suppress(httpx.ConnectError):  # where it has stopped already
                assert other.get("/ready").status_code == 503
            assert [line for line in lines if line][-1] == "data: [DONE]"
        end = time.monotonic() + 30
        while not live.server.should_exit:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert service.services.engine.alive is False
