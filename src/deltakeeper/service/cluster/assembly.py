"""A whole service whose engines are the replicas of a cluster: made in order, and taken apart in reverse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.fingerprint import read_root
from deltakeeper.live_base import read_tokenizer
from deltakeeper.service.admission import DecisionLog
from deltakeeper.service.app import build_app
from deltakeeper.service.assembly import (
    Assembled,
    Plan,
    opened_gate,
    opened_policy,
    opened_traces,
    register_tenants,
    service_routers,
)
from deltakeeper.service.cluster.calls import Replicas
from deltakeeper.service.cluster.catalog import Catalog
from deltakeeper.service.cluster.cluster_admission import ClusterAdmission, Gathered
from deltakeeper.service.cluster.cluster_engine import ClusterEngine
from deltakeeper.service.cluster.cluster_metrics import ClusterCollector
from deltakeeper.service.cluster.cluster_tenants import ClusterTenants
from deltakeeper.service.cluster.messages import ReplicaPlan
from deltakeeper.service.cluster.routes import replicas_router
from deltakeeper.service.cluster.scaling import Scaling
from deltakeeper.service.cluster.watch import Watch
from deltakeeper.service.metrics import ServiceMetrics
from deltakeeper.service.running import Services

Start = Callable[[str, ReplicaPlan], AbstractContextManager[Replicas]]
"""Runs replicas of an application of this name, made by this plan."""


@dataclass(frozen=True)
class DistantBase:
    """A base whose weights are in other processes.

    Attributes:
        source: folder or hub name, the same for all of them.
        path: its folder here.
        tokenizer: its tokenizer.
    """

    source: str
    path: Path
    tokenizer: Any

    @cached_property
    def root(self) -> str:
        """Fingerprint of its checkpoint; reads all of it once, and keeps nothing of it."""
        return read_root(self.path)


def open_distant_base(source: str) -> DistantBase:
    """Open a base without its weights.

    Raises:
        CheckpointError: there is no such model.
        DataError: it has no tokenizer that can be read.
    """
    with open_checkpoint(source) as checkpoint:
        path = checkpoint.path
    given = str(path.resolve()) if Path(source).exists() else source
    return DistantBase(given, path, read_tokenizer(path))


@contextmanager
def clustered(base: DistantBase, plan: Plan, scaling: Scaling, start: Start) -> Iterator[Assembled]:
    """Run a service over a cluster until the block ends.

    Args:
        base: the base; each replica loads its weights.
        plan: as for a service on one machine; memory, threads and answers side by side are those of a replica.
        scaling: how many replicas there are.
        start: runs them, such as `ray_replicas.on_ray`.

    Raises:
        DataError: there are no keys and the address is not loopback, the policy or the log of decisions cannot be used,
            or there is no such cluster.
        EngineError: no replica could be started.
        StateError: the state cannot be opened.
        TenantError: the folder of deltas cannot be read, or the base's name is a tenant's.
    """
    with ExitStack() as stack:
        gate, where = opened_gate(plan, stack)
        gathered = _opened_decisions(base, plan, stack)
        made = ReplicaPlan(
            base=base.source,
            root=base.root,
            version=metadata.version("deltakeeper"),
            delta_bytes=plan.delta_bytes,
            loaders=plan.loaders,
            engine=plan.engine,
            policy=None if plan.policy is None else plan.policy.resolve(),
            policy_sha256=None if gathered is None else gathered.policy.sha256,
            decisions=plan.decisions.resolve().with_name(f"{plan.decisions.stem}.replicas"),
            with_defaults=plan.settings.with_defaults,
        )
        name = f"deltakeeper-{base.root[:12]}"
        replicas = stack.enter_context(start(name, made))
        watch = Watch(replicas) if gathered is None else Watch(replicas, gathered.listen)
        stack.callback(watch.close)
        yield _assembled(base, plan, scaling, _Parts(stack, watch, gathered, gate, where))


@dataclass(frozen=True)
class _Parts:
    stack: ExitStack
    watch: Watch
    gathered: Gathered | None
    gate: Any
    where: str


def _assembled(base: DistantBase, plan: Plan, scaling: Scaling, parts: _Parts) -> Assembled:
    watch, gathered, gate = parts.watch, parts.gathered, parts.gate
    listen = {} if gathered is None else {"listen": gathered.listen}
    catalog = Catalog(plan.deltas.resolve())
    tenants = ClusterTenants(watch, catalog, tries=scaling.tries, delta_bytes=plan.delta_bytes, **listen)
    register_tenants(tenants, gate, plan)
    context = watch.wait(scaling.start_seconds).context
    engine = ClusterEngine(watch, catalog, scaling, context=context, max_waiting=plan.engine.max_waiting, **listen)
    parts.stack.callback(engine.close)
    metrics = ServiceMetrics(engine, tenants, plan.base_name, None if gathered is None else gathered.log)
    metrics.registry.register(ClusterCollector(engine, watch))
    services = Services(
        engine=engine,
        store=tenants,
        base=base,
        base_name=plan.base_name,
        gate=gate,
        deltas=plan.deltas,
        admission=None if gathered is None else ClusterAdmission(gathered, watch, tenants),
        metrics=metrics,
        traces=opened_traces(plan, parts.stack),
        settings=plan.settings,
    )
    app = build_app(services, [*service_routers(plan), replicas_router(watch)])
    parts.stack.callback(app.state.texts.templates.close)
    return Assembled(services, app, gate.is_open, parts.where)


def _opened_decisions(base: DistantBase, plan: Plan, stack: ExitStack) -> Gathered | None:
    policy = opened_policy(plan, base.root)
    if policy is None:
        return None
    log = DecisionLog(plan.decisions)
    stack.callback(log.close)
    return Gathered(log, policy)
