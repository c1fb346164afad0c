"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from deltakeeper.service.guard import require
from deltakeeper.service.openai.answering import Answering
from deltakeeper.service.openai.asking import Exchange, ask, check_prompt, open_exchange
from deltakeeper.service.openai.bodies import ChatBody, Message
from deltakeeper.service.openai.call import Call, check_length, open_call
from deltakeeper.service.openai.events import DOCUMENTED, EventStream
from deltakeeper.service.openai.logprobs import chat_logprobs
from deltakeeper.service.openai.reading import answer_json, read_whole, with_usage
from deltakeeper.service.texts import Words

router = APIRouter(prefix="/v1", tags=["inference"], dependencies=[require("ask")])


@router.post("/chat/completions", response_model=None, responses=DOCUMENTED)
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Answer a chat, in the model's own template."""
    async with open_call(request, body, 1) as call:
        services, model = call.services, call.model
        prompt = await encode_messages(call, body.messages)
        check_prompt(prompt, model, services.engine.context, "messages")
        answering = ask(call, body, [prompt], longest=body.longest)
    reported = model.words if body.logprobs else None
    if body.stream:
        exchange = open_exchange("chatcmpl", "chat.completion.chunk", body.model)
        chunks = _chunks(exchange, answering, reported, services.settings.keep_alive_seconds)
        return EventStream(with_usage(chunks, body.stream_options, answering, exchange), answering)
    answers = await read_whole(answering, request.receive)
    exchange = open_exchange("chatcmpl", "chat.completion", body.model)

    def choices() -> list[dict[str, Any]]:
        return [
            {
                "index": choice,
                "message": {"role": "assistant", "content": "".join(token.text for token in tokens), "refusal": None},
                "logprobs": None if reported is None else chat_logprobs(reported, tokens),
                "finish_reason": answering.streams[choice].finish_reason,
            }
            for choice, tokens in enumerate(answers)
        ]

    return await answer_json(exchange, choices, answering.usage(), long=reported is not None)


async def encode_messages(call: Call, messages: Sequence[Message]) -> list[int]:
    """Token ids of a chat in the model's own template, ready for an answer.

    Raises:
        BadRequest: it is too long, or the template does not take it.
        Unavailable: it took too long.
    """
    turns, words = [message.turn() for message in messages], call.model.words
    check_length(sum(len(turn["content"]) for turn in turns), call, "messages")
    return await words.chat(call.principal.key_id, call.services.settings.encode_seconds, turns)


async def _chunks(
    exchange: Exchange, answering: Answering, reported: Words | None, quiet_seconds: float
) -> AsyncIterator[dict[str, Any] | None]:
    for choice in range(len(answering.streams)):
        yield _chunk(exchange, choice, {"role": "assistant", "content": ""}, None, None)
    async for part in answering.parts(quiet_seconds):
        if part is None:
            yield None
            continue
        text = "".join(token.text for token in part.tokens)
        logprobs = None if reported is None or not part.tokens else chat_logprobs(reported, part.tokens)
        reason = answering.streams[part.choice].finish_reason if part.ended else None
        if text or logprobs or reason:
            yield _chunk(exchange, part.choice, {"content": text} if text or logprobs else {}, logprobs, reason)


def _chunk(
    exchange: Exchange, choice: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    return exchange.envelope([{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])
