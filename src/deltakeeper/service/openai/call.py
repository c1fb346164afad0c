"""The beginning that both ways of asking share: a request is taken, within limits, and its model is there."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request

from deltakeeper.errors import SideFileError, TenantError
from deltakeeper.service.access import Principal
from deltakeeper.service.errors import BadRequest, ServiceError, TooManyRequests
from deltakeeper.service.health import check_taking
from deltakeeper.service.openai.bodies import ChatBody, CompletionBody
from deltakeeper.service.running import Services
from deltakeeper.service.settings import ServiceSettings
from deltakeeper.service.tenants import Model, check_known, find_model, words_failed

_T = TypeVar("_T")


@dataclass(frozen=True)
class Call:
    """One request to a model.

    Attributes:
        services: the running service.
        principal: who asks; what they asked before is never shared with others, not even by its timing.
        model: what is asked.
        arrived: when the request came, in seconds of `time.perf_counter()`; a client waits for a cold tenant too.
        request_id: by which the engine's errors and the log call it.
    """

    services: Services
    principal: Principal
    model: Model
    arrived: float
    request_id: str

    async def read(self, read: Callable[..., _T], *arguments: Any) -> _T:
        """Make something of a prompt with the model's words, when it is this key's turn; raises as `Words.run`."""
        seconds = self.services.settings.encode_seconds
        return await self.model.words.run(self.principal.key_id, seconds, read, *arguments)


@asynccontextmanager
async def open_call(request: Request, body: ChatBody | CompletionBody, prompts: int) -> AsyncIterator[Call]:
    """Take a request, and see to it that its model is loaded; inside the block it is made ready and handed in.

    A request that is refused there, for any reason but a quota, keeps no place in a quota's line. Whatever is not taken
    for want of room is counted.

    Args:
        request: of HTTP.
        body: what it asks.
        prompts: how many.

    Raises:
        BadRequest: it asks for too many things at once.
        NotFound: there is no such model, or not for this key.
        TooManyRequests: a quota is used up; nothing is loaded then, and no prompt is read.
        Refused: policy keeps the model out, or its own tokenizer fails on a prompt.
        Unavailable: the service is stopping, or the model cannot be loaded now.
    """
    check_sizes(body, prompts, request.app.state.services.settings)
    async with enter_call(request, body.model, prompts * body.n) as call:
        yield call


@asynccontextmanager
async def enter_call(request: Request, name: str, answers: int) -> AsyncIterator[Call]:
    """Take a request whose sizes are within limits, as `open_call` does; it may want no answers at all."""
    arrived = time.perf_counter()
    services: Services = request.app.state.services
    principal = request.state.principal
    with _counting(services):
        check_taking(services)
        await check_known(services, principal, name)
        services.gate.check(principal, name, answers)
        with _standing(services, principal, name, answers):
            model = await find_model(services, request.app.state.texts, principal, name)
            try:
                yield Call(services, principal, model, arrived, request.state.request_id)
            except (SideFileError, TenantError) as error:
                raise words_failed(services, name, error) from error


@contextmanager
def _counting(services: Services) -> Iterator[None]:
    """Count what is not taken for want of room."""
    try:
        yield
    except ServiceError as error:
        reason = "quota" if isinstance(error, TooManyRequests) else error.code
        if services.metrics is not None and reason in ("quota", "queue_full", "draining"):
            services.metrics.rejected(reason)
        raise


@contextmanager
def _standing(services: Services, principal: Principal, name: str, answers: int) -> Iterator[None]:
    """Keep the place of a request that passed the quotas' check, until it is admitted or comes to nothing."""
    try:
        yield
    except TooManyRequests:  # it stands in the line, and comes back
        raise
    except BaseException:
        if answers:
            services.gate.withdraw(principal, name)
        raise


def check_sizes(body: ChatBody | CompletionBody, prompts: int, settings: ServiceSettings) -> None:
    """Refuse what asks for too many things at once.

    Raises:
        BadRequest: names the parameter.
    """
    if prompts > settings.max_prompts:
        raise BadRequest(
            f"{prompts} prompts are too many; send at most {settings.max_prompts} in a request.", param="prompt"
        )
    if prompts * body.n > settings.max_choices:
        raise BadRequest(
            f"{prompts * body.n} answers are too many; ask for at most {settings.max_choices} in a request.", param="n"
        )
    if len(body.stops) > settings.max_stop_strings or any(len(t) > settings.max_stop_characters for t in body.stops):
        raise BadRequest(
            f"The stop strings are too many or too long; give at most {settings.max_stop_strings} of at most "
            f"{settings.max_stop_characters} characters.",
            param="stop",
        )
    if (body.rated or 0) > settings.max_logprobs:
        raise BadRequest(
            f"{body.rated} log-probabilities a token are too many; ask for at most {settings.max_logprobs}.",
            param=body.rated_by,
        )


def check_length(characters: int, call: Call, param: str) -> None:
    """Refuse a text that cannot fit, before anybody makes tokens of it.

    Raises:
        BadRequest: it has more characters than any tokens of the context.
    """
    context = call.services.engine.context
    most = call.services.settings.prompt_characters(context)
    if characters > most:
        raise BadRequest(
            f"The prompt has {characters} characters, but prompt and answer may have {context} tokens together and "
            f"{most} characters are the most that is tried; shorten it.",
            param=param,
            code="context_length_exceeded",
        )
