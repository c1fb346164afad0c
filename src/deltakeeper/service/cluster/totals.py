"""Counters of many replicas as those of one: what they hold is added up, and what they have done is never forgotten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import TypeVar

from deltakeeper.engine import EngineStats
from deltakeeper.engine.tenant_stats import StoreStats, TenantStats
from deltakeeper.service.cluster.messages import Report

_K = TypeVar("_K")
_HELD = ("running", "waiting", "kv_blocks", "kv_blocks_used", "kv_blocks_cached", "kv_bytes")
"""Of an engine's counters those that go with it; all others count what was done."""
_ORDER = ("resident", "loading", "draining", "failed", "cold")


def engine_totals(live: Iterable[Report], gone: Iterable[Report] = ()) -> EngineStats:
    """Counters of all engines.

    Args:
        live: reports of replicas that run.
        gone: last reports of those that do not, whose work still counts.
    """
    held = [report.engine for report in live]
    done = [*held, *(report.engine for report in gone)]
    sums = {
        field.name: sum(getattr(stats, field.name) for stats in (held if field.name in _HELD else done))
        for field in fields(EngineStats)
        if field.name not in ("finished", "recent_steps")
    }
    return EngineStats(**sums | {"finished": _added(stats.finished for stats in done), "recent_steps": ()})


def store_totals(names: Iterable[str], live: Iterable[Report], gone: Iterable[Report] = ()) -> StoreStats:
    """Counters of all stores; arguments as for engines, and `names` of the tenants that are known."""
    live, gone = list(live), list(gone)
    held = [report.store for report in live]
    done = [*held, *(report.store for report in gone)]
    return StoreStats(
        tenants={name: tenant_totals(name, live) for name in names},
        byte_budget=sum(stats.byte_budget for stats in held),
        resident_bytes=sum(stats.resident_bytes for stats in held),
        reserved_bytes=sum(stats.reserved_bytes for stats in held),
        residents=sum(stats.residents for stats in held),
        pins=sum(stats.pins for stats in held),
        waiting=sum(stats.waiting for stats in held),
        loads=sum(stats.loads for stats in done),
        failures=_added(stats.failures for stats in done),
        evictions=_added(stats.evictions for stats in done),
    )


def tenant_totals(name: str, live: Iterable[Report]) -> TenantStats:
    """One tenant on all replicas that have heard of it: it is where it is best off, and takes what it takes there."""
    parts = [report.store.tenants[name] for report in live if name in report.store.tenants]
    if not parts:
        return TenantStats("cold", None, 0, 0, 0, False, 0, 0, 0, 0.0, 0, "", 0.0, {})
    best = min(parts, key=lambda part: _ORDER.index(part.state))
    return replace(
        best,
        resident_bytes=sum(part.resident_bytes for part in parts),
        reserved_bytes=sum(part.reserved_bytes for part in parts),
        pins=sum(part.pins for part in parts),
        versions=sum(part.versions for part in parts),
        loads=sum(part.loads for part in parts),
        failures=sum(part.failures for part in parts),
        evictions=_added(part.evictions for part in parts),
    )


def _added(counts: Iterable[dict[_K, int]]) -> dict[_K, int]:
    total: Counter[_K] = Counter()
    for one in counts:
        total.update(one)
    return dict(total)
