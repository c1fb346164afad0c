"""One HTTP request on the engine: taken in under quotas, read as tokens come, and ended with its client."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from starlette.types import Receive

from deltakeeper.engine import Request
from deltakeeper.engine.stream import Stream, Token
from deltakeeper.errors import EngineError, TenantError
from deltakeeper.service.access import Principal
from deltakeeper.service.bell import Bell
from deltakeeper.service.error_answers import service_error_of
from deltakeeper.service.errors import ServiceError, Unavailable
from deltakeeper.service.health import check_taking
from deltakeeper.service.running import Services
from deltakeeper.service.tenants import check_still_there

_log = logging.getLogger("deltakeeper.service")


class Part(NamedTuple):
    """What came for one answer of a request.

    Attributes:
        choice: which of them.
        tokens: those that are new.
        ended: whether they are the last.
    """

    choice: int
    tokens: list[Token]
    ended: bool


class AnswerFailedError(ServiceError):
    """An answer that broke off; the reason stands in the log, since it may name what is not the caller's."""

    status, kind = 500, "InternalServerError"


class Answering:
    """All answers that one HTTP request asked for.

    Args:
        services: the running service.
        principal: who asks.
        model: name of what is asked.
        requests: one an answer: `choices` for the first prompt, then those for the second, and so on.
        choices: answers to each prompt; its tokens are counted once.
        counted: whether tokens of answers are; not where only prompts are rated, since the engine makes one anyway.
        arrived: when the request came, in seconds of `time.perf_counter()`; now by default.

    Raises:
        TooManyRequests: the caller's or the model's quota is used up.
        BadRequest: it is too small for all that is asked at once.
        Unavailable: the engine is full or stopping.
        NotFound: the tenant was removed meanwhile.
        ServiceError: a request could never be served.
    """

    def __init__(
        self,
        services: Services,
        principal: Principal,
        model: str,
        requests: Sequence[Request],
        *,
        choices: int = 1,
        counted: bool = True,
        arrived: float | None = None,
    ) -> None:
        check_taking(services)
        self.model, self.gone, self._counted = model, False, counted
        self.streams: list[Stream] = []
        self._services, self._event, self._held = services, asyncio.Event(), ExitStack()
        self._choices, self._counts, self._closed = choices, [0] * len(requests), False
        self._allowed: list[int] = []  # tokens of an answer, by prompt
        wake = Bell(asyncio.get_running_loop(), self._event).ring
        try:
            tokens = sum(len(request.prompt) for request in requests[::choices])
            self._usage = self._held.enter_context(services.gate.admit(principal, model, tokens, len(requests)))
            for request in requests:
                self.streams.append(services.engine.submit(request, wake))
                if arrived is not None:
                    self.streams[-1].times.submitted = arrived
            self._allowed += (request.max_new_tokens if counted else 0 for request in requests[::choices])
        except EngineError as error:
            self.close()
            check_taking(services)
            if isinstance(error, TenantError):
                check_still_there(services, model)
            raise service_error_of(error, services.settings.retry_seconds) from error
        except BaseException:
            self.close()
            raise

    async def parts(self, quiet_seconds: float | None = None) -> AsyncIterator[Part | None]:
        """What comes, until all answers have ended; None after each `quiet_seconds` in which nothing came.

        Raises:
            AnswerFailedError: the engine could not go on with an answer.
            Refused: a canary failed while the request waited for it.
            NotFound: the tenant was removed meanwhile.
            Unavailable: the service stopped before it was complete.
        """
        running = dict(enumerate(self.streams))
        last = [0.0] * len(self.streams)
        while running:
            try:
                async with asyncio.timeout(quiet_seconds):
                    await self._event.wait()
            except TimeoutError:
                yield None
                continue
            self._event.clear()
            for choice, stream in list(running.items()):
                tokens = stream.take()
                if tokens:
                    self._count(choice, len(tokens), last)
                if stream.ended:
                    del running[choice]
                    self._check_end(stream)
                if tokens or stream.ended:
                    yield Part(choice, tokens, stream.ended)

    async def watch(self, receive: Receive) -> None:
        """Wait until the client is gone, and end all answers then."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        for stream in self.streams:
            stream.cancel()

    def close(self) -> None:
        """End what still runs and give the places back; harmless twice."""
        if self._closed:
            return
        self._closed = True
        for stream in self.streams:
            if stream.finish_reason is None:
                stream.cancel()
        self._held.close()
        told = [one for one in (self._services.metrics, self._services.traces) if one is not None]
        for stream, count in zip(self.streams, self._counts, strict=False):
            for one in told:
                one.answered(self.model, stream, count)
        if self._services.metrics is not None:
            for at, allowed in enumerate(self._allowed):
                self._services.metrics.prompt_done(self._counts[at * self._choices :][: self._choices], allowed)

    def broke_off(self, request_id: str | None, error: ServiceError) -> None:
        """Log that a stream of the answers ended with an error."""
        self._tell(logging.WARNING, str(error), "request %s broke off: %s", request_id, error)

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage`, so far."""
        prompts, made = self.streams[:: self._choices], sum(self._counts)
        asked = sum(stream.prompt_tokens for stream in prompts)
        return {
            "prompt_tokens": asked,
            "completion_tokens": made,
            "total_tokens": asked + made,
            "prompt_tokens_details": {"cached_tokens": sum(stream.cached_tokens for stream in prompts)},
        }

    def _count(self, choice: int, tokens: int, last: list[float]) -> None:
        if self._counted:
            self._counts[choice] += tokens
            self._usage.spend(tokens)
        metrics, now, times = self._services.metrics, time.perf_counter(), self.streams[choice].times
        if metrics is not None and not last[choice]:
            metrics.first_token(self.model, times.first_token - times.submitted)
        elif metrics is not None:
            for _ in range(tokens):
                metrics.token_after(self.model, (now - last[choice]) / tokens)
        last[choice] = now

    def _check_end(self, stream: Stream) -> None:
        if stream.finish_reason == "error":
            text = "request %s: an answer of %s broke off: %s"
            self._tell(logging.ERROR, str(stream.error), text, stream.id, self.model, stream.error)
        if stream.finish_reason == "error" and stream.code is not None:
            raise Unavailable(str(stream.error), code=stream.code, retry_after=self._services.settings.retry_seconds)
        if stream.finish_reason == "error" and self._services.engine.alive:
            if self.model != self._services.base_name and not stream.times.admitted:
                check_still_there(self._services, self.model)
            raise AnswerFailedError(
                f"The model '{self.model}' could not go on with its answer; the service's log says why, under this "
                "request id."
            )
        if stream.finish_reason in ("error", "cancelled") and not self.gone:
            raise Unavailable(
                "The service stopped before the answer was complete; ask again.",
                code="stopped",
                retry_after=self._services.settings.retry_seconds,
            )

    def _tell(self, level: int, why: str, text: str, *arguments: object) -> None:
        self._services.notes.repeats.log(_log, level, self.model, why, text, *arguments)
