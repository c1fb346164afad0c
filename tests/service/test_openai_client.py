"""The `openai` package, as it is, against a live server: what it says must be what the engine alone says."""

from __future__ import annotations

import asyncio
import math

import openai
import pytest
from service_cases import PROMPT, FakeGate, opened_services, served

from deltakeeper.engine import Request, Sampling
from deltakeeper.service.settings import ServiceSettings

LIMITS = ServiceSettings(max_logprob_entries=1000)


@pytest.fixture(scope="module")
def live(service_folder):
    with opened_services(service_folder, gate=FakeGate(), settings=LIMITS) as services, served(services) as live:
        yield live


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def encode(live, text):
    return tuple(live.services.base.tokenizer(text)["input_ids"])


def alone(live, text, tenant=None, **settings):
    """The engine's own answer."""
    (found,) = live.services.engine.generate([Request(encode(live, text), tenant=tenant, **settings)])
    return found


CHAT = [{"role": "user", "content": PROMPT}]


@pytest.mark.parametrize(
    ("model", "asked"),
    [("base", f"w0 {PROMPT} w1 w2"), ("ranks", f"w0 {PROMPT} w1 w2"), ("signs", f"w7 {PROMPT}")],
)
def test_chats_of_base_and_tenants_are_the_engines_answers_in_their_own_templates(client, live, model, asked):
    found = client.chat.completions.create(model=model, messages=CHAT, max_tokens=8, temperature=0)
    expected = alone(live, asked, None if model == "base" else model, max_new_tokens=8)
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (
        len(encode(live, asked)),
        len(expected.tokens),
    )
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert (found.object, found.model) == ("chat.completion", model)


def test_a_streamed_chat_is_the_whole_one_and_says_its_usage_last(client):
    asked = {"model": "ranks", "messages": CHAT, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert {c.id for c in chunks} == {chunks[0].id} and all(c.usage is None for c in chunks[:-1])


def test_the_asynchronous_client_runs_many_tenants_side_by_side(live):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as client:

            async def one(model, streaming):
                asked = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
                if not streaming:
                    return (await client.completions.create(**asked)).choices[0].text
                text = ""
                async for chunk in await client.completions.create(**asked, stream=True):
                    text += chunk.choices[0].text
                return text

            names = ["base", "signs", "ranks"] * 6
            return names, await asyncio.gather(*(one(name, at % 2 == 0) for at, name in enumerate(names)))

    names, texts = asyncio.run(run())
    expected = {n: alone(live, PROMPT, None if n == "base" else n, max_new_tokens=12).text for n in set(names)}
    assert texts == [expected[name] for name in names]
    assert len(set(expected.values())) == 3


def test_choices_of_a_seed_differ_and_come_again(client):
    asked = {"model": "base", "prompt": [PROMPT, "w9 w10"], "n": 3, "seed": 5, "max_tokens": 10, "temperature": 1.5}
    first, again = (client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 6 and [choice.index for choice in first.choices] == list(range(6))
    assert first.usage.prompt_tokens == 6  # once a prompt, not once an answer
    whole = client.completions.create(**asked | {"n": 1, "prompt": PROMPT})
    assert whole.choices[0].text == texts[0]
    streamed = [""] * 6
    for chunk in client.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(client, live):
    text = alone(live, PROMPT, max_new_tokens=10).text
    words = text.split(" ")[1:]
    stop = words[3]
    assert stop not in words[:3]
    for stops in (stop, [stop, "never"]):
        found = client.completions.create(model="base", prompt=PROMPT, max_tokens=10, temperature=0, stop=stops)
        assert found.choices[0].text == " " + " ".join([*words[:3], ""])
        assert found.choices[0].finish_reason == "stop"


def test_echo_rates_the_prompt_as_the_engine_does_and_as_lm_eval_reads_it(client, live):
    ids = list(encode(live, "w5 w6 w7 w8 w9"))
    expected = alone(
        live, "w5 w6 w7 w8 w9", "signs", max_new_tokens=1, prompt_logprobs=1, sampling=Sampling(logprobs=1)
    )
    rated = [None, *(entry.chosen for entry in expected.prompt_logprobs[1:])]
    best = [None, *(entry.top[0][1] for entry in expected.prompt_logprobs[1:])]
    for prompt, most in ((ids, 1), (ids, 0), ("w5 w6 w7 w8 w9", 1)):
        found = client.completions.create(
            model="signs", prompt=prompt, max_tokens=most, echo=True, logprobs=1, temperature=0, seed=1234
        )
        logprobs = found.choices[0].logprobs
        assert logprobs.token_logprobs[:5] == pytest.approx(rated)
        assert [None, *(max(top.values()) for top in logprobs.top_logprobs[1:5])] == pytest.approx(best)
        assert len(logprobs.tokens) == len(logprobs.text_offset) == 5 + most
        assert found.choices[0].text == "w5 w6 w7 w8 w9" + (expected.text if most else "")
        assert found.usage.completion_tokens == most
    several = client.completions.create(model="signs", prompt=[ids, ids[:3]], max_tokens=1, echo=True, logprobs=1)
    assert [len(choice.logprobs.tokens) for choice in several.choices] == [6, 4]
    chunks = list(
        client.completions.create(model="signs", prompt=ids, max_tokens=2, echo=True, logprobs=1, stream=True)
    )
    listed = [chunk.choices[0].logprobs for chunk in chunks]  # the last one may only say why it ended
    streamed = [value for entry in listed if entry for value in entry.token_logprobs]
    assert streamed[:5] == pytest.approx(rated) and len(streamed) == 7


def test_log_probabilities_of_a_chat_are_those_of_the_engine(client, live):
    found = client.chat.completions.create(
        model="base", messages=CHAT, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    expected = alone(live, f"w0 {PROMPT} w1 w2", max_new_tokens=4, sampling=Sampling(logprobs=3))
    entries = found.choices[0].logprobs.content
    assert [entry.logprob for entry in entries] == pytest.approx([e.chosen for e in expected.logprobs])
    assert all(len(entry.top_logprobs) == 3 and bytes(entry.bytes).decode() == entry.token for entry in entries)
    assert all(math.isclose(entry.top_logprobs[0].logprob, entry.logprob) for entry in entries)  # greedy


def test_models_are_the_base_and_its_tenants(client):
    cards = {card.id: card for card in client.models.list()}
    assert set(cards) == {"base", "signs", "ranks"}
    assert (cards["base"].parent, cards["signs"].parent) == (None, "base")
    client.completions.create(model="ranks", prompt=PROMPT, max_tokens=1)
    shown = client.models.retrieve("ranks")
    assert len(shown.root) == 64 and "/" not in shown.root
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


@pytest.mark.parametrize(
    ("error", "param", "asked"),
    [
        (openai.NotFoundError, "model", {"model": "nobody"}),
        (openai.BadRequestError, "temperature", {"temperature": -1}),
        (openai.BadRequestError, "messages", {"messages": [{"role": "user", "content": "w1 " * 70}]}),
        (openai.BadRequestError, "messages.0.role", {"messages": [{"role": "robot", "content": "w1"}]}),
        (openai.BadRequestError, "n", {"n": 1000}),
        (openai.BadRequestError, "stop", {"stop": ["w1"] * 17}),
        (openai.BadRequestError, "tools", {"tools": [{"type": "function"}]}),
        (openai.BadRequestError, "logit_bias", {"logit_bias": {"1": 5}}),
        (openai.BadRequestError, "temperatur", {"extra_body": {"temperatur": 1}}),
    ],
)
def test_errors_are_those_that_the_client_knows_and_name_the_parameter(client, error, param, asked):
    with pytest.raises(error) as raised:
        client.chat.completions.create(**{"model": "base", "messages": CHAT} | asked)
    assert raised.value.param == param
    assert raised.value.type in ("BadRequestError", "NotFoundError") and raised.value.body["message"].endswith(".")


def test_a_prompt_may_fill_the_context_but_for_one_token(client):
    found = client.completions.create(model="base", prompt=[5] * 63, max_tokens=100)
    assert found.usage.completion_tokens == 1 and found.choices[0].finish_reason in ("length", "stop")
    with pytest.raises(openai.BadRequestError, match="may have 64 together") as raised:
        client.completions.create(model="base", prompt=[5] * 64)
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model="signs", prompt=[500])
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.completions.create(model="base", prompt="")
    with pytest.raises(openai.BadRequestError, match="The prompt has a token outside the vocabulary") as raised:
        client.completions.create(model="base", prompt=[500])
    assert raised.value.param == "prompt"


def test_an_answer_goes_back_as_the_client_has_it(client):
    turns = [*CHAT]
    for shape in (lambda message: message, lambda message: message.model_dump()):
        said = client.chat.completions.create(model="base", messages=turns, max_tokens=2).choices[0].message
        turns += [shape(said), {"role": "user", "content": "w1"}]
    found = client.chat.completions.create(model="base", messages=turns, max_tokens=2)
    plain = [{"role": turn["role"], "content": turn["content"]} for turn in map(dict, turns)]
    alike = client.chat.completions.create(model="base", messages=plain, max_tokens=2)
    assert found.usage.prompt_tokens == alike.usage.prompt_tokens > 8
    quiet = [*CHAT, {"role": "assistant", "content": None, "tool_calls": [], "refusal": None}, *CHAT]
    assert client.chat.completions.create(model="base", messages=quiet, max_tokens=1).choices
    with pytest.raises(openai.BadRequestError, match="content is missing"):
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": None}])


@pytest.mark.parametrize(
    "more",
    [
        {"n": None, "stream": None, "temperature": None, "tool_choice": None, "anything": None},
        {"skip_special_tokens": True, "spaces_between_special_tokens": True, "min_tokens": 0, "length_penalty": 1.0},
        {"chat_template_kwargs": {}, "add_generation_prompt": True, "bad_words": [], "reasoning_effort": "none"},
        {"stream_options": {"include_obfuscation": False}, "include_stop_str_in_output": False, "priority": 0},
    ],
)
def test_what_is_null_or_is_done_anyway_is_taken(client, more):
    assert client.chat.completions.create(model="base", messages=CHAT, max_tokens=1, extra_body=more).choices


def test_salts_of_one_key_keep_its_users_apart(client):
    cached = [
        client.completions.create(
            model="base", prompt=[9] * 40, max_tokens=1, extra_body={"cache_salt": salt}
        ).usage.prompt_tokens_details.cached_tokens
        for salt in ("a", "a", "b", "")
    ]
    assert cached[1] >= 32 and cached[0] == cached[2] == cached[3] == 0


def test_an_echoed_prompt_of_one_token_is_listed(client):
    for most in (0, 2):
        found = client.completions.create(model="base", prompt=[9], max_tokens=most, echo=True, logprobs=1).choices[0]
        listed = found.logprobs
        assert (listed.tokens[0], listed.token_logprobs[0], listed.top_logprobs[0]) == ("w5", None, None)
        assert len(listed.tokens) == len(listed.text_offset) == 1 + most
        assert listed.text_offset[:2] == [0, 2][: 1 + most] and found.text.startswith("w5")


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_rated_once_for_all_its_answers(client, live, monkeypatch, stream):
    handed, submit = [], live.services.engine.submit
    monkeypatch.setattr(
        live.services.engine, "submit", lambda request, wake: (handed.append(request), submit(request, wake))[1]
    )
    asked = {"model": "base", "prompt": [[9, 10, 11, 12], [9, 13]], "max_tokens": 2, "temperature": 1, "seed": 3}
    found = client.completions.create(**asked, n=3, echo=True, logprobs=1, stream=stream)
    rated = [[] for _ in range(6)]
    for choice in [one for chunk in found for one in chunk.choices] if stream else found.choices:
        rated[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
    assert [request.prompt_logprobs for request in handed] == [1, None, None, 1, None, None]
    assert [len(one) for one in rated] == [6, 6, 6, 4, 4, 4]
    assert rated[0][:4] == rated[1][:4] == rated[2][:4] and rated[3][:2] == rated[5][:2] and rated[0][0] is None


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"logprobs": 21}, "at most 20"),
        ({"logprobs": 20, "prompt": [[5] * 60] * 8, "max_tokens": 60}, "1000 is the most"),
        ({"prompt": "w" * 1025}, "1024 characters"),
        ({"prompt": ["w5", "w" * 1025]}, "1024 characters"),
    ],
)
def test_what_would_cost_too_much_is_refused_before_it_does(client, live, monkeypatch, asked, told):
    monkeypatch.setattr(live.server.config.app.state.texts.base, "encode", None)
    monkeypatch.setattr(live.services.engine, "submit", None)
    with pytest.raises(openai.BadRequestError, match=told):
        client.completions.create(**{"model": "base", "prompt": [5], "echo": True} | asked)


def test_tokens_of_texts_and_chats_are_those_that_are_asked(live):
    with live.client() as client:
        text = client.post("/tokenize", json={"model": "signs", "prompt": PROMPT, "return_token_strs": True}).json()
        assert text["tokens"] == list(encode(live, PROMPT)) and text["count"] == len(text["tokens"])
        assert text["token_strs"][-1] == "w8" and text["max_model_len"] == 64
        chat = client.post("/tokenize", json={"model": "base", "messages": CHAT}).json()
        assert chat["tokens"] == list(encode(live, f"w0 {PROMPT} w1 w2")) and chat["token_strs"] is None
        for bad in ({}, {"prompt": "w1", "messages": CHAT}, {"prompt": "w" * 1025}, {"prompt": ["w1"]}):
            assert client.post("/tokenize", json={"model": "base"} | bad).status_code == 400
        assert client.post("/tokenize", json={"model": "nobody", "prompt": "w1"}).status_code == 404
