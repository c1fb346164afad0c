"""What a soak asks: requests whose answers are known beforehand, and requests that nobody should answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GREEDY = {"temperature": 0, "ignore_eos": True, "repetition_penalty": 1.5}
"""The penalty keeps a tiny model from saying one word for ever, so that different tenants say different things."""
SEEDED = {"temperature": 0.9, "seed": 7, "ignore_eos": True}


@dataclass(frozen=True)
class Case:
    """A request whose answer depends on the model alone.

    Attributes:
        name: of the case.
        path: of the route.
        body: all but `model` and `stream`.
        long: whether it is there to be cut off half-way.
    """

    name: str
    path: str
    body: Mapping[str, Any]
    long: bool = False

    def texts(self, answer: dict[str, Any]) -> tuple[str, ...]:
        """The texts of a whole answer, by choice."""
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return tuple(choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices)

    def piece(self, event: dict[str, Any]) -> list[tuple[int, str]]:
        """What an event of a stream adds, by choice."""
        return [
            (choice["index"], choice["text"] if "text" in choice else choice["delta"].get("content") or "")
            for choice in event["choices"]
        ]


def cases() -> list[Case]:
    """Completions and chats, greedy and seeded, one prompt and several; three are long."""
    found = [
        Case(f"completion {start}", COMPLETIONS, {"prompt": f"w{start} w6 w7", "max_tokens": 24} | GREEDY)
        for start in (5, 17, 29)
    ]
    shared = " ".join(f"w{(7 * i) % 90}" for i in range(70))  # several blocks of the cache, equal for all tenants
    found.append(Case("completion shared", COMPLETIONS, {"prompt": shared, "max_tokens": 16} | GREEDY))
    several = {"prompt": ["w1 w2 w3", "w40 w41"], "max_tokens": 12}
    found.append(Case("completion several", COMPLETIONS, several | GREEDY))
    found.append(Case("completion seeded", COMPLETIONS, {"prompt": "w8 w9", "max_tokens": 24, "n": 2} | SEEDED))
    for text in ("w11 w12", "w60 w61 w62 w63"):
        messages = [{"role": "user", "content": text}]
        found.append(Case(f"chat {text.split()[0]}", CHAT, {"messages": messages, "max_tokens": 24} | GREEDY))
    turns = [
        {"role": "system", "content": "w3"},
        {"role": "user", "content": "w4 w5"},
        {"role": "assistant", "content": "w6"},
        {"role": "user", "content": "w7"},
    ]
    found.append(Case("chat seeded", CHAT, {"messages": turns, "max_completion_tokens": 24} | SEEDED))
    for start in (20, 50):
        body = {"prompt": f"w{start} w{start + 1}", "max_tokens": 200} | GREEDY
        found.append(Case(f"completion long {start}", COMPLETIONS, body, long=True))
    messages = [{"role": "user", "content": "w70 w71"}]
    found.append(Case("chat long", CHAT, {"messages": messages, "max_tokens": 200} | GREEDY, long=True))
    return found


@dataclass(frozen=True)
class Malformed:
    """A request that has to be refused.

    Attributes:
        name: what is wrong.
        method: of HTTP.
        path: with the query.
        content: the body.
        headers: beside the key.
        key: `own` for the tenant's key, `admin`, `none`, or `wrong`.
        statuses: those that are right.
    """

    name: str
    method: str
    path: str
    content: bytes
    headers: Mapping[str, str]
    key: str
    statuses: frozenset[int]


def malformed(model: str) -> list[Malformed]:
    """Requests that are wrong in many ways, each of a key that may ask this model unless its key is what is wrong."""
    fine = {"model": model, "prompt": "w5", "max_tokens": 2}
    chat = {"model": model, "messages": [{"role": "user", "content": "w5"}], "max_tokens": 2}
    return [*_bodies(fine), *_fields(fine, chat), *_callers(fine), *_management(), *_sizes(fine)]


def _refused(
    name: str,
    body: Any,
    *statuses: int,
    path: str = COMPLETIONS,
    key: str = "own",
    method: str = "POST",
    **headers: str,
) -> Malformed:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    return Malformed(name, method, path, content, given, key, frozenset(statuses or (400,)))


def _bodies(fine: dict[str, Any]) -> list[Malformed]:
    text = json.dumps(fine)
    return [
        _refused("no body", b""),
        _refused("no JSON", b"{'model'"),
        _refused("half of a JSON", text[:-5].encode()),
        _refused("not UTF-8", text.encode().replace(b"w5", b"\xff\xfe")),
        _refused("an array", [fine]),
        _refused("null", None),
        _refused("deep", b'{"model": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
        _refused("a huge number", text.replace("2}", "1" * 5000 + "}").encode()),
        _refused("NaN", text.replace("2}", '2, "temperature": NaN}').encode()),
        _refused("half a character", text.replace("w5", "\\ud800").encode()),
        _refused("a form", b"model=t00&prompt=w5", 400, 415, Content_Type="application/x-www-form-urlencoded"),
        _refused("a zero byte in the name", fine | {"model": "t\0"}, 404),
        _refused("a path as a name", fine | {"model": "../t00"}, 404),
        _refused("a name of half a megabyte", fine | {"model": "x" * 500_000}),
        _refused("a number as a name", fine | {"model": 5}),
    ]


def _fields(fine: dict[str, Any], chat: dict[str, Any]) -> list[Malformed]:
    wrong: dict[str, Any] = {
        "n": (0, 4096, "x"),
        "temperature": (-1, 1e9),
        "top_p": (0, 2),
        "logprobs": (-1, 500),
        "stop": (["x"] * 40, 5),
        "max_tokens": (-1, 0, 1.5),
        "best_of": (3,),
        "logit_bias": ({"5": 1},),
        "suffix": ("x",),
        "frobnicate": (1,),
        "seed": (2**80,),
        "stop_token_ids": ([-1], ["x"]),
        "stream_options": ({"x": 1},),
        "prompt": ("", [], [[]], [5, -1], [95_000], [2**40], [1.5], ["w5"] * 500, "w5 " * 600, {"a": 1}, [None]),
    }
    found = [
        _refused(f"{field} of {json.dumps(value)[:12]}", fine | {field: value})
        for field, values in wrong.items()
        for value in values
    ]
    found += [_refused(f"no {field}", {k: v for k, v in fine.items() if k != field}) for field in ("model", "prompt")]
    turns: dict[str, Any] = {
        "messages": ([], "x", [{}], [{"role": "judge", "content": "x"}], [{"role": "user", "content": None}]),
        "tools": ([{"type": "function"}],),
        "top_logprobs": (3,),
        "response_format": ({"type": "json_object"},),
        "max_completion_tokens": (0,),
    }
    return found + [
        _refused(f"{field} of {json.dumps(value)[:12]}", chat | {field: value}, path=CHAT)
        for field, values in turns.items()
        for value in values
    ]


def _callers(fine: dict[str, Any]) -> list[Malformed]:
    return [
        _refused("no key", fine, 401, key="none"),
        _refused("a wrong key", fine, 401, key="wrong"),
        _refused("another scheme", fine, 401, key="none", Authorization="Basic YTpi"),
        _refused("a tenant that manages", b"", 403, path="/admin/status", method="GET"),
        _refused("a tenant that makes keys", {"name": "x", "role": "admin"}, 403, path="/admin/keys"),
        _refused("a tenant that unloads", {"lora_name": "t01"}, 403, path="/v1/unload_lora_adapter"),
        _refused("a tenant that scrapes", b"", 403, path="/metrics", method="GET"),
        _refused("an unknown path", fine, 404, path="/v1/embeddings"),
        _refused("a path around", b"", 403, 404, path="/v1/../admin/status", method="GET"),
        _refused("another method", b"", 405, method="GET"),
        _refused("a method that nobody knows", b"", 405, method="BREW"),
    ]


def _management() -> list[Malformed]:
    def admin(name: str, method: str, path: str, body: Any, *statuses: int) -> Malformed:
        return _refused(name, body, *statuses, path=path, method=method, key="admin")

    return [
        admin("a delta outside", "PUT", "/admin/deltas/stray", {"path": "../../etc"}, 404),
        admin("a delta by its whole path outside", "PUT", "/admin/deltas/stray", {"path": "/etc/passwd"}, 404),
        admin("a delta that is barred", "PUT", "/admin/deltas/stray", {"path": "barred"}, 422),
        admin("a name that is taken", "PUT", "/admin/deltas/t00", {"path": "t05"}, 409),
        admin("the base's name", "PUT", "/admin/deltas/base", {"path": "t05"}, 409),
        admin("a hidden name", "PUT", "/admin/deltas/.x", {"path": "t05"}, 400),
        admin("no planes", "PUT", "/admin/deltas/stray", {"path": "t05", "planes": 0}),
        admin("a delta that is not there", "DELETE", "/admin/deltas/nobody", b"", 404),
        admin("an adapter that is not there", "POST", "/v1/unload_lora_adapter", {"lora_name": "nobody"}, 404),
        admin("an adapter without a name", "POST", "/v1/load_lora_adapter", {"lora_path": "t05"}),
        admin("an adapter outside", "POST", "/v1/load_lora_adapter", {"lora_name": "q", "lora_path": "/etc"}, 404),
        admin("a role that there is not", "POST", "/admin/keys", {"name": "x", "role": "king"}),
        admin("a key for nothing", "POST", "/admin/keys", {"name": "x"}),
        admin("a quota of nothing", "PUT", "/admin/quotas/model/t00", {}),
        admin("a quota of an unknown key", "PUT", "/admin/quotas/key/nobody", {"concurrent": 1}, 404),
        admin("decisions before nothing", "GET", "/admin/decisions?before=0", b""),
    ]


def _sizes(fine: dict[str, Any]) -> list[Malformed]:
    return [
        _refused("headers of 40 kB", fine, 431, X_Filler="x" * 40_000),
        _refused("a body of 9 MB", b'{"prompt": "' + b"x" * (9 << 20), 413),
    ]


RAW = {
    "noise": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)),
    "half a header": b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le",
    "less than it says": b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %s\r\n"
    b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{",
    "two lengths": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    "a bad chunk": b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %s\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
    "a line of 100 kB": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "another protocol": b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %s\r\n"
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
    "two at once": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /nothing HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
}
"""Bytes that go down a connection which is then closed; `%s` is the place of a key."""
