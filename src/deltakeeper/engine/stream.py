"""What comes back: tokens as they are made, and the whole answer at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities at one position.

    Attributes:
        chosen: of the token that stands there.
        top: token ids and log-probabilities, likeliest first, as many as were asked for.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


class Token(NamedTuple):
    """One token of an answer.

    Attributes:
        id: token id.
        text: text that became certain with this token; empty while a character or a possible stop string is
            incomplete, so the texts of all tokens together are the answer.
        logprobs: if asked for.
    """

    id: int
    text: str
    logprobs: Logprobs | None


@dataclass(frozen=True)
class Completion:
    """A whole answer.

    Attributes:
        id: that of the request.
        tokens: ids of the answer, a stop token included.
        text: its text, cut before a stop string.
        finish_reason: `stop` (end-of-text, stop token or stop string), `length`, `cancelled` or `error`.
        stop: what stopped it: the string, the token id, or None.
        error: what went wrong, if anything.
        logprobs: one entry a token, if asked for.
        prompt_logprobs: one entry a prompt token, None for the first, if asked for.
        prompt_tokens: length of the prompt.
        cached_tokens: prompt tokens whose keys and values were found in the cache.
    """

    id: str
    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stop: str | int | None = None
    error: str | None = None
    logprobs: tuple[Logprobs, ...] | None = None
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass
class Times:
    """Moments of a request, in seconds of `time.perf_counter()`; 0 until they come."""

    submitted: float = field(default_factory=time.perf_counter)
    admitted: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0


class Stream:
    """The answer to one request, while it is made; iterate over it for tokens.

    One thread may read while the engine's writes. Iteration ends when the answer does; `finish_reason` then says why.
    """

    def __init__(
        self,
        request_id: str,
        prompt_tokens: int,
        wake: Callable[[], None] | None = None,
        on_cancel: Callable[[], None] | None = None,
    ) -> None:
        """Make an empty stream.

        Args:
            request_id: that of the request.
            prompt_tokens: length of its prompt.
            wake: called on the engine's thread after each token and at the end; must be quick and must not raise.
            on_cancel: called on the reader's thread by the first `cancel`.
        """
        self.id = request_id
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.times = Times()
        self.prompt_logprobs: list[Logprobs | None] | None = None
        self.finish_reason: FinishReason | None = None
        self.stop: str | int | None = None
        self.error: str | None = None
        self.code: str | None = None
        self._wake, self._on_cancel = wake, on_cancel
        self._events: SimpleQueue[Token | None] = SimpleQueue()
        self._tokens: list[Token] = []
        self._cancelled = False
        self._ended = False  # the reader has seen the end

    def __iter__(self) -> Iterator[Token]:
        while (token := self.get()) is not None:
            yield token

    def get(self, timeout: float | None = None) -> Token | None:
        """The next token, or None when the answer has ended.

        Raises:
            TimeoutError: none came within `timeout` seconds.
        """
        if self._ended:
            return None
        try:
            token = self._events.get(timeout=timeout)
        except Empty:
            raise TimeoutError(f"request {self.id} gave no token within {timeout} seconds.") from None
        self._ended = token is None
        return token

    def take(self) -> list[Token]:
        """Tokens that are there already, without waiting; `ended` says whether more can come."""
        tokens: list[Token] = []
        while not self._ended and not self._events.empty():
            token = self._events.get_nowait()
            if token is None:
                self._ended = True
            else:
                tokens.append(token)
        return tokens

    @property
    def ended(self) -> bool:
        """Whether the reader has seen the last token."""
        return self._ended

    def cancel(self) -> None:
        """Ask for the end; the engine frees everything at its next step. Harmless when the answer has ended."""
        if not self._cancelled:
            self._cancelled = True
            if self._on_cancel is not None:
                self._on_cancel()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end and give the whole answer.

        Raises:
            TimeoutError: no further token came within `timeout` seconds.
        """
        while self.get(timeout) is not None:
            pass
        return self.completion()

    def completion(self) -> Completion:
        """The answer as far as it goes; meant for after the end."""
        tokens = list(self._tokens)
        logprobs = tuple(token.logprobs for token in tokens if token.logprobs is not None)
        return Completion(
            id=self.id,
            tokens=tuple(token.id for token in tokens),
            text="".join(token.text for token in tokens),
            finish_reason=self.finish_reason or "cancelled",
            stop=self.stop,
            error=self.error,
            logprobs=logprobs or None,
            prompt_logprobs=None if self.prompt_logprobs is None else tuple(self.prompt_logprobs),
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
        )

    def put(self, token: Token) -> None:
        """Add a token (the engine's side)."""
        self._tokens.append(token)
        self._events.put(token)
        if self._wake is not None:
            self._wake()

    def end(
        self,
        reason: FinishReason,
        *,
        stop: str | int | None = None,
        error: str | None = None,
        code: str | None = None,
    ) -> None:
        """End the answer (the engine's side); the first call counts.

        Args:
            reason: why.
            stop: what stopped it.
            error: what went wrong.
            code: a word for that, where it is known and whoever asked may be told.
        """
        if self.finish_reason is not None:
            return
        self.stop, self.error, self.code = stop, error, code
        self.finish_reason = reason
        self.times.finished = time.perf_counter()
        self._events.put(None)
        if self._wake is not None:
            self._wake()
