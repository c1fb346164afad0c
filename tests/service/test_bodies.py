"""Bodies that are bad in many places: the first fault is told, so that none costs more than a good one."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from deltakeeper.service.openai.bodies import ChatBody, CompletionBody
from deltakeeper.service.openai.fields import Body
from deltakeeper.service.openai.tokenization import TokenizeBody
from deltakeeper.service.settings import ServiceSettings

MANY = 5000
STRANGERS = {f"k{number}": 0 for number in range(MANY)}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
TEXT = {"model": "m", "prompt": "x"}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionBody, {"model": "m", "prompt": prompt})
        for prompt in (
            [{}] * MANY,
            [[]] * MANY,
            [[{}] * MANY] * 9,
            ["x"] * MANY,
            ["x"] * 900 + [{}] * MANY,
            [1] * MANY + [{}] * MANY,
            [-1] * MANY,
            [[1], "x"] * MANY,
            {str(number): {} for number in range(MANY)},
        )
    ]
    + [(CompletionBody, TEXT | {"stop": stop}) for stop in ([{}] * MANY, ["x"] * MANY, [[]] * MANY)]
    + [
        (CompletionBody, TEXT | {"stop_token_ids": ["x"] * MANY}),
        (CompletionBody, TEXT | {"logit_bias": {str(number): {} for number in range(MANY)}}),
        (CompletionBody, TEXT | STRANGERS),
        (CompletionBody, TEXT | {"stream_options": STRANGERS}),
        (ChatBody, CHAT | {"metadata": STRANGERS}),
        (ChatBody, CHAT | {"metadata": {str(number): 0 for number in range(64)}}),
        (ChatBody, CHAT | {"tools": [{}] * MANY}),
        (ChatBody, CHAT | {"bad_words": [{}] * MANY}),
        (ChatBody, CHAT | {"chat_template_kwargs": STRANGERS}),
        (ChatBody, CHAT | {"messages": [{}] * MANY}),
        (ChatBody, CHAT | {"messages": [{"role": "user", "content": "x"} | STRANGERS] * 9}),
        (ChatBody, CHAT | {"messages": [{"role": "user", "content": [{}] * MANY}] * 9}),
        (TokenizeBody, CHAT | {"messages": [{}] * MANY}),
    ],
)
def test_the_first_fault_is_enough(kind, body):
    with pytest.raises(ValidationError) as raised:
        kind.model_validate(body)
    assert raised.value.error_count() <= 64 if "metadata" in body else raised.value.error_count() <= 4


def test_a_stranger_is_named_beside_what_is_known():
    with pytest.raises(ValidationError) as raised:
        CompletionBody.model_validate(TEXT | {"temperatur": 1, "zzz": 2, "n": 0})
    assert [error["loc"] for error in raised.value.errors()] == [("n",), ("temperatur",)]


def test_the_document_allows_null_wherever_it_is_taken():
    class Some(Body):
        """Something."""

        wanted: int
        given: int = 3
        other: str | None = None

    shown = Some.model_json_schema()
    assert "anyOf" not in shown["properties"]["wanted"] and shown["additionalProperties"] == {"type": "null"}
    for name in ("given", "other"):
        assert shown["properties"][name]["anyOf"].count({"type": "null"}) == 1
    assert Some.model_validate({"wanted": 1, "given": None, "unknown": None}) == Some(wanted=1)
    with pytest.raises(ValidationError, match="required"):
        Some.model_validate({"wanted": None})


def test_a_long_context_has_room_for_its_prompts():
    settings = ServiceSettings()
    assert settings.body_bytes(64) == settings.max_body_bytes < settings.body_bytes(1 << 20)
    assert settings.prompt_characters(100) == 1600
