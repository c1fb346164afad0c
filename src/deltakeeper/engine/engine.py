"""The engine: requests in, streams of tokens out, one pass of the model after another."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch

from deltakeeper.engine.core import Core
from deltakeeper.engine.fixed_tenants import Tenants
from deltakeeper.engine.forward import ForwardPass
from deltakeeper.engine.request import QueueFullError, Request
from deltakeeper.engine.sequence import Sequence
from deltakeeper.engine.settings import EngineSettings
from deltakeeper.engine.stats import EngineStats
from deltakeeper.engine.stream import Completion, Stream
from deltakeeper.engine.text_side import TextSides, base_side
from deltakeeper.errors import EngineError, TenantError, is_failure

_IDLE_SECONDS = 0.05
"""How often an idle engine looks after its tenants."""


class Engine:
    """Continuous batching over a live transformers decoder, for its base and for any tenants of an overlay.

    Drive it with a thread of its own (`start`, `close`), with `step`, or with `generate`. `submit` may be called from
    any thread; everything else that touches the model happens on the thread that steps. While the engine lives, the
    model's own attention is replaced, so nobody else can call the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        overlay: Any = None,
        store: Tenants | None = None,
        settings: EngineSettings | None = None,
    ) -> None:
        """Take a model over.

        Args:
            model: a transformers decoder in evaluation mode, on one device.
            tokenizer: its tokenizer, or None where only token ids are wanted.
            overlay: what makes the model know tenants, or None to serve the base alone.
            store: where tenants come from: a tenant store, or `FixedTenants`.
            settings: sizes and limits.

        Raises:
            EngineError: the model cannot be served, or the KV cache holds no block.
        """
        self.settings = settings or EngineSettings()
        self._forward = ForwardPass(model, overlay, self.settings)
        self._sides = TextSides(base_side(model, tokenizer))
        self._core = Core(self._forward, self._sides, store, self.settings, self._forget)
        self._store = store
        self._lock = threading.Lock()  # of what submitting threads and the engine's share: the five below
        self._incoming: deque[Sequence] = deque()
        self._cancelled: deque[Sequence] = deque()
        self._unfinished: set[Sequence] = set()
        self._draining = False
        self._dead: str | None = None
        self._woken = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._threads_before: int | None = None

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer of one request."""
        return min(self._forward.context, self._core.scheduler.most_tokens)

    @property
    def alive(self) -> bool:
        """Whether requests are served: false after `close`, or when the engine could not go on."""
        return self._dead is None and not self._closing

    def submit(self, request: Request, wake: Callable[[], None] | None = None) -> Stream:
        """Hand in a request; thread-safe, and quick.

        Args:
            request: what is asked.
            wake: called on the engine's thread whenever the stream has something new; it must be quick.

        Raises:
            QueueFullError: too many requests or tokens wait, or too many of this owner.
            TenantError: a tenant is named but the engine has none.
            EngineError: the request could never be served, or the engine is closed, draining or dead.
        """
        limit = self._check(request)
        stream = Stream(request.id, len(request.prompt), wake, lambda: self._cancel(sequence))
        sequence = Sequence(request, stream, limit)
        with self._lock:
            if not self.alive or self._draining:
                raise EngineError(self._dead or "the engine takes no more requests; it is being closed.")
            self._core.scheduler.waiting.room.enter(request.owner, len(request.prompt))
            self._unfinished.add(sequence)
            self._incoming.append(sequence)
        self._woken.set()
        return stream

    def step(self) -> bool:
        """Compute one pass; False when there is nothing to do.

        Raises:
            EngineError: the engine cannot go on; every open request has ended with an error.
        """
        if not self.alive:
            raise EngineError(self._dead or "the engine is closed; make a new one.")
        try:
            if self._threads_before is None and self.settings.threads is not None:
                self._threads_before = torch.get_num_threads()
                torch.set_num_threads(self.settings.threads)
            self._receive()
            return self._core.step()
        except BaseException as error:
            if not is_failure(error):
                raise
            self._die(f"the engine has stopped: {error}; start it anew.")
            raise EngineError(str(self._dead)) from error

    def run(self) -> None:
        """Step until `close` is called or the engine dies; what `start` runs on a thread."""
        while not self._closing and self._dead is None:
            self._woken.clear()
            try:
                if not self.step():
                    self._woken.wait(None if self._store is None else _IDLE_SECONDS)
            except EngineError:  # it has told every request
                return
            except BaseException as error:  # nobody steps after this
                self._die(f"the engine's thread was ended ({error!r}); start it anew.")
                raise

    def start(self) -> Engine:
        """Step on a thread of its own until `close`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self.run, name="deltakeeper-engine", daemon=True)
            self._thread.start()
        return self

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those there are; whether all ended within `timeout` seconds."""
        with self._lock:
            self._draining = True
        end = None if timeout is None else time.monotonic() + timeout
        while self._unfinished and self.alive:
            if end is not None and time.monotonic() >= end:
                return False
            if self._thread is None:
                self.step()
            else:
                time.sleep(0.005)
        return not self._unfinished

    def close(self) -> None:
        """Stop, end open requests as cancelled, and give the model its own attention back; harmless twice."""
        with self._lock:
            self._closing = True
        self._woken.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._receive()
        for sequence in list(self._unfinished):
            self._core.end(sequence, "cancelled")
        self._forward.close()
        self._sides.close()
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
            self._threads_before = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Answer many requests and wait for all; in their order. More than may wait are handed in as there is room.

        Raises:
            EngineError: a request could never be served (those handed in before it are cancelled), or the engine died.
        """
        streams: list[Stream] = []
        try:
            for request in requests:
                while (stream := self._try_submit(request)) is None:
                    self._pass_time()
                streams.append(stream)
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        while self._thread is None and any(stream.finish_reason is None for stream in streams):
            self.step()
        return [stream.result() for stream in streams]

    def stats(self) -> EngineStats:
        """A reading of all counters; from any thread."""
        scheduler, counters, pool = self._core.scheduler, self._core.counters, self._core.pool
        return EngineStats(
            running=len(scheduler.running),
            waiting=scheduler.waiting.room.requests,
            kv_blocks=pool.blocks,
            kv_blocks_used=pool.used,
            kv_blocks_cached=pool.cached,
            kv_bytes=self._forward.cache.nbytes,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            prompt_tokens=counters.prompt_tokens,
            computed_tokens=counters.computed_tokens,
            answer_tokens=counters.answer_tokens,
            preemptions=scheduler.preemptions,
            failed_steps=counters.failed_steps,
            finished=dict(counters.finished),
            steps=counters.steps,
            step_seconds=counters.step_seconds,
            model_seconds=counters.model_seconds,
            recent_steps=tuple(counters.recent.copy()),
        )

    def _check(self, request: Request) -> int:
        """Refuse what could never be served; gives the most tokens of prompt and answer."""
        prompt, name = request.prompt, f"request {request.id}"
        if request.tenant is not None and self._store is None:
            raise TenantError(f"{name} names tenant {request.tenant!r}, but the engine serves the base alone.")
        known = self._sides.base.vocabulary
        if min(prompt) < 0 or (request.tenant is None and max(prompt) >= known):
            raise EngineError(f"{name} has a token outside the vocabulary of {known}; use the model's tokenizer.")
        if len(prompt) >= self.context:
            raise EngineError(
                f"{name} has {len(prompt)} prompt tokens, but prompt and answer may have {self.context} together; "
                "shorten the prompt."
            )
        if request.stop and self._sides.base.tokenizer is None:
            raise EngineError(f"{name} has stop strings, but the engine has no tokenizer; give it one.")
        limit = min(len(prompt) + request.max_new_tokens, self._forward.context)
        if limit - 1 > self._core.scheduler.most_tokens:  # the last token needs no keys
            raise EngineError(
                f"{name} may grow to {limit} tokens, but the KV cache holds {self._core.scheduler.most_tokens}; "
                "ask for fewer new tokens or raise kv_bytes."
            )
        return limit

    def _try_submit(self, request: Request) -> Stream | None:
        try:
            return self.submit(request)
        except QueueFullError:
            return None

    def _pass_time(self) -> None:
        if self._thread is None:
            self.step()
        else:
            time.sleep(0.001)

    def _cancel(self, sequence: Sequence) -> None:
        self._cancelled.append(sequence)
        self._woken.set()

    def _receive(self) -> None:
        """Take over what other threads have handed in since the last step."""
        cancelled = [self._cancelled.popleft() for _ in range(len(self._cancelled))]
        while self._incoming:  # after the above: who is cancelled was handed in before
            with self._lock:  # so that a request is never counted as neither incoming nor waiting
                self._core.scheduler.waiting.push(self._incoming.popleft())
        for sequence in cancelled:
            self._core.end(sequence, "cancelled")

    def _forget(self, sequence: Sequence) -> None:
        with self._lock:
            self._unfinished.discard(sequence)

    def _die(self, reason: str) -> None:
        """Stop for good: every open request ends with the reason, whatever state it is in."""
        with self._lock:
            self._dead = reason
            self._incoming.clear()
        for sequence in list(self._unfinished):
            if sequence.pin is not None:
                sequence.pin.release()
            sequence.stream.end("error", error=reason)
        self._unfinished.clear()
