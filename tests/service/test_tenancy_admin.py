"""The routes for keys and quotas: for admin keys alone, and what they say holds for the next request."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from deltakeeper.service.access import Principal
from deltakeeper.service.error_answers import add_error_answers
from deltakeeper.service.errors import TooManyRequests, Unauthorized
from deltakeeper.service.guard import guarded_routes
from deltakeeper.service.tenancy.admin_keys import router
from deltakeeper.service.tenancy.database import open_state
from deltakeeper.service.tenancy.gate import StateGate

KEY_ROUTES = [("GET", "/admin/keys"), ("POST", "/admin/keys"), ("GET", "/admin/keys/x"), ("DELETE", "/admin/keys/x")]
QUOTA_ROUTES = [("GET", "/admin/quotas"), *((verb, "/admin/quotas/key/x") for verb in ("GET", "PUT", "DELETE"))]


@pytest.fixture
def gate(tmp_path):
    opened = open_state(tmp_path / "state.db")
    made = StateGate(opened, open_until_first_key=True)
    yield made
    made.close()
    opened.close()


@pytest.fixture
def client(gate):
    app = FastAPI(openapi_url=None)
    app.include_router(router)
    store = SimpleNamespace(names=lambda: ["a", "b", "org/name"])
    app.state.services = SimpleNamespace(gate=gate, base_name="base", store=store)
    add_error_answers(app)
    with TestClient(app) as made:
        yield made


@pytest.fixture
def admin(gate):
    """Headers of an admin, with whose key the service is closed."""
    secret = gate.keys.create("admin", "admin").secret
    gate.refresh()
    return {"Authorization": f"Bearer {secret}"}


def test_every_route_is_for_managing(client):
    kinds = [kind for _, kind in guarded_routes(client.app.routes)]
    assert set(kinds) == {"manage"} and len(kinds) == len(KEY_ROUTES + QUOTA_ROUTES)


@pytest.mark.parametrize(("verb", "path"), [*KEY_ROUTES, *QUOTA_ROUTES])
def test_nobody_but_an_admin_gets_an_answer(client, gate, admin, verb, path):
    tenant, monitor = (gate.keys.create(role, role).secret for role in ("tenant", "monitor"))
    gate.refresh()
    before = gate._state.revision()
    assert client.request(verb, path, json={}).status_code == 401
    for secret in (tenant, monitor):
        answer = client.request(verb, path, json={}, headers={"Authorization": f"Bearer {secret}"})
        assert answer.status_code == 403 and answer.json()["error"]["type"] == "PermissionDeniedError"
    assert gate._state.revision() == before


def test_the_first_key_is_made_on_an_open_service_and_closes_it(client):
    made = client.post("/admin/keys", json={"name": "me", "role": "admin"})
    assert made.status_code == 201
    assert client.get("/admin/keys").status_code == 401
    listed = client.get("/admin/keys", headers={"Authorization": f"Bearer {made.json()['secret']}"})
    assert [key["id"] for key in listed.json()["data"]] == [made.json()["id"]]


def test_a_truth_is_no_number(client, admin):
    """JSON's `true` must not become a quota of 1."""
    for limits in ({"requests_per_minute": True}, {"concurrent": "1"}):
        refused = client.put("/admin/quotas/model/signs", json=limits, headers=admin)
        assert refused.status_code == 400, refused.text
    assert client.post("/admin/keys", json={"name": "k", "models": ["a"], "expires_in": True}, headers=admin).is_error
    assert client.put("/admin/quotas/model/signs", json={"concurrent": 1}, headers=admin).is_success


def test_a_key_is_made_shown_once_and_revoked(client, gate, admin, caplog):
    caplog.set_level(logging.DEBUG)
    asked = {"name": "team", "models": ["b", "a"], "expires_in": 3600}
    made = client.post("/admin/keys", json=asked, headers=admin)
    assert made.headers["Cache-Control"] == "no-store"
    secret, key_id = made.json()["secret"], made.json()["id"]
    assert gate.identify(f"Bearer {secret}") == Principal(key_id, "tenant", frozenset({"a", "b"}))
    shown = [client.get(path, headers=admin) for path in ("/admin/keys", f"/admin/keys/{key_id}")]
    assert shown[1].json() == {k: v for k, v in made.json().items() if k != "secret"}
    assert shown[1].json()["models"] == ["a", "b"] and shown[1].json()["state"] == "active"
    revoked = client.delete(f"/admin/keys/{key_id}", headers=admin)
    assert revoked.json()["state"] == "revoked"
    with pytest.raises(Unauthorized):
        gate.identify(f"Bearer {secret}")
    assert secret not in caplog.text + revoked.text + "".join(answer.text for answer in shown)
    for verb in ("GET", "DELETE"):
        missing = client.request(verb, "/admin/keys/key-nobody", headers=admin)
        assert missing.status_code == 404 and missing.json()["error"]["param"] == "key_id"


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"name": ""},
        {"name": "x"},
        {"name": "x", "models": []},
        {"name": "x", "models": "everything"},
        {"name": "x", "models": ["../../etc"] * 2 + ["a b"]},
        {"name": "x", "role": "root", "models": "all"},
        {"name": "x", "role": "admin", "models": ["a"]},
        {"name": "x", "models": "all", "expires_in": 0},
        {"name": "x", "models": "all", "secret": "dk-chosen"},
        {"name": "a\u0000b", "models": "all"},
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(client, gate, admin, wanted):
    answer = client.post("/admin/keys", json=wanted, headers=admin)
    assert answer.status_code == 400 and answer.json()["error"]["message"].endswith(".")
    assert len(gate.keys.all()) == 1


def test_all_models_have_to_be_asked_for(client, gate, admin):
    made = client.post("/admin/keys", json={"name": "x", "models": "all"}, headers=admin).json()
    assert made["models"] == "all" and gate.identify(f"Bearer {made['secret']}").models is None


def test_quotas_are_set_shown_and_taken_away(client, gate, admin):
    path, limits = "/admin/quotas/model/org/name", {"requests_per_minute": 1}
    answer = client.put(path, json=limits, headers=admin)
    full = {"scope": "model", "subject": "org/name", "tokens_per_minute": None, "concurrent": None, **limits}
    assert answer.status_code == 200 and answer.json() == full
    assert client.get(path, headers=admin).json() == full
    assert client.get("/admin/quotas", headers=admin).json()["data"] == [full]
    anybody = Principal(None, "open")
    with gate.admit(anybody, "org/name", 1), pytest.raises(TooManyRequests):
        gate.admit(anybody, "org/name", 1)
    replaced = client.put(path, json={"concurrent": 5}, headers=admin).json()
    assert (replaced["concurrent"], replaced["requests_per_minute"]) == (5, None)
    assert client.delete(path, headers=admin).json()["deleted"] is True
    assert client.get(path, headers=admin).status_code == client.delete(path, headers=admin).status_code == 404
    for _ in range(10):
        with gate.admit(anybody, "org/name", 1):
            pass


def test_names_of_models_that_nobody_knows_are_taken_with_a_warning(client, gate, admin):
    for verb, path, wanted in (
        (client.put, "/admin/quotas/model/mispelt", {"concurrent": 1}),
        (client.post, "/admin/keys", {"name": "x", "models": ["a", "mispelt", "base"]}),
    ):
        told = verb(path, json=wanted, headers=admin).json()["warning"]
        assert told == "No model is known as 'mispelt' yet."
    assert "warning" not in client.put("/admin/quotas/model/*", json={"concurrent": 1}, headers=admin).json()


def test_a_quota_is_of_a_key_that_there_is_or_of_each(client, admin):
    assert client.put("/admin/quotas/key/key-nobody", json={"concurrent": 1}, headers=admin).status_code == 404
    key_id = client.get("/admin/keys", headers=admin).json()["data"][0]["id"]
    for subject in (key_id, "*"):
        assert client.put(f"/admin/quotas/key/{subject}", json={"concurrent": 1}, headers=admin).status_code == 200


@pytest.mark.parametrize(
    ("path", "limits"),
    [
        ("key/*", {}),
        ("key/*", {"concurrent": 0}),
        ("key/*", {"concurrent": -1}),
        ("key/*", {"concurrent": 10**13}),
        ("key/*", {"concurrent": 1.5}),
        ("key/*", {"burst": 1}),
        ("tenant/a", {"concurrent": 1}),
        (f"model/{'x' * 257}", {"concurrent": 1}),
        ("model/a%00b", {"concurrent": 1}),
    ],
)
def test_a_quota_that_makes_no_sense_is_not_set(client, gate, admin, path, limits):
    assert client.put(f"/admin/quotas/{path}", json=limits, headers=admin).status_code == 400
    assert gate.quotas.all() == []


def test_a_service_with_another_gate_has_no_such_thing(client):
    client.app.state.services = SimpleNamespace(gate=SimpleNamespace(identify=lambda header: Principal(None, "open")))
    assert client.get("/admin/keys").status_code == 404
