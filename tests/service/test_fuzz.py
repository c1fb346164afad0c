"""Whatever a body holds, the answer is an answer or the caller's error, and the service goes on."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from service_cases import opened_services, served

from deltakeeper.service.settings import ServiceSettings

text = st.text(st.characters(), max_size=12)  # lone surrogates and control characters too
words = st.lists(st.sampled_from(["w1", "w2", "w90", "<eos>", "ü", "", "\0"]), max_size=70).map(" ".join)
numbers = st.one_of(st.none(), st.booleans(), st.integers(-3, 200), st.floats(), st.just(10**400), text)
anything = st.recursive(
    numbers, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=6
)


def maybe(good):
    """Mostly what is meant, now and then anything."""
    return st.integers(0, 29).flatmap(lambda number: anything if number == 29 else good)


words = maybe(words)
tokens = maybe(st.lists(st.integers(0, 93), max_size=70))
odd_prompts = st.sampled_from(["\ud800", [], [[]], [True], [1.0], ["w1", [1]], [-1], [95], [1 << 40], ["\ud800"], ""])
prompts = words | tokens | st.lists(words, max_size=3) | st.lists(tokens, max_size=3) | odd_prompts
common = {
    "n": maybe(st.integers(0, 4)),
    "temperature": maybe(st.floats(0, 2)),
    "top_p": maybe(st.floats(0, 1)),
    "top_k": maybe(st.integers(-1, 200)),
    "min_p": maybe(st.floats(0, 1)),
    "presence_penalty": maybe(st.floats(-2, 2)),
    "frequency_penalty": maybe(st.floats(-2, 2)),
    "repetition_penalty": maybe(st.floats(0.1, 2)),
    "seed": maybe(st.integers(-(1 << 63), (1 << 63) - 1)),
    "stop": maybe(words | st.lists(words, max_size=5)),
    "stop_token_ids": maybe(tokens),
    "ignore_eos": maybe(st.booleans()),
    "stream": maybe(st.booleans()),
    "stream_options": maybe(st.fixed_dictionaries({"include_usage": maybe(st.booleans())})),
    "user": maybe(text),
    "logit_bias": maybe(st.just({})),
    "max_tokens": maybe(st.integers(0, 70)),
}
model = maybe(st.sampled_from(["base", "signs", "ranks", "nobody", "../base"]))
message = st.fixed_dictionaries(
    {"role": maybe(st.sampled_from(["user", "system", "developer"])), "content": maybe(words)},
    optional={"name": maybe(text)},
)
completion = st.fixed_dictionaries(
    {"model": model, "prompt": prompts},
    optional=common
    | {
        "echo": maybe(st.booleans()),
        "logprobs": maybe(st.integers(-1, 101)),
        "add_special_tokens": maybe(st.booleans()),
    },
)
chat = st.fixed_dictionaries(
    {"model": model, "messages": maybe(st.lists(message, max_size=3))},
    optional=common | {"logprobs": maybe(st.booleans()), "top_logprobs": maybe(st.integers(-1, 101))},
)
extra = st.dictionaries(text, anything, max_size=1)


@pytest.fixture(scope="module")
def client(service_folder):
    with (
        opened_services(service_folder, settings=ServiceSettings(max_choices=8)) as services,
        served(services) as live,
        live.client() as client,
    ):
        yield client


def check(client, path, body):
    # Python's writer also spells what JSON has no word for: NaN, and halves of characters
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    if answer.status_code == 200:
        if answer.headers["content-type"].startswith("text/event-stream"):
            frames = answer.text.split("\n\n")
            assert frames[-2:] == ["data: [DONE]", ""], frames
            assert all("error" not in json.loads(frame[6:]) for frame in frames[:-2])
        else:
            assert answer.json()["choices"]
    else:
        assert answer.status_code in (400, 404), answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return answer.status_code


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(body=completion, odd=extra)
def test_completions_never_fail(client, body, odd):
    check(client, "/v1/completions", odd | body)


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(body=chat, odd=extra)
def test_chats_never_fail(client, body, odd):
    check(client, "/v1/chat/completions", odd | body)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(body=st.binary(max_size=64) | anything.map(lambda value: json.dumps(value).encode()), path=text)
def test_other_bodies_and_paths_never_fail(client, body, path):
    answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    name = path.encode("utf-8", "surrogatepass").hex("%")
    found = client.get(f"/v1/models/%{name}" if name else "/v1/models")
    assert found.status_code in (200, 404)


def test_what_is_meant_is_mostly_answered(client):
    """The strategies above reach the engine: or their tests would hold of a service that refuses everything."""
    assert check(client, "/v1/completions", {"model": "base", "prompt": "w1", "max_tokens": 2}) == 200
    answered = []

    @settings(max_examples=100, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
    @given(body=completion)
    def count(body):
        answered.append(check(client, "/v1/completions", body))

    count()
    assert answered.count(200) >= 10
