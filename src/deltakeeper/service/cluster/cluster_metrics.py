"""Series that only a service over a cluster has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from deltakeeper.service.cluster.cluster_engine import ClusterEngine
from deltakeeper.service.cluster.watch import Watch


class ClusterCollector(Collector):
    """Reads what the ingress knows of its replicas."""

    def __init__(self, engine: ClusterEngine, watch: Watch) -> None:
        self._engine, self._watch = engine, watch

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are known once something is read."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read everything once."""
        yield GaugeMetricFamily("deltakeeper_cluster_replicas", "Replicas that run.", value=len(self._watch.live()))
        yield GaugeMetricFamily(
            "deltakeeper_cluster_open_requests", "Answers under way at this ingress.", value=self._engine.open
        )
        family = CounterMetricFamily(
            "deltakeeper_cluster_disturbed_requests",
            "Answers whose replica was lost: retried before their first token, resumed after it, or lost.",
            labels=["outcome"],
        )
        for outcome, count in sorted(vars(self._engine.tally).items()):
            family.add_metric([outcome], count)
        yield family
