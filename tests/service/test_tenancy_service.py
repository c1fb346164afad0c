"""Keys and quotas on a live service: tenants see nothing of each other, and a flood takes nothing from others."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import contextmanager

import pytest
from service_cases import PROMPT, opened_services, served

from deltakeeper.service.tenancy.admin_keys import router
from deltakeeper.service.tenancy.database import open_state
from deltakeeper.service.tenancy.gate import StateGate
from deltakeeper.service.tenancy.quotas import Limits, Quota


@contextmanager
def service_with_state(folder, place):
    """A live service whose keys and quotas are in a state; open until the first key is made."""
    opened = open_state(place)
    gate = StateGate(opened, open_until_first_key=True)
    try:
        with opened_services(folder, gate=gate) as services, served(services, [router]) as live:
            yield live, gate
    finally:
        gate.close()
        opened.close()


@pytest.fixture
def running(service_folder, tmp_path):
    with service_with_state(service_folder, tmp_path / "state.db") as pair:
        yield pair


def ask(client, model, tokens=4):
    return client.post("/v1/completions", json={"model": model, "prompt": PROMPT, "max_tokens": tokens})


def test_other_names_of_this_machine_are_for_keys_alone(running):
    live, _ = running
    with live.client() as anybody:
        for name in ("localhost:80", "127.0.0.2:8000", "[::1]", "[::1]:8000"):
            assert anybody.get("/v1/models", headers={"Host": name}).status_code == 200
        for name in ("rebound.example", "", "10.0.0.1", "127.0.0.2.example:8000", "[fe80::1]"):
            assert anybody.get("/v1/models", headers={"Host": name}).status_code == 403
        secret = anybody.post("/admin/keys", json={"name": "me", "role": "admin"}).json()["secret"]
    with live.client(secret) as owner:  # from the first key on, without a restart
        assert owner.get("/v1/models", headers={"Host": "models.example"}).status_code == 200


def test_a_key_sees_and_asks_its_own_tenant_alone(running):
    live, _ = running
    with live.client() as anybody:
        admin = anybody.post("/admin/keys", json={"name": "me", "role": "admin"}).json()["secret"]
        assert ask(anybody, "signs").status_code == anybody.get("/v1/models").status_code == 401
    with live.client(admin) as owner:
        made = owner.post("/admin/keys", json={"name": "team", "models": ["signs"]}).json()
        assert ask(owner, "ranks").status_code == 200
    with live.client(made["secret"]) as team:
        assert ask(team, "signs").status_code == 200
        assert [card["id"] for card in team.get("/v1/models").json()["data"]] == ["signs"]
        theirs, nobodys = ask(team, "ranks"), ask(team, "nowhere")
        assert theirs.status_code == nobodys.status_code == 404
        assert theirs.text.replace("ranks", "x") == nobodys.text.replace("nowhere", "x")
        assert team.get("/admin/keys").status_code == 403
        with live.client(admin) as owner:
            owner.delete(f"/admin/keys/{made['id']}")
        assert ask(team, "signs").status_code == 401


def test_a_quota_is_told_and_others_are_not_affected(running):
    live, gate = running
    first, second = (gate.keys.create(name, "tenant", [name]) for name in ("signs", "ranks"))
    gate.quotas.set(Quota("key", "*", Limits(requests_per_minute=2)))
    gate.refresh()
    with live.client(first.secret) as flooded, live.client(second.secret) as other:
        answers = [ask(flooded, "signs") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
        error = answers[-1].json()["error"]
        assert error["type"] == "RateLimitError" and error["code"] == "rate_limit_exceeded"
        assert 20 <= int(answers[-1].headers["Retry-After"]) <= 30
        assert ask(other, "ranks").status_code == 200


def test_answers_are_charged_and_slots_come_back(running):
    live, gate = running
    key = gate.keys.create("signs", "tenant", ["signs"])
    gate.quotas.set(Quota("key", key.key.id, Limits(tokens_per_minute=100, concurrent=1)))
    gate.refresh()
    with live.client(key.secret) as client:
        began = time.monotonic()
        answers = [ask(client, "signs", tokens=4) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200] * 3
        used = sum(answer.json()["usage"]["total_tokens"] for answer in answers)  # an answer may end by itself
        assert 3 * (4 + 1) <= used <= 3 * (4 + 4)
        left = sum(gate._meter._accounts["key", key.key.id].tokens._levels.values())
        charged = 100 - used
        assert charged - 0.1 <= left <= charged + (time.monotonic() - began) * 100 / 60 + 0.1
        assert client.post("/v1/completions", json={"model": "signs", "prompt": PROMPT, "n": -1}).status_code == 400
        assert ask(client, "signs", tokens=4).status_code == 200


def test_tokens_are_counted_for_a_key_that_has_used_up_its_own(running):
    live, gate = running
    used, other = (gate.keys.create(name, "tenant", ["signs"]) for name in ("used", "other"))
    gate.quotas.set(Quota("key", used.key.id, Limits(tokens_per_minute=4)))
    gate.quotas.set(Quota("model", "signs", Limits(tokens_per_minute=100)))
    gate.refresh()
    with live.client(used.secret) as client, live.client(other.secret) as counting:
        assert ask(client, "signs", tokens=4).status_code == 200
        assert ask(client, "signs", tokens=4).status_code == 429
        for one in (client, counting):
            assert one.post("/tokenize", json={"model": "signs", "prompt": PROMPT}).status_code == 200
    assert set(gate._meter._accounts["model", "signs"].tokens._levels) == {used.key.id}


def test_keys_and_quotas_are_there_after_a_start(service_folder, tmp_path):
    place = tmp_path / "state.db"
    with service_with_state(service_folder, place) as (_, gate):
        secret = gate.keys.create("signs", "tenant", ["signs"]).secret
        gate.quotas.set(Quota("model", "signs", Limits(requests_per_minute=1)))
    with service_with_state(service_folder, place) as (live, _), live.client(secret) as client:
        assert [ask(client, "signs").status_code for _ in range(2)] == [200, 429]
        with live.client() as anybody:
            assert ask(anybody, "signs").status_code == 401


@pytest.mark.parametrize("shared", ["model", "machine"])
def test_a_flood_leaves_a_quiet_tenant_its_fair_part(running, shared):
    """The quiet one has as many clients as its quota allows; the flood has ten times as many, which do not wait.

    Fair is an equal part, of one model's slots or of the machine. That is measured by tokens, beside one another.
    """
    live, gate = running
    names = {"flood": "signs", "quiet": "signs" if shared == "model" else "ranks"}
    keys = {who: gate.keys.create(who, "tenant", [model]).secret for who, model in names.items()}
    gate.quotas.set(
        Quota("model", "*", Limits(concurrent=4)) if shared == "model" else Quota("key", "*", Limits(None, None, 2))
    )
    gate.refresh()
    spent, refused, counting, over = Counter(), Counter(), threading.Event(), threading.Event()

    def work(who):
        with live.client(keys[who]) as client:
            while not over.is_set():
                answer = ask(client, names[who], tokens=32)
                if answer.status_code == 429:
                    refused[who] += 1
                    time.sleep(0.05 if who == "flood" else int(answer.headers["Retry-After"]))
                elif counting.is_set() and not over.is_set():
                    spent[who] += answer.json()["usage"]["completion_tokens"]

    for who, model in names.items():  # the tenant is loaded: nothing waits for that below
        with live.client(keys[who]) as client:
            assert ask(client, model).status_code == 200
    threads = [threading.Thread(target=work, args=(who,)) for who in ["flood"] * 20 + ["quiet"] * 2]
    for thread in threads:
        thread.start()
    time.sleep(2)  # the quiet ones' first tries, while the flood holds all there is
    counting.set()
    time.sleep(4)
    over.set()
    for thread in threads:
        thread.join()
    assert refused["flood"] > 50
    assert spent["quiet"] >= 0.8 * (spent["quiet"] + spent["flood"]) / 2, (spent, refused)
