"""The service on three nodes of Ray, of which one is killed under load; run with `make test-ray`."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import threading
import time
from itertools import pairwise

import openai
import pytest

pytest.importorskip("ray.serve", exc_type=ImportError)

import yaml
from cluster_cases import TENANTS, answers_of_one, make_plan
from ray_cases import clustered_on_ray, started_nodes
from service_cases import PROMPT, served, wait_until

pytestmark = pytest.mark.ray

MODELS = ("base", *TENANTS)
SHORT = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0}
DRAWN = {"prompt": PROMPT, "max_tokens": 200, "temperature": 1.2, "seed": 9, "ignore_eos": True}
LONG = {"prompt": PROMPT, "max_tokens": 1800, "temperature": 0, "ignore_eos": True}
LOAD_SECONDS = 12.0


@pytest.fixture(scope="module")
def expected(cluster_folder):
    """What the service on one machine answers."""
    found = answers_of_one(cluster_folder, SHORT, DRAWN)
    return {key: choices[0]["text"] for key, choices in found.items()}


@pytest.fixture(scope="module")
def nodes():
    with pytest.MonkeyPatch.context() as patch, started_nodes(3, patch) as started:
        yield started


@pytest.fixture(scope="module")
def live(nodes, cluster_folder, tmp_path_factory):
    plan = make_plan(cluster_folder, tmp_path_factory.mktemp("state"))
    with (
        clustered_on_ray(nodes, cluster_folder, plan, min_replicas=3, max_replicas=3) as service,
        served(service.services, app=service.app) as running,
    ):
        wait_until(lambda: len(replicas(running)) == 3, 120)
        yield running


def replicas(live):
    with live.client() as c:
        return c.get("/admin/replicas").json()["data"]


def homes(live):
    """Which replicas hold each tenant."""
    found = {name: [] for name in TENANTS}
    for card in replicas(live):
        for name in card["deltas"]:
            found[name].append(card["id"])
    return found


def ask(live, model, asked, streaming):
    """One answer as a client gets it: its text, or what was wrong."""
    with live.client() as c:
        if not streaming:
            answer = c.post("/v1/completions", json=asked | {"model": model})
            return answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text
        text = ""
        with c.stream("POST", "/v1/completions", json=asked | {"model": model, "stream": True}) as answer:
            for line in filter(None, answer.iter_lines()):
                if line == "data: [DONE]":
                    return text
                event = json.loads(line[6:])
                if "choices" not in event:
                    return line
                text += event["choices"][0]["text"]
        return f"{text} (broken off)"


def test_a_policy_holds_on_the_nodes(nodes, cluster_folder, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text(yaml.safe_dump({"codecs": ["svd"]}))
    plan = make_plan(cluster_folder, tmp_path, policy=policy)
    with (
        clustered_on_ray(nodes, cluster_folder, plan) as service,
        served(service.services, app=service.app) as live,
        live.client() as c,
    ):
        assert c.post("/v1/completions", json=SHORT | {"model": "ranks"}).status_code == 200
        refused = c.post("/v1/completions", json=SHORT | {"model": "signs"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "not_admitted")
        found = {entry["name"]: entry["verdict"] for entry in c.get("/admin/decisions").json()["data"]}
        assert found == {"ranks": "admitted", "signs": "refused"}


def test_a_burst_finds_each_tenant_on_one_replica_and_the_answers_of_one_machine(live, expected):
    work = [(model, at, again % 2 == 0) for model in MODELS for at in (0, 1) for again in range(3)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda one: ask(live, one[0], (SHORT, DRAWN)[one[1]], one[2]), work))
    assert found == [expected[model, at] for model, at, _ in work]
    wait_until(lambda: all(len(where) == 1 for where in homes(live).values()))
    before = homes(live)
    for model in TENANTS:
        assert ask(live, model, SHORT, False) == expected[model, 0]
    time.sleep(1)
    assert homes(live) == before


def test_the_openai_client_streams_a_chat(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as client:
        chat = {"model": "t1", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8, "temperature": 0}
        whole = client.chat.completions.create(**chat).choices[0].message.content
        chunks = list(client.chat.completions.create(**chat, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_a_client_that_goes_ends_its_answer_on_the_node(live):
    engine = live.services.engine
    before = engine.stats().finished.get("cancelled", 0)
    with live.client() as c, c.stream("POST", "/v1/completions", json=LONG | {"model": "t0", "stream": True}) as answer:
        next(answer.iter_lines())
    wait_until(lambda: engine.stats().finished.get("cancelled", 0) == before + 1)
    assert engine.open == 0


def test_a_tenant_is_unloaded_everywhere_and_loaded_again(live, expected):
    with live.client() as c:
        assert ask(live, "t3", SHORT, False) == expected["t3", 0]
        wait_until(lambda: c.get("/admin/deltas/t3").json()["resident_bytes"] > 0)
        assert c.post("/v1/unload_lora_adapter", json={"lora_name": "t3"}).status_code == 200
        wait_until(lambda: not any("t3" in card["deltas"] for card in replicas(live)))
        put = c.put("/admin/deltas/t3")
        assert put.status_code == 201
        wait_until(lambda: c.get("/admin/deltas/t3").json()["state"] == "resident")
        assert ask(live, "t3", SHORT, False) == expected["t3", 0]


def test_a_node_killed_under_load_costs_no_answer_and_its_tenants_move(live, nodes, expected):
    for model in TENANTS:
        ask(live, model, SHORT, False)
    wait_until(lambda: all(len(where) == 1 for where in homes(live).values()))
    workers = {node.node_id for node in nodes.nodes}
    victim = max((card for card in replicas(live) if card["node"] in workers), key=lambda card: len(card["deltas"]))
    assert victim["deltas"], "no tenant lives on a node that may be killed"
    wrong, done, stop = [], [], time.monotonic() + LOAD_SECONDS

    def load(at):
        while time.monotonic() < stop:
            model = (
                MODELS[(at + len(done)) % len(MODELS)] if at % 2 else [*victim["deltas"]][at % len(victim["deltas"])]
            )
            found = ask(live, model, DRAWN, at % 3 != 0)
            done.append(time.monotonic())
            if found != expected[model, 1]:
                wrong.append((model, found[-200:]))

    threads = [threading.Thread(target=load, args=(at,)) for at in range(10)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    nodes.kill(victim["node"])
    killed = time.monotonic()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    tally = vars(live.services.engine.tally)
    later = sum(moment > killed for moment in done)
    gap = max(b - a for a, b in pairwise(sorted(done)))
    logging.info("%d answers in all, %d after the kill; longest without one: %.2f s; %s", len(done), later, gap, tally)
    assert wrong == [] and tally["lost"] == 0 and tally["retried"] + tally["resumed"] > 0
    wait_until(lambda: victim["id"] not in {card["id"] for card in replicas(live)}, 60)
    for model in TENANTS:
        assert ask(live, model, SHORT, False) == expected[model, 0]
    wait_until(lambda: all(len(where) == 1 for where in homes(live).values()))
    cards = replicas(live)
    with live.client() as c:
        deltas = c.get("/admin/deltas").json()
        assert deltas["byte_budget"] == len(cards) * (1 << 24) == 2 << 24
        assert deltas["resident_bytes"] == sum(sum(card["deltas"].values()) for card in cards) > 0
        assert "deltakeeper_cluster_replicas 2.0" in c.get("/metrics").text


def test_a_drain_lets_an_answer_finish(live):
    with live.client() as c, c.stream("POST", "/v1/completions", json=LONG | {"model": "t2", "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        live.server.drain()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    wait_until(lambda: not live.services.engine.alive)
