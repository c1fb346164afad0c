"""What engine, store and admission count by themselves, read at the moment of a scrape."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from deltakeeper.engine.blocks import BLOCK
from deltakeeper.engine.stats import EngineStats
from deltakeeper.engine.tenant_stats import StoreStats, TenantStats
from deltakeeper.kernels import backend
from deltakeeper.service.admission.decisions import DecisionLog
from deltakeeper.service.metrics.top_tenants import OTHER
from deltakeeper.service.serving_port import AnsweringEngine, TenantPlaces

_LOAD = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10, 30, 60, 120)
_STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_VERDICTS = ("admitted", "quarantined", "refused")
_EVICTIONS = ("room", "replaced", "unloaded", "removed", "closed")


class PartsCollector(Collector):
    """Reads the parts of a service; see `ServiceMetrics` for its arguments.

    Two histograms are filled from what is new since the last scrape: loads, of which the last of each tenant is known,
    and passes, of which the engine keeps the latest ones. Scrapes that are a minute apart or less miss next to nothing.
    """

    def __init__(
        self, engine: AnsweringEngine, store: TenantPlaces, base_name: str, log: DecisionLog | None, tenants: int
    ) -> None:
        self._engine, self._store, self._log, self._most = engine, store, log, tenants
        self._labels = {"model_name": base_name, "engine": "0"}
        self._lock = threading.Lock()
        self._loads: dict[str, int] = {}
        self._steps = 0
        held = CollectorRegistry()
        self._load_seconds = Histogram(
            "deltakeeper_delta_load_seconds", "Seconds that loads took to read.", registry=held, buckets=_LOAD
        )
        self._step_tokens = Histogram(
            "vllm:iteration_tokens_total",
            "Tokens of a pass.",
            list(self._labels),
            registry=held,
            buckets=_STEP_TOKENS,
        )

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are known once something is read."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read everything once."""
        engine = self._engine.stats()
        store = self._store.stats()
        with self._lock:
            self._take_in(engine, store)
        yield from self._of_engine(engine)
        yield from self._of_store(store)
        yield from self._step_tokens.collect()
        yield from self._load_seconds.collect()
        yield _labelled(
            CounterMetricFamily("deltakeeper_admission_decisions", "Decisions on deltas.", labels=["verdict"]),
            dict.fromkeys(_VERDICTS, 0) | ({} if self._log is None else self._log.counts()),
        )
        yield _kernels()

    def _take_in(self, engine: EngineStats, store: StoreStats) -> None:
        new = min(engine.steps - self._steps, len(engine.recent_steps))
        for _, _, tokens in engine.recent_steps[len(engine.recent_steps) - new :] if new > 0 else ():
            self._step_tokens.labels(**self._labels).observe(tokens)
        self._steps = engine.steps
        for name, tenant in store.tenants.items():
            if tenant.loads > self._loads.get(name, 0):
                self._load_seconds.observe(tenant.load_seconds)
        self._loads = {name: tenant.loads for name, tenant in store.tenants.items()}

    def _of_engine(self, stats: EngineStats) -> Iterator[Metric]:
        yield _cache(stats, self._labels["engine"])
        for name, about, value in (
            ("vllm:num_requests_running", "Requests that are computed.", stats.running),
            ("vllm:num_requests_waiting", "Requests that wait.", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 1 for all.", stats.kv_usage),
        ):
            yield self._one(GaugeMetricFamily, name, about, value)
        for name, about, value in (
            ("vllm:prompt_tokens", "Prompt tokens of admitted requests.", stats.prompt_tokens),
            ("vllm:generation_tokens", "Tokens of answers.", stats.answer_tokens),
            ("vllm:num_preemptions", "Requests that lost their blocks to older ones.", stats.preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache.", stats.prefix_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found there.", stats.prefix_hits),
            ("deltakeeper_engine_steps", "Passes.", stats.steps),
            ("deltakeeper_engine_failed_steps", "Passes that raised.", stats.failed_steps),
            ("deltakeeper_engine_step_seconds", "Seconds of all passes.", stats.step_seconds),
            ("deltakeeper_engine_model_seconds", "Of those, inside the model.", stats.model_seconds),
        ):
            yield self._one(CounterMetricFamily, name, about, value)

    def _of_store(self, stats: StoreStats) -> Iterator[Metric]:
        yield self._loras(stats)
        yield _labelled(
            GaugeMetricFamily("deltakeeper_delta_resident_bytes", "Bytes of deltas.", labels=["tier"]),
            {"memory": stats.resident_bytes, "reserved": stats.reserved_bytes},
        )
        for name, about, value in (
            ("deltakeeper_delta_budget_bytes", "Bytes that deltas may take.", stats.byte_budget),
            ("deltakeeper_delta_pins", "Answers under way that hold a delta.", stats.pins),
            ("deltakeeper_delta_loads_waiting", "Loads that wait for room.", stats.waiting),
        ):
            yield GaugeMetricFamily(name, about, value=value)
        yield CounterMetricFamily("deltakeeper_delta_loads", "Deltas that were loaded.", value=stats.loads)
        yield _labelled(
            CounterMetricFamily("deltakeeper_delta_evictions", "Deltas that left memory.", labels=["reason"]),
            dict.fromkeys(_EVICTIONS, 0) | stats.evictions,
        )
        yield _labelled(
            CounterMetricFamily("deltakeeper_delta_load_failures", "Loads that failed.", labels=["reason"]),
            stats.failures,
        )
        yield self._tiers(stats)

    def _one(self, family: type, name: str, about: str, value: float) -> Metric:
        metric: Metric = family(name, about, labels=list(self._labels))
        metric.add_metric(list(self._labels.values()), value)  # type: ignore[attr-defined]
        return metric

    def _loras(self, stats: StoreStats) -> Metric:
        """The info series of vLLM that routers read: what answers, what is being loaded, and how many would fit."""
        running = sorted(name for name, one in stats.tenants.items() if one.pins)
        waiting = sorted(name for name, one in stats.tenants.items() if one.state == "loading")
        metric = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Deltas that answer and that are loaded; the value is the time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        metric.add_metric([str(_capacity(stats)), ",".join(running), ",".join(waiting[: self._most])], time.time())
        return metric

    def _tiers(self, stats: StoreStats) -> Metric:
        """Where each delta is: the largest in memory first, and the rest together."""
        metric = GaugeMetricFamily("deltakeeper_delta_loaded", "Deltas by where they are.", labels=["delta", "tier"])
        ordered = sorted(stats.tenants.items(), key=lambda item: (-item[1].resident_bytes, item[0]))
        for name, one in ordered[: self._most]:
            metric.add_metric([name, _tier(one)], 1)
        rest: dict[str, int] = {}
        for _, one in ordered[self._most :]:
            rest[_tier(one)] = rest.get(_tier(one), 0) + 1
        for tier, count in sorted(rest.items()):
            metric.add_metric([OTHER, tier], count)
        return metric


def _cache(stats: EngineStats, engine: str) -> Metric:
    """The info series of vLLM from which routers learn how many tokens the KV cache holds; blocks of all replicas."""
    labels = {"block_size": str(BLOCK), "num_gpu_blocks": str(stats.kv_blocks), "engine": engine}
    metric = GaugeMetricFamily("vllm:cache_config_info", "Blocks of the KV cache, and tokens of one.", labels=[*labels])
    metric.add_metric([*labels.values()], 1)
    return metric


def _tier(stats: TenantStats) -> str:
    if stats.resident_bytes:
        return "memory"
    return "page_cache" if stats.read_ahead else "disk"


def _capacity(stats: StoreStats) -> int:
    """How many deltas of the mean size of those in memory the budget holds; all that are known while there is none."""
    if not stats.residents or not stats.resident_bytes:
        return len(stats.tenants)
    return max(stats.residents, stats.byte_budget * stats.residents // stats.resident_bytes)


def _labelled(metric: CounterMetricFamily | GaugeMetricFamily, values: Mapping[str, float]) -> Metric:
    for label, value in sorted(values.items()):
        metric.add_metric([label], value)
    return metric


def _kernels() -> Metric:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that compiled kernels are not used is what is told here
        active = backend()
    metric = GaugeMetricFamily(
        "deltakeeper_kernel_backend_info", "What multiplies deltas.", labels=["op", "backend", "isa"]
    )
    metric.add_metric(["products", active.name, active.isa or ""], 1)
    return metric
