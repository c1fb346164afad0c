"""What is measured as answers end; what engine and store count by themselves is read when somebody scrapes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary, disable_created_metrics, generate_latest

from deltakeeper.engine.stream import Stream
from deltakeeper.service.admission.decisions import DecisionLog
from deltakeeper.service.metrics.parts import PartsCollector
from deltakeeper.service.metrics.request_sizes import RequestSizes
from deltakeeper.service.metrics.top_tenants import TopTenants
from deltakeeper.service.serving_port import AnsweringEngine, TenantPlaces

_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10, 20, 40, 80),
    *(160, 640, 2560),
)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10, 20, 40, 80)
_REQUEST = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
"""vLLM's own buckets, in seconds, so that its dashboards fit."""
_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}
"""vLLM's word for each of the engine's."""
_REJECTIONS = ("quota", "queue_full", "draining", "not_loaded")


class ServiceMetrics:
    """Counts and times of a service, with a registry of its own; implements `running.Observer`.

    Series with vLLM's names carry its labels, of which `model_name` is the base's. Series by tenant are those of the
    busiest `tenants`, and `(other)`.
    """

    def __init__(
        self,
        engine: AnsweringEngine,
        store: TenantPlaces,
        base_name: str,
        log: DecisionLog | None = None,
        *,
        tenants: int = 50,
    ) -> None:
        """Begin to count.

        Args:
            engine: whose counters are read.
            store: whose counters are read.
            base_name: the base's name.
            log: of admission's decisions, if there is admission.
            tenants: how many have series of their own.
        """
        # process-wide: a timestamp beside every series doubles them, and nobody reads it
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._base = {"model_name": base_name, "engine": "0"}
        self._top = TopTenants(tenants, self._drop)
        self.registry.register(PartsCollector(engine, store, base_name, log, tenants))
        self._sizes = RequestSizes(self.registry, self._base, engine.context)
        self._first_token = self._histogram("vllm:time_to_first_token_seconds", "Seconds to the first token.")
        self._between = self._histogram("vllm:inter_token_latency_seconds", "Seconds between tokens.", _PER_TOKEN)
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean seconds a further token, by request.", _PER_TOKEN
        )
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "Seconds to the last token.", _REQUEST)
        self._queued = self._histogram("vllm:request_queue_time_seconds", "Seconds in the waiting line.", _REQUEST)
        self._prefill = self._histogram(
            "vllm:request_prefill_time_seconds", "Seconds from the line to the first token.", _REQUEST
        )
        self._decode = self._histogram(
            "vllm:request_decode_time_seconds", "Seconds from the first token to the last.", _REQUEST
        )
        self._inference = self._histogram(
            "vllm:request_inference_time_seconds", "Seconds from the line to the last token.", _REQUEST
        )
        self._ended = self._counter(
            "vllm:request_success", "Answers by how they ended.", *self._base, "finished_reason"
        )
        for reason in _REASONS.values():  # at 0, or the first of them would be no increase
            self._ended.labels(**self._base, finished_reason=reason)
        self._rejected = self._counter(
            "vllm:admission_rejections", "Requests that were not taken, by reason.", *self._base, "reason"
        )
        for reason in _REJECTIONS:
            self._rejected.labels(**self._base, reason=reason)
        self._tokens = self._counter("deltakeeper_tenant_tokens", "Tokens by tenant and kind.", "tenant", "kind")
        self._answers = self._counter(
            "deltakeeper_tenant_requests", "Answers by tenant and how they ended.", "tenant", "finished_reason"
        )
        self._tenant_first = Summary(
            "deltakeeper_tenant_time_to_first_token_seconds",
            "Seconds to the first token by tenant.",
            ["tenant"],
            registry=self.registry,
        )

    def answered(self, model: str, stream: Stream, tokens: int) -> None:
        """See `Observer.answered`."""
        times, now = stream.times, time.perf_counter()
        reason = _REASONS.get(stream.finish_reason or "cancelled", "abort")
        end = times.finished or now
        self._ended.labels(**self._base, finished_reason=reason).inc()
        self._observe(self._whole, end - times.submitted)
        if times.admitted:
            self._observe(self._queued, times.admitted - times.submitted)
            self._observe(self._inference, end - times.admitted)
            self._sizes.answered(stream.prompt_tokens, stream.cached_tokens, tokens)
        tenant = self._top.label(model, stream.prompt_tokens + 2.0 * tokens)  # as the engine's fairness counts them
        if times.first_token:
            self._observe(self._prefill, times.first_token - times.admitted)
            self._observe(self._decode, end - times.first_token)
            if tokens > 1:
                self._observe(self._per_token, (end - times.first_token) / (tokens - 1))
        self._answers.labels(tenant, reason).inc()
        self._tokens.labels(tenant, "prompt").inc(stream.prompt_tokens if times.admitted else 0)
        self._tokens.labels(tenant, "generation").inc(tokens)

    def first_token(self, model: str, seconds: float) -> None:
        """See `Observer.first_token`."""
        self._observe(self._first_token, seconds)
        self._tenant_first.labels(self._top.label(model, 0.0)).observe(max(0.0, seconds))

    def prompt_done(self, tokens: Sequence[int], allowed: int) -> None:
        """See `Observer.prompt_done`."""
        self._sizes.prompt_done(tokens, allowed)

    def token_after(self, model: str, seconds: float) -> None:
        """See `Observer.token_after`."""
        self._observe(self._between, seconds)

    def rejected(self, reason: str) -> None:
        """See `Observer.rejected`."""
        self._rejected.labels(**self._base, reason=reason).inc()

    def render(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self.registry)

    def _observe(self, histogram: Histogram, seconds: float) -> None:
        histogram.labels(**self._base).observe(max(0.0, seconds))

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...] = _FIRST_TOKEN) -> Histogram:
        return Histogram(name, about, list(self._base), registry=self.registry, buckets=buckets)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(name, about, labels, registry=self.registry)

    def _drop(self, tenant: str) -> None:
        for kind in ("prompt", "generation"):
            with suppress(KeyError):
                self._tokens.remove(tenant, kind)
        for reason in {*_REASONS.values()}:
            with suppress(KeyError):
                self._answers.remove(tenant, reason)
        with suppress(KeyError):
            self._tenant_first.remove(tenant)
