"""The door: who gets in, what is too large, and that nothing is served which does not say for whom."""

from __future__ import annotations

import json
import logging
import socket

import pytest
from fastapi import APIRouter
from fastapi.routing import iter_route_contexts
from service_cases import PROMPT, FakeGate, opened_services, served, wait_until
from starlette.routing import Mount, Route

from deltakeeper.service.access import Principal
from deltakeeper.service.app import build_app
from deltakeeper.service.doorway import Doorway
from deltakeeper.service.guard import RouteError, kind_of, require
from deltakeeper.service.settings import ServiceSettings

KEYS = {
    "admin": Principal("k-admin", "admin"),
    "all": Principal("k-all", "tenant"),
    "signs": Principal("k-signs", "tenant", frozenset({"signs"})),
}
SECRET = "dk-never-in-a-log"
PUBLIC = {"/health", "/ready", "/ping", "/version", "/openapi.json"}
JSON = {"Content-Type": "application/json"}

extra = APIRouter(prefix="/extra")


@extra.get("/managed", dependencies=[require("manage")])
async def managed():
    return {"managed": True}


@extra.post("/broken", dependencies=[require("ask")])
async def broken(body: dict):
    raise RuntimeError("a reason with a secret in it")


class PanicException(BaseException):
    """What a library in Rust raises is no `Exception`."""


@extra.post("/panicking", dependencies=[require("ask")])
async def panicking(body: dict):
    raise PanicException("a reason with a secret in it")


@pytest.fixture(scope="module")
def live(service_folder):
    limits = ServiceSettings(max_body_bytes=4096, max_body_objects=4050, max_header_bytes=2048)
    with (
        opened_services(service_folder, gate=FakeGate(KEYS), settings=limits) as services,
        served(services, [extra]) as live,
    ):
        yield live


def asking(model="base", **more):
    return {"model": model, "prompt": PROMPT, "max_tokens": 1} | more


def test_every_route_says_who_may_call_it_and_asks_for_a_key_unless_it_is_public(live):
    """The walk over `app.routes`: one that is added without a guard fails it."""
    routes = list(iter_route_contexts(build_app(live.services, [extra]).routes))
    assert len(routes) >= 8
    with live.client() as client:
        for route in routes:
            kind = kind_of(route)
            assert kind is not None
            assert (kind == "public") == (route.path in PUBLIC)
            for method in route.methods:
                answer = client.request(method, route.path.replace("{model:path}", "base"), json={})
                assert (answer.status_code == 401) == (kind != "public"), (method, route.path)


def test_routes_without_a_guard_are_refused_when_the_service_is_built(live):
    open_router = APIRouter()
    open_router.get("/leak")(managed)
    nested = APIRouter(prefix="/outer")
    nested.include_router(open_router)
    for router in (open_router, nested):
        with pytest.raises(RouteError, match="leak"):
            Doorway(None, build_app(live.services, [router]).routes, live.services.gate, live.services.settings)
        with pytest.raises(RouteError, match="leak"):
            build_app(live.services, [router]).build_middleware_stack()
    for route in (Route("/leak", managed), Mount("/leak", APIRouter())):
        app = build_app(live.services)
        app.router.routes.append(route)
        with pytest.raises(RouteError, match="leak"):
            app.build_middleware_stack()


def test_a_route_that_comes_later_is_not_there(live):
    app = live.server.config.app
    app.router.add_route("/late", managed)
    with live.client("admin") as client:
        assert client.get("/late").status_code == 404


def test_the_strictest_guard_counts():
    router = APIRouter(dependencies=[require("manage")])
    router.get("/x", dependencies=[require("public")])(managed)
    (route,) = iter_route_contexts(router.routes)
    assert kind_of(route) == "manage"


def test_a_caller_is_known_before_the_body_is_read(live):
    with live.client() as client:
        assert client.post("/v1/completions", content=b"{").status_code == 401
        assert client.post("/v1/completions", content=b"x" * 10_000).status_code == 401


def test_keys_open_what_they_are_for(live):
    with live.client("signs") as client:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["signs"]
        assert client.post("/v1/completions", json=asking("signs")).status_code == 200
        theirs, nobodys = (client.post("/v1/completions", json=asking(name)) for name in ("ranks", "nobody"))
        assert theirs.status_code == nobodys.status_code == 404
        assert theirs.json()["error"]["message"].replace("ranks", "nobody") == nobodys.json()["error"]["message"]
        assert client.get("/v1/models/ranks").json()["error"]["code"] == "model_not_found"
        assert client.get("/extra/managed").status_code == 403
    with live.client("admin") as client:
        assert client.get("/extra/managed").json() == {"managed": True}
        assert len(client.get("/v1/models").json()["data"]) == 3
    with live.client("unknown") as client:
        answer = client.get("/v1/models")
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


def test_two_keys_at_once_are_none(live):
    with live.client() as client:
        keys = [("Authorization", "Bearer admin"), ("Authorization", "Bearer all")]
        assert client.get("/v1/models", headers=keys).status_code == 401


@pytest.mark.parametrize("given", ["abc-123", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"])
def test_request_ids_come_back(live, given):
    with live.client() as client:
        for path in ("/health", "/nowhere", "/v1/models"):
            assert client.get(path, headers={"X-Request-Id": given}).headers["x-request-id"] == given


def test_request_ids_that_are_none_are_made(live):
    with live.client() as client:
        made = [
            client.get("/health", headers={"X-Request-Id": odd}).headers["x-request-id"] for odd in ("a b", "x" * 200)
        ]
        made.append(client.get("/health").headers["x-request-id"])
        assert len(set(made)) == 3 and all(len(one) == 32 for one in made)


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nowhere", 404, "NotFoundError"),
        ("GET", "/v1/completions", 405, "MethodNotAllowedError"),
        ("GET", "/docs", 404, "NotFoundError"),
        ("GET", "/v1/models/", 404, "NotFoundError"),
        ("POST", "/v1/completions", 400, "BadRequestError"),
        ("POST", "/extra/broken", 500, "InternalServerError"),
        ("POST", "/extra/panicking", 500, "InternalServerError"),
    ],
)
def test_every_error_is_openais_json(live, caplog, method, path, status, kind):
    with live.client("all") as client:
        answer = client.request(method, path, json={} if method == "POST" else None)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["type"] == kind and answer.headers["x-request-id"]
    assert "secret" not in answer.text
    if status == 500:
        assert answer.headers["x-request-id"] in caplog.text and "a reason with a secret in it" in caplog.text


@pytest.mark.parametrize("body", [b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"[" * 4000, b'{"model": NaN}'])
def test_a_body_that_is_no_request_is_the_callers_error(live, body):
    with live.client("all") as client:
        answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "BadRequestError"


def test_bodies_and_headers_have_limits(live):
    with live.client("all") as client:
        large = json.dumps(asking(user="x" * 5000)).encode()
        assert client.post("/v1/completions", content=large).status_code == 413
        chunked = client.post("/v1/completions", content=iter([large[:3000], large[3000:]]), headers=JSON)
        assert chunked.status_code == 413 and chunked.json()["error"]["type"] == "RequestTooLargeError"
        assert client.get("/health", headers={"X-Long": "x" * 3000}).status_code == 431
        assert client.get("/health?" + "x" * 3000).status_code == 431
        assert client.get("/health").status_code == 200


def test_a_body_of_nothing_but_objects_is_not_read(live):
    with live.client("all") as client:
        for body in (b"[" * 4060, b'{"prompt":[' + b"{}," * 1300 + b"[" * 20):
            read = client.post("/v1/completions", content=body, headers=JSON)
            assert read.status_code == (413 if len(body) == 4060 else 400)


def test_a_body_is_json_and_says_so(live):
    body = json.dumps(asking()).encode()
    with live.client("all") as client:
        for given in ("application/x-www-form-urlencoded", "text/plain", None):
            headers = {} if given is None else {"Content-Type": given}
            for content in (body, iter([body])):
                refused = client.post("/v1/completions", content=content, headers=headers)
                assert refused.status_code == 415 and "application/json" in refused.json()["error"]["message"]
        for given in ("application/json", "Application/JSON; charset=utf-8", "application/x+json"):
            assert client.post("/v1/completions", content=body, headers={"Content-Type": given}).status_code == 200
        assert client.post("/v1/completions").status_code == 400  # there is no body that could be anything


def test_a_request_with_two_lengths_ends_its_connection(live):
    host, port = live.server.servers[0].sockets[0].getsockname()
    doubtful = b"POST /ping HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    with socket.create_connection((host, port), timeout=5) as peer:
        peer.sendall(doubtful + b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        answered = b"".join(iter(lambda: peer.recv(65536), b""))
    assert answered.startswith(b"HTTP/1.1 400") and answered.count(b"HTTP/1.1") == 1


def test_probes_are_answered_in_the_ways_that_others_ask(live):
    with live.client() as client:
        for path in ("/health", "/ready", "/ping"):
            asked = client.head(path)
            assert (asked.status_code, asked.content) == (200, b"")
        assert client.post("/ping").status_code == client.get("/ping").status_code == 200
        assert client.get("/version").json() == {"version": client.get("/openapi.json").json()["info"]["version"]}


def _take_lines(caplog, lines):
    lines[:] = [record.getMessage() for record in caplog.records if record.name == "deltakeeper.service"]
    return len(lines)


def test_nothing_is_routed_to_a_service_that_cannot_tell_keys(live, monkeypatch):
    monkeypatch.setattr(live.services.gate, "knows", False)
    with live.client() as client:
        assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200


def test_probes_are_no_news_unless_they_fail(live, caplog, monkeypatch):
    caplog.set_level("INFO", "deltakeeper.service")
    with live.client() as client:
        client.get("/ready")
        client.get("/health")
        client.get("/openapi.json")
        monkeypatch.setattr(type(live.services.engine), "alive", property(lambda engine: False))
        client.get("/ready")
    wait_until(lambda: "GET /ready -> 503" in caplog.text)  # a line is written once its answer has been sent
    told = [record.getMessage() for record in caplog.records if " -> " in record.getMessage()]
    assert len(told) == 2 and "GET /openapi.json -> 200" in told[0] and "GET /ready -> 503" in told[1]


def test_secrets_are_not_logged(live, caplog):
    caplog.set_level("DEBUG")
    with live.client(SECRET) as client:
        assert client.get(f"/v1/models?key={SECRET}").status_code == 401
        assert client.post("/extra/broken", json={"key": SECRET}).status_code == 401
    with live.client("all") as client:
        client.post("/v1/completions", json=asking(user=SECRET, temperature="x"))
        client.get("/line%0Abreak")
    ours = []
    wait_until(lambda: _take_lines(caplog, ours) >= 4)  # a line is written once its answer has been sent
    assert not any(SECRET in line or "\n" in line for line in ours)


def test_what_is_not_http_is_answered_and_harms_nobody(live):
    host, port = live.server.servers[0].sockets[0].getsockname()
    for raw in (b"\x16\x03\x01\x02\x00", b"GET /health\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"):
        with socket.create_connection((host, port), timeout=5) as peer:
            peer.sendall(raw)
            assert peer.recv(65536).startswith(b"HTTP/1.1 400")
    with live.client() as client:
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("kind", [b"", b"Content-Type: application/json\r\n"], ids=["unread", "read"])
def test_a_body_that_is_no_http_is_no_failure_of_the_service(live, caplog, monkeypatch, kind):
    caplog.set_level("INFO", "deltakeeper.service")
    server_log = logging.getLogger("uvicorn.error")
    monkeypatch.setattr(server_log, "handlers", [caplog.handler])  # what it says goes to a handler of its own
    host, port = live.server.servers[0].sockets[0].getsockname()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer all\r\n"
    with socket.create_connection((host, port), timeout=5) as peer:
        peer.sendall(head + kind + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n")
        assert peer.recv(65536).startswith(b"HTTP/1.1 4")
    wait_until(lambda: "POST /v1/completions -> " in caplog.text, seconds=4)  # not only when patience ends
    with live.client() as client:
        assert client.get("/health").status_code == 200
    assert ("its body is no HTTP" in caplog.text) == (not kind) and "Invalid HTTP request received" in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_the_document_says_that_errors_are_json(live):
    with live.client() as client:
        for _ in range(2):
            operations = [one for path in client.get("/openapi.json").json()["paths"].values() for one in path.values()]
            assert len(operations) >= 8
            for operation in operations:
                assert set(operation["responses"]) == {"200", "4XX", "5XX"}
                assert set(operation["responses"]["4XX"]["content"]) == {"application/json"}


def test_the_document_says_which_routes_want_a_key(live):
    with live.client() as client:
        found = client.get("/openapi.json").json()
    [(name, scheme)] = found["components"]["securitySchemes"].items()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    wanted = {path: one.get("security") for path, methods in found["paths"].items() for one in methods.values()}
    assert all(wanted.pop(path) is None for path in ("/health", "/ready", "/ping", "/version"))
    assert "/v1/models/{model}" in wanted and all(security == [{name: []}] for security in wanted.values())
