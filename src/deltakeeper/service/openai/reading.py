"""Reading answers: whole, or chunk by chunk with the usage that was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive

from deltakeeper.engine.stream import Token
from deltakeeper.service.openai.answering import Answering
from deltakeeper.service.openai.asking import Exchange
from deltakeeper.service.openai.bodies import StreamOptions


async def read_whole(answering: Answering, receive: Receive) -> list[list[Token]]:
    """Wait for all answers, and give the tokens of each; they are ended if the client goes.

    Raises:
        ServiceError: one of them broke off.
    """
    watcher = asyncio.create_task(answering.watch(receive))
    tokens: list[list[Token]] = [[] for _ in answering.streams]
    try:
        async for part in answering.parts():
            if part is not None:
                tokens[part.choice] += part.tokens
        return tokens
    finally:
        watcher.cancel()
        answering.close()


async def answer_json(
    exchange: Exchange, choices: Callable[[], list[dict[str, Any]]], usage: dict[str, Any], *, long: bool
) -> JSONResponse:
    """A whole answer.

    Args:
        exchange: what it is part of.
        choices: makes them.
        usage: of tokens.
        long: whether they are made on a thread, since log-probabilities may be many.
    """

    def write() -> JSONResponse:
        return JSONResponse(exchange.envelope(choices()) | {"usage": usage})

    return await asyncio.to_thread(write) if long else write()


async def with_usage(
    chunks: AsyncIterator[dict[str, Any] | None],
    options: StreamOptions | None,
    answering: Answering,
    exchange: Exchange,
) -> AsyncIterator[dict[str, Any] | None]:
    """The chunks of a stream with the usage that `stream_options` ask for."""
    wanted = options is not None and options.include_usage
    always = options is not None and options.continuous_usage_stats
    async for chunk in chunks:
        if chunk is not None and (wanted or always):
            chunk["usage"] = answering.usage() if always else None
        yield chunk
    if wanted:
        yield exchange.envelope([]) | {"usage": answering.usage()}
