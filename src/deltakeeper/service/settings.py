"""Limits of the service, in one place: what a request may be, and how long things may take."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from deltakeeper.errors import DataError


@dataclass(frozen=True)
class ServiceSettings:
    """Limits of what one request may ask, checked before anything is made of it.

    Attributes:
        max_body_bytes: of a request's body, or more where a prompt as long as the context needs it: see `body_bytes`.
        max_body_objects: opening brackets and braces of a body, in texts too. Each may become an object, and a body
            that is made of them alone would hold everybody up while it is read.
        characters_per_token: most characters of a prompt for each token of the context; a longer text cannot fit, and
            is refused before anybody makes tokens of it.
        max_upload_bytes: of an artifact that is pushed to the service; a policy may allow fewer.
        max_header_bytes: of a request's line and headers together.
        max_prompts: prompts in one request to `/v1/completions`.
        max_choices: answers (`n`, times prompts) of one request.
        max_stop_strings: of one request; OpenAI allows 4.
        max_stop_characters: of one stop string.
        max_new_tokens: where an answer ends, whatever a request says; None for where the context does.
        max_logprobs: likeliest tokens that are reported at each place; vLLM's bound.
        max_logprob_entries: tokens that are reported by one request, over all its answers and echoed prompts.
        default_new_tokens: length of an answer to a chat that does not say; the context may end it before.
        load_seconds: how long a request waits for its cold tenant before it is told to come back.
        encode_seconds: how long a prompt may take to become tokens, those of its model before it included.
        keep_alive_seconds: silence in a stream after which a comment is sent, so that proxies keep it open.
        max_unread: requests of one key that may wait, at each model, for their prompts to become tokens.
        lame_duck_seconds: how long new requests are still taken once the service was told to stop, while `/ready`
            already says so and whatever routes requests has not looked yet; may be 0.
        drain_seconds: how long running answers may go on once no more are taken.
        generation_config: where parameters of sampling that a request leaves out come from: `auto` is the model's
            `generation_config.json`, `none` are OpenAI's own defaults.
        retry_seconds: what `Retry-After` says where nothing better is known.

    Raises:
        DataError: a limit is not positive, or what may be 0 is below it.
    """

    max_body_bytes: int = 1 << 20
    max_body_objects: int = 1 << 16
    characters_per_token: int = 16
    max_upload_bytes: int = 16 << 30
    max_header_bytes: int = 32 << 10
    max_prompts: int = 128
    max_choices: int = 128
    max_stop_strings: int = 16
    max_stop_characters: int = 1024
    max_unread: int = 256
    max_new_tokens: int | None = None
    max_logprobs: int = 20
    max_logprob_entries: int = 1 << 18
    default_new_tokens: int = 1024
    load_seconds: float = 60.0
    encode_seconds: float = 30.0
    keep_alive_seconds: float = 30.0
    lame_duck_seconds: float = 0.0
    drain_seconds: float = 30.0
    retry_seconds: float = 1.0
    generation_config: Literal["auto", "none"] = "auto"

    @property
    def with_defaults(self) -> bool:
        """Whether models say how tokens are drawn where a request does not."""
        return self.generation_config == "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "lame_duck_seconds":
                if not value >= 0:
                    raise DataError(f"service setting {field.name} is {value}; give 0 or more.")
            elif isinstance(value, (int, float)) and not value > 0:
                raise DataError(f"service setting {field.name} is {value}; give a positive number.")
        if self.generation_config not in ("auto", "none"):
            raise DataError(f"service setting generation_config is '{self.generation_config}'; give auto or none.")

    def prompt_characters(self, context: int) -> int:
        """Most characters of a prompt where it may have so many tokens."""
        return self.characters_per_token * context

    def body_bytes(self, context: int) -> int:
        """Most bytes of a body where a prompt may have so many tokens."""
        return max(self.max_body_bytes, self.prompt_characters(context))
