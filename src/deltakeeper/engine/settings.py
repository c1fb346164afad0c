"""How large an engine may grow: memory of the KV cache, requests at once, tokens a step."""

from __future__ import annotations

from dataclasses import dataclass

from deltakeeper.errors import EngineError


@dataclass(frozen=True)
class EngineSettings:
    """Limits of an engine.

    Attributes:
        kv_bytes: memory of the KV cache, in bytes; what fits decides how many tokens of context can be held.
        max_running: requests that are computed side by side, as far as a pass has a token for each.
        max_step_tokens: tokens in one pass; long prompts are cut into chunks of what decoding leaves of it.
        max_waiting: requests that may wait; further ones are refused. One owner may have as many of them as it leaves
            to others, which is half where it is alone.
        max_waiting_tokens: prompt tokens that may wait, with the same part for an owner; None for no bound. Requests
            differ a thousandfold in cost.
        max_context: tokens of prompt and answer of one request; None for what the model was made for.
        prefix_sharing: whether requests of one tenant version share the KV blocks of equal beginnings.
        threads: CPU threads of a pass, None to leave torch's number. More threads than *free* cores make every
            product wait for a thread that is not running, which is far slower than one thread too few.

    Raises:
        EngineError: a limit is not positive.
    """

    kv_bytes: int = 1 << 30
    max_running: int = 64
    max_step_tokens: int = 512
    max_waiting: int = 1024
    max_waiting_tokens: int | None = None
    max_context: int | None = None
    prefix_sharing: bool = True
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("kv_bytes", "max_running", "max_step_tokens", "max_waiting"):
            if getattr(self, name) < 1:
                raise EngineError(f"engine setting {name} is {getattr(self, name)}; give a positive number.")
        for name in ("max_waiting_tokens", "max_context", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EngineError(f"engine setting {name} is {value}; give a positive number or None.")
