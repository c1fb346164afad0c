"""What a caller asks of the engine: tokens in, how to choose the next one, and when to stop."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass, field

from deltakeeper.errors import EngineError

GREEDY_BELOW = 1e-5  # temperatures under this are greedy: dividing by them would only overflow
MOST_LOGPROBS = 100


def _within(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise EngineError(f"{name} is {value}; give a value from {low} to {high}.")


class QueueFullError(EngineError):
    """The engine's waiting line is full; ask again later."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    The order is that of transformers' `generate`: penalties, temperature, top-k, top-p, min-p. As in vLLM, the
    repetition penalty looks at prompt and answer, and the presence and frequency penalties (OpenAI's) at the answer.

    Attributes:
        temperature: 0 for greedy.
        top_p: smallest set of tokens whose probability reaches this; 1 for all.
        top_k: that many likeliest tokens; 0 for all. Tokens tied with the last one are kept.
        min_p: tokens at least this likely relative to the likeliest one; 0 for all.
        repetition_penalty: logits of tokens seen are divided (if positive) or multiplied (if negative) by it.
        presence_penalty: taken off the logit of every token of the answer, once.
        frequency_penalty: taken off per occurrence.
        seed: makes the answer reproducible, whatever else is computed beside it; None for a random one.
        logprobs: report the log-probability of each token and of this many likeliest ones, before penalties and
            temperature; None for no report.

    Raises:
        EngineError: a value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_p", self.top_p, 1e-9, 1.0)
        _within("top_k", self.top_k, 0, 1 << 31)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        _within("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _within("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, MOST_LOGPROBS)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        """Whether logits depend on the tokens before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True)
class Request:
    """One prompt for one tenant.

    Attributes:
        prompt: token ids, at least one.
        tenant: name of the tenant; None for the base.
        max_new_tokens: longest answer; the model's context may end it before.
        sampling: how tokens are chosen.
        stop: strings that end the answer; neither they nor what follows is part of its text.
        stop_tokens: token ids that end the answer; they are its last token and have no text.
        ignore_eos: go on after an end-of-text token.
        prompt_logprobs: report the log-probability of each prompt token and of this many likeliest ones.
        prompt_logprobs_from: position of the first prompt token that is reported; what stands before the one in front
            of it may then come from the prefix cache.
        owner: who asks. Owners share the machine equally, however much each asks, and so do the tenants of one owner.
        cache_salt: requests with different salts never share KV blocks, so none can tell from its timing what
            another one asked.
        id: name of the request in results and errors.

    Raises:
        EngineError: a value is out of range.
    """

    prompt: tuple[int, ...]
    tenant: str | None = None
    max_new_tokens: int = 128
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 1
    owner: str = ""
    cache_salt: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(self.prompt))
        if not self.prompt:
            raise EngineError(f"request {self.id} has no prompt tokens; give at least one.")
        if self.max_new_tokens < 1:
            raise EngineError(f"request {self.id} asks for {self.max_new_tokens} new tokens; ask for at least one.")
        if any(not text for text in self.stop):
            raise EngineError(f"request {self.id} has an empty stop string; leave it out.")
        if self.prompt_logprobs is not None:
            _within("prompt_logprobs", self.prompt_logprobs, 0, MOST_LOGPROBS)
            _within("prompt_logprobs_from", self.prompt_logprobs_from, 1, max(1, len(self.prompt) - 1))
