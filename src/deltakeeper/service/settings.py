"""Limits of the service, in one place: what a request may be, and how long things may take."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from deltakeeper.errors import DataError


@dataclass(frozen=True)
class ServiceSettings:
    """Limits of what one request may ask, checked before anything is made of it.

    Attributes:
        max_body_bytes: of a request's body.
        max_upload_bytes: of an artifact that is pushed to the service; a policy may allow fewer.
        max_header_bytes: of a request's line and headers together.
        max_prompts: prompts in one request to `/v1/completions`.
        max_choices: answers (`n`, times prompts) of one request.
        max_stop_strings: of one request; OpenAI allows 4.
        max_stop_characters: of one stop string.
        max_new_tokens: where an answer ends, whatever a request says; None for where the context does.
        default_new_tokens: length of an answer to a chat that does not say; the context may end it before.
        load_seconds: how long a request waits for its cold tenant before it is told to come back.
        encode_seconds: how long a prompt may take to become tokens, its tenant's others before it included.
        keep_alive_seconds: silence in a stream after which a comment is sent, so that proxies keep it open.
        drain_seconds: how long running answers may go on once the service is to stop.
        generation_config: where parameters of sampling that a request leaves out come from: `auto` is the model's
            `generation_config.json`, `none` are OpenAI's own defaults.
        retry_seconds: what `Retry-After` says where nothing better is known.

    Raises:
        DataError: a limit is not positive.
    """

    max_body_bytes: int = 8 << 20
    max_upload_bytes: int = 16 << 30
    max_header_bytes: int = 32 << 10
    max_prompts: int = 128
    max_choices: int = 128
    max_stop_strings: int = 16
    max_stop_characters: int = 1024
    max_new_tokens: int | None = None
    default_new_tokens: int = 1024
    load_seconds: float = 60.0
    encode_seconds: float = 30.0
    keep_alive_seconds: float = 30.0
    drain_seconds: float = 30.0
    retry_seconds: float = 1.0
    generation_config: Literal["auto", "none"] = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not value > 0:
                raise DataError(f"service setting {field.name} is {value}; give a positive number.")
        if self.generation_config not in ("auto", "none"):
            raise DataError(f"service setting generation_config is '{self.generation_config}'; give auto or none.")
