"""Traces by OpenTelemetry: one span a request, one below it for each answer, sent on by OTLP. No text is ever in them.

The span of an answer has vLLM's name and, where OpenTelemetry's conventions for generative models have no attribute,
vLLM's attributes (`gen_ai.latency.*`), so that what reads its traces reads these.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import SpanKind, Status, StatusCode, use_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from deltakeeper.engine.stream import Stream

_TRACED = "/v1/"
_SEND_SECONDS = 5.0
"""How long one batch may take to send; at the end of the service it is waited for."""


class Traces:
    """Makes spans, and hands those that have ended to a processor.

    Args:
        processor: takes spans that have ended; see `open_traces` for the one that sends them.
        version: of the service, among the attributes of its resource.
    """

    def __init__(self, processor: SpanProcessor, version: str) -> None:
        name = os.environ.get("OTEL_SERVICE_NAME", "deltakeeper")
        resource = Resource.create({"service.name": name, "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("deltakeeper.service", version)
        self._epoch = time.time_ns() - time.perf_counter_ns()

    @contextmanager
    def visit(self, scope: Scope, request_id: str, status: Callable[[], int]) -> Iterator[None]:
        """A span around one request, below the one that its `traceparent` header names.

        Args:
            scope: of the request; its route and caller are read when it has been served.
            request_id: as the client is told.
            status: gives the status that was answered, 0 for none.
        """
        if not scope["path"].startswith(_TRACED):
            yield
            return
        method = scope["method"]
        span = self._tracer.start_span(
            method,
            context=_PARENT.extract(scope, getter=_HEADERS),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "gen_ai.request.id": request_id},
        )
        try:
            with use_span(span, record_exception=False, set_status_on_exception=False):
                yield
        finally:
            route = getattr(scope.get("route"), "path", None)  # never the path itself, which may hold anything
            if route is not None:
                span.update_name(f"{method} {route}")
                span.set_attribute("http.route", route)
            principal = scope["state"].get("principal")
            if principal is not None and principal.key_id is not None:
                span.set_attribute("deltakeeper.key_id", principal.key_id)
            span.set_attribute("http.response.status_code", status())
            if status() >= 500 or not status():
                span.set_status(Status(StatusCode.ERROR))
            span.end()

    def answered(self, model: str, stream: Stream, tokens: int) -> None:
        """Record an answer that has ended, below the request that is being served; see `running.Observer`."""
        times = stream.times
        ended = times.finished or time.perf_counter()
        attributes: dict[str, str | int | float | tuple[str, ...]] = {
            "gen_ai.provider.name": "deltakeeper",
            "gen_ai.request.id": stream.id,
            "gen_ai.request.model": model,
            "gen_ai.usage.input_tokens": stream.prompt_tokens,
            "gen_ai.usage.output_tokens": tokens,
            "gen_ai.usage.cache_read.input_tokens": stream.cached_tokens,
            "gen_ai.latency.e2e": ended - times.submitted,
        }
        if stream.finish_reason is not None:
            attributes["gen_ai.response.finish_reasons"] = (stream.finish_reason,)
        if times.admitted:
            attributes["gen_ai.latency.time_in_queue"] = times.admitted - times.submitted
        if times.first_token:
            attributes["gen_ai.latency.time_to_first_token"] = times.first_token - times.submitted
        span = self._tracer.start_span("llm_request", start_time=self._at(times.submitted), attributes=attributes)
        if times.first_token:
            span.add_event("first token", timestamp=self._at(times.first_token))
        if stream.finish_reason == "error":
            span.set_status(Status(StatusCode.ERROR))
        span.end(self._at(ended))

    def close(self) -> None:
        """Send what is left, and stop."""
        self._provider.shutdown()

    def _at(self, seconds: float) -> int:
        """Nanoseconds since 1970 of a reading of `time.perf_counter()`."""
        return self._epoch + int(seconds * 1e9)


def open_traces(endpoint: str, version: str) -> Traces:
    """Traces that are sent to a collector by OTLP over HTTP, in the background; those it does not take are dropped.

    OpenTelemetry's environment variables hold, such as `OTEL_EXPORTER_OTLP_HEADERS` for a collector's key,
    `OTEL_TRACES_SAMPLER` for how many are kept, and `OTEL_SERVICE_NAME`.

    Args:
        endpoint: the whole address, such as `http://127.0.0.1:4318/v1/traces`.
        version: of the service.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return Traces(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=_SEND_SECONDS)), version)


class _Headers(Getter[Scope]):
    """Reads headers of a request."""

    def get(self, carrier: Scope, key: str) -> list[str] | None:
        name = key.lower().encode()
        return [value.decode("latin-1") for found, value in carrier["headers"] if found == name] or None

    def keys(self, carrier: Scope) -> list[str]:
        return [name.decode("latin-1") for name, _ in carrier["headers"]]


_HEADERS = _Headers()
_PARENT = TraceContextTextMapPropagator()
