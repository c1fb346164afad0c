"""What a running service is made of; routes find it as `request.app.state.services`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from deltakeeper.engine.stream import Stream
from deltakeeper.service.access import Gate
from deltakeeper.service.admission_port import Admission
from deltakeeper.service.drain import Drain
from deltakeeper.service.serving_port import AnsweringEngine, ServedBase, TenantPlaces
from deltakeeper.service.settings import ServiceSettings
from deltakeeper.service.tenant_notes import TenantNotes


class Observer(Protocol):
    """What metrics are told; each call is quick, raises nothing, and may come on any thread."""

    def answered(self, model: str, stream: Stream, tokens: int) -> None:
        """An answer has ended.

        Args:
            model: the base's name or a tenant's, one that is known.
            stream: with `times`, `finish_reason`, `prompt_tokens` and `cached_tokens`.
            tokens: of the answer.
        """

    def first_token(self, model: str, seconds: float) -> None:
        """The first token of an answer goes out, so long after the request came."""

    def prompt_done(self, tokens: Sequence[int], allowed: int) -> None:
        """All answers to a prompt have ended.

        Args:
            tokens: of each answer.
            allowed: how many each might have had; 0 where only the prompt was rated.
        """

    def token_after(self, model: str, seconds: float) -> None:
        """A further token of an answer came, so long after the one before."""

    def rejected(self, reason: str) -> None:
        """A request was not taken: `quota`, `queue_full`, `draining` or `not_loaded`."""


class Tracer(Protocol):
    """What traces requests and their answers; see `traces.Traces`."""

    def visit(self, scope: Any, request_id: str, status: Callable[[], int]) -> AbstractContextManager[None]:
        """Trace the request that is served inside."""

    def answered(self, model: str, stream: Stream, tokens: int) -> None:
        """An answer to that request has ended; as `Observer.answered`."""


@dataclass(frozen=True)
class Services:
    """All parts of a running service.

    Attributes:
        engine: what answers, and runs already.
        store: where its tenants come from.
        base: the base model's tokenizer and fingerprint.
        base_name: name by which requests ask the base.
        gate: keys and quotas.
        deltas: folder of the tenants' artifacts, one subfolder each.
        admission: policy for deltas; None lets in whatever fits the base.
        metrics: told of every answer; None where nobody measures.
        traces: told of every request and answer; None where nobody traces.
        settings: limits.
        drain: whether the service still takes requests.
        notes: what it noted of names.
    """

    engine: AnsweringEngine
    store: TenantPlaces
    base: ServedBase
    base_name: str
    gate: Gate
    deltas: Path
    admission: Admission | None = None
    metrics: Observer | None = None
    traces: Tracer | None = None
    settings: ServiceSettings = field(default_factory=ServiceSettings)
    drain: Drain = field(default_factory=Drain)
    notes: TenantNotes = field(default_factory=TenantNotes)
