"""`GET /admin/replicas`: where the cluster's replicas run, and which tenants each of them holds."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from deltakeeper.service.cluster.messages import Report
from deltakeeper.service.cluster.watch import Watch
from deltakeeper.service.guard import require


def replicas_router(watch: Watch) -> APIRouter:
    """The route over what was last heard of the replicas."""
    router = APIRouter(prefix="/admin", tags=["status"], dependencies=[require("manage")])

    @router.get("/replicas")
    def list_replicas() -> dict[str, Any]:
        """Every replica that runs, as it last reported, with its tenants in memory and their bytes."""
        return {"object": "list", "data": [_card(report) for report in watch.live()]}

    return router


def _card(report: Report) -> dict[str, Any]:
    store, engine = report.store, report.engine
    return {
        "id": report.replica,
        "object": "replica",
        "node": report.node,
        "pid": report.pid,
        "running": engine.running,
        "waiting": engine.waiting,
        "byte_budget": store.byte_budget,
        "resident_bytes": store.resident_bytes,
        "reserved_bytes": store.reserved_bytes,
        "deltas": {name: one.resident_bytes for name, one in sorted(store.tenants.items()) if one.resident_bytes},
    }
