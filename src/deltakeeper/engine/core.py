"""The heart of the engine, on one thread: plan a pass, compute it, give out its tokens, and survive what goes wrong."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

from deltakeeper.engine.answering import NOT_NUMBERS, Answers, answer, deliver
from deltakeeper.engine.batch import build_batch
from deltakeeper.engine.blocks import BlockPool
from deltakeeper.engine.fixed_tenants import Pin, Tenants
from deltakeeper.engine.forward import ForwardPass
from deltakeeper.engine.scheduler import Scheduler
from deltakeeper.engine.sequence import Chunk, Sequence
from deltakeeper.engine.settings import EngineSettings
from deltakeeper.engine.stats import Counters
from deltakeeper.engine.stream import FinishReason
from deltakeeper.engine.text_side import TextSides
from deltakeeper.errors import DeltakeeperError, EngineError, TenantError, is_failure

_FAILURES = 8
"""Passes that may fail in a row before the engine gives up."""
_LOADING_SECONDS = 0.001
"""How long a step waits when nothing can be computed before a tenant is there."""


class Core:
    """Steps of an engine; none of it may be called from two threads at once.

    Attributes:
        pool: blocks of the KV cache.
        scheduler: who runs and who waits.
        counters: what has been done.
    """

    def __init__(
        self,
        forward: ForwardPass,
        sides: TextSides,
        tenants: Tenants | None,
        settings: EngineSettings,
        ended: Callable[[Sequence], None],
    ) -> None:
        """Make a core around a model.

        Args:
            forward: the model's pass.
            sides: tokenizers of base and tenants.
            tenants: where tenants come from, or None.
            settings: sizes.
            ended: told of each request that has ended, before its stream is.
        """
        self.pool = BlockPool(forward.cache.blocks)
        self.scheduler = Scheduler(settings, self.pool, forward.context)
        self.counters = Counters()
        self._forward, self._sides, self._tenants, self._ended = forward, sides, tenants, ended
        self._suspects: deque[int] = deque()
        self._failures = 0

    def step(self) -> bool:
        """Compute one pass; False when nothing runs and nothing waits.

        Raises:
            EngineError: too many passes failed in a row.
        """
        started = time.perf_counter()
        scheduler = self.scheduler
        if self._tenants is not None:
            self._tenants.poll()
        only = self._suspects.popleft() if self._suspects else None
        chunks = scheduler.plan(self._ready, only)
        if not chunks:
            if only is not None:
                return True
            if scheduler.running:
                raise EngineError("no running request could be given a token, which must not happen")
            if len(scheduler.waiting):
                time.sleep(_LOADING_SECONDS)
                return True
            return False
        try:
            answers, model_seconds = self._compute(chunks)
        except Exception as error:
            self._after_failure(chunks, error)
            return True
        self._failures = 0
        scheduler.commit(chunks)
        self._give_out(answers)
        tokens = sum(chunk.size for chunk in chunks)
        self.counters.step(time.perf_counter() - started, model_seconds, tokens)
        return True

    def end(self, sequence: Sequence, reason: FinishReason, stop: str | int | None = None, error: str = "") -> None:
        """End a request: its blocks, its row and its tenant's pin are free before its reader hears of it."""
        if sequence.stream.finish_reason is not None:
            return
        self.scheduler.drop(sequence)
        if sequence.pin is not None:
            sequence.pin.release()
            sequence.pin = None  # or a stream that somebody keeps would keep the delta's remains
        self.counters.finish(reason)
        self._ended(sequence)
        sequence.stream.end(reason, stop=stop, error=error or None)

    def _compute(self, chunks: list[Chunk]) -> tuple[Answers, float]:
        if not any(chunk.answers for chunk in chunks):
            chunks = [chunks[0]._replace(answers=1), *chunks[1:]]  # a head without rows is a case nobody tests
        batch = build_batch(chunks, self.scheduler.tables, self._forward.device)
        with torch.inference_mode():
            started = time.perf_counter()
            logits = self._forward(batch)
            seconds = time.perf_counter() - started
            return answer(chunks, logits), seconds

    def _give_out(self, answers: Answers) -> None:
        for sequence, first, entries in answers.prompts:
            listed = sequence.stream.prompt_logprobs
            if listed is None:
                listed = sequence.stream.prompt_logprobs = [None] * len(sequence.request.prompt)
            listed[first : first + len(entries)] = entries
        logprobs = answers.logprobs
        for index, (sequence, token) in enumerate(zip(answers.sequences, answers.tokens, strict=True)):
            if token == NOT_NUMBERS:
                self.end(
                    sequence, "error", error=f"the logits of {_whose(sequence)} are not numbers; check its weights."
                )
                continue
            self.counters.answer_tokens += 1
            try:
                end = deliver(sequence, token, None if logprobs is None else logprobs[index])
            except BaseException as error:  # a tenant's own tokenizer may fail in any way, and ends no other's answer
                if not is_failure(error):
                    raise
                told = f"token {token} of {_whose(sequence)} has no text ({error!r}); check its tokenizer."
                self.end(sequence, "error", error=told)
                continue
            if end is not None:
                self.end(sequence, end.reason, end.stop)

    def _ready(self, sequence: Sequence) -> bool:
        """Whether a waiting request can run, its tenant being in memory; one that never can ends here."""
        if sequence.text is not None:
            return True
        request = sequence.request
        pin: Pin | None = None
        try:
            text = self._sides.base
            if request.tenant is not None:
                if self._tenants is None or (pin := self._tenants.acquire(request.tenant)) is None:
                    return False
                side = self._sides.get(pin.version, pin.delta)
                if side is None:
                    pin.release()
                    return False
                text = side
            if max(request.prompt) >= text.vocabulary:
                raise TenantError(
                    f"request {request.id} has token {max(request.prompt)}, but tenant {request.tenant!r} knows "
                    f"{text.vocabulary} tokens; use its tokenizer."
                )
            sequence.admit(pin, text)
        except BaseException as error:
            if pin is not None:
                pin.release()
            if not is_failure(error):
                raise
            told = str(error) if isinstance(error, DeltakeeperError) else f"the tenant could not be used: {error!r}"
            self.end(sequence, "error", error=told)
            return False
        sequence.stream.times.admitted = time.perf_counter()
        self.counters.prompt_tokens += len(request.prompt)
        return True

    def _after_failure(self, chunks: list[Chunk], error: Exception) -> None:
        """Fail the requests of a pass that raised; if they are of several slots, first find out whose fault it is.

        Nothing of the pass was counted, so what is not at fault is simply computed again.
        """
        self.counters.failed_steps += 1
        self._failures += 1
        if self._failures > _FAILURES:
            raise EngineError(f"{self._failures} passes failed in a row, the last one with {error!r}") from error
        slots = list(dict.fromkeys(chunk.sequence.slot for chunk in chunks))
        if len(slots) > 1:
            self._suspects = deque(slots)
            return
        for chunk in chunks:
            self.end(
                chunk.sequence, "error", error=f"the pass of request {chunk.sequence.request.id} failed: {error!r}"
            )


def _whose(sequence: Sequence) -> str:
    return "the base" if sequence.request.tenant is None else f"tenant {sequence.request.tenant!r}"
