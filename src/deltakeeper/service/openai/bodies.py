"""What a request's body may hold: OpenAI's parameters, some of vLLM's, and nothing that would be ignored in silence.

Parameters that only say who asks, or that ask for what is done anyway, are taken; those that would change the answer
and are not served are refused (https://platform.openai.com/docs/api-reference, as of 2026-11).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from deltakeeper.engine import Sampling
from deltakeeper.service.openai.fields import Body, Nothing, Pairs, Prompts, Text, Texts, Tokens
from deltakeeper.service.sampling_defaults import SamplingDefaults

_DEFAULT = "Not served; only its default is taken (vLLM's)."


class StreamOptions(Body):
    """How a stream is written."""

    include_usage: bool = Field(False, description="Add a last chunk that has the usage and no choices.")
    continuous_usage_stats: bool = Field(False, description="Say the usage so far in every chunk (vLLM's).")
    include_obfuscation: bool = Field(False, description="Taken and not used.")


class _Asking(Body):
    """What both ways of asking share."""

    model: str = Field(
        max_length=256, description="The base's name or that of a tenant; see /v1/models.", examples=["support"]
    )
    n: int = Field(1, ge=1, le=1024, description="Answers to each prompt.")
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 31, description="0 or -1 for all tokens (vLLM's).")
    min_p: float | None = Field(None, ge=0, le=1, description="(vLLM's)")
    presence_penalty: float | None = Field(None, ge=-100, le=100)
    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    repetition_penalty: float | None = Field(None, ge=1e-3, le=1e3, description="(vLLM's)")
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63, description="Makes an answer reproducible.")
    stop: Text | Texts | None = Field(None, description="Strings that end the answer and are not part of it.")
    stop_token_ids: Tokens | None = Field(None, max_length=64, description="Tokens that end the answer (vLLM's).")
    ignore_eos: bool = Field(False, description="Go on after an end-of-text token (vLLM's).")
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Taken and not used.")
    logit_bias: dict[str, Any] | None = Field(None, description="Not served; must be empty.")
    cache_salt: str | None = Field(
        None, max_length=256, description="Prompts are cached apart from those with another one (vLLM's)."
    )
    skip_special_tokens: Literal[True] | None = Field(None, description=_DEFAULT)
    spaces_between_special_tokens: Literal[True] | None = Field(None, description=_DEFAULT)
    include_stop_str_in_output: Literal[False] | None = Field(None, description=_DEFAULT)
    use_beam_search: Literal[False] | None = Field(None, description=_DEFAULT)
    return_tokens_as_token_ids: Literal[False] | None = Field(None, description=_DEFAULT)
    min_tokens: int | None = Field(None, ge=0, le=0, description=_DEFAULT)
    length_penalty: float | None = Field(None, ge=1, le=1, description=_DEFAULT)
    priority: int | None = Field(None, ge=0, le=0, description=_DEFAULT)
    bad_words: Nothing | None = Field(None, description=_DEFAULT)

    @field_validator("logit_bias")
    @classmethod
    def _no_bias(cls, value: dict[str, Any] | None) -> None:
        if value:
            raise ValueError("logit_bias is not served; leave it out.")

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings, without empty ones."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    def sampling(self, defaults: SamplingDefaults, logprobs: int | None, choice: int) -> Sampling:
        """How tokens of one of the `n` answers are chosen; each has a seed of its own, so that they differ."""

        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        return Sampling(
            temperature=given(self.temperature, defaults.temperature),
            top_p=given(self.top_p, defaults.top_p),
            top_k=max(0, given(self.top_k, defaults.top_k)),
            min_p=given(self.min_p, defaults.min_p),
            repetition_penalty=given(self.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=given(self.presence_penalty, 0.0),
            frequency_penalty=given(self.frequency_penalty, 0.0),
            seed=None if self.seed is None else self.seed + choice,
            logprobs=logprobs,
        )


class CompletionBody(_Asking):
    """`POST /v1/completions`."""

    rated_by: ClassVar[str] = "logprobs"

    prompt: Text | Texts | Tokens | Prompts = Field(
        description="A text or its tokens, or several of either.", examples=["Where is my order?"]
    )
    max_tokens: int | None = Field(16, ge=0, le=1 << 31, description="Longest answer; 0 only with `echo`.")
    logprobs: int | None = Field(None, ge=0, le=100, description="Report so many likeliest tokens at each place.")
    echo: bool = Field(False, description="Give the prompt back in front of the answer, log-probabilities too.")
    add_special_tokens: bool = Field(True, description="Put the tokenizer's own tokens around a text (vLLM's).")
    best_of: int | None = Field(None, description="Not served; must equal `n`.")
    suffix: str | None = Field(None, max_length=0, description="Not served; must be empty.")

    @model_validator(mode="after")
    def _fits(self) -> CompletionBody:
        if not self.prompts:
            raise ValueError("prompt holds none; give a text or tokens.")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens of 0 asks for nothing; give 1 or more, or echo.")
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of is not served; leave it out.")
        return self

    @property
    def rated(self) -> int | None:
        """How many likeliest tokens are reported at each place; None for no report."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        given: Any = self.prompt
        alone = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        return [given] if alone else list(given)


class TextPart(Body):
    """A piece of a message's content."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True, max_length=1024)] | None = Field(
        None, description="May be missing from a turn of the assistant only."
    )
    name: str | None = Field(None, max_length=256, description="Taken and not used.")
    refusal: str | None = Field(None, max_length=0, description="Of an answer that comes back; must be empty.")
    annotations: Nothing | None = Field(None, description="Of an answer that comes back; must be empty.")
    tool_calls: Nothing | None = Field(None, description="Not served; must be empty.")

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content is missing; give it.")
        return self

    def turn(self) -> dict[str, str]:
        """The turn as a chat template knows it; `developer` is what OpenAI calls a system turn now."""
        parts: str | Sequence[TextPart] = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(Body):
    """Shape of an answer; only text is served."""

    type: Literal["text"]


class ChatBody(_Asking):
    """`POST /v1/chat/completions`."""

    rated_by: ClassVar[str] = "top_logprobs"

    messages: list[Message] = Field(
        fail_fast=True, min_length=1, max_length=4096, examples=[[{"role": "user", "content": "Where is my order?"}]]
    )
    max_tokens: int | None = Field(None, ge=1, le=1 << 31, description="Longest answer.")
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 31, description="The same, by its newer name.")
    logprobs: bool | None = Field(None, description="Report log-probabilities.")
    top_logprobs: int | None = Field(None, ge=0, le=100, description="Of so many likeliest tokens at each place.")
    response_format: ResponseFormat | None = None
    tools: Nothing | None = Field(None, description="Not served; must be empty.")
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = Field(None, description="Taken and not used.")
    metadata: Pairs | None = Field(None, description="Taken and not used.")
    store: Literal[False] | None = Field(None, description="Nothing is stored.")
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = Field(None, max_length=256, description="Taken and not used.")
    prompt_cache_key: str | None = Field(None, max_length=256, description="Taken and not used.")
    reasoning_effort: Literal["none"] | None = Field(None, description="No model is told to reason.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=0, description="Not served; must be empty.")
    add_generation_prompt: Literal[True] | None = Field(None, description=_DEFAULT)
    continue_final_message: Literal[False] | None = Field(None, description=_DEFAULT)

    @model_validator(mode="after")
    def _fits(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true; set it.")
        return self

    @property
    def rated(self) -> int | None:
        """How many likeliest tokens are reported at each place; None for no report."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def longest(self) -> int | None:
        """Longest answer, if the request says one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
