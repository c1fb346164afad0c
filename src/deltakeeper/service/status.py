"""`GET /admin/status`: what the service does at this moment, in numbers, for its web page and for whoever runs it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from deltakeeper.errors import TenantError
from deltakeeper.service.guard import require
from deltakeeper.service.running import Services
from deltakeeper.service.serving_port import TenantPlaces

router = APIRouter(prefix="/admin", tags=["status"], dependencies=[require("manage")])


@router.get("/status")
def show_status(request: Request) -> dict[str, Any]:
    """Counters of the engine and of all deltas together, and the fidelities at which an artifact can be asked.

    `open` is whether everybody on this machine is let in, `fidelities` lists names that stand for one artifact.
    """
    services: Services = request.app.state.services
    engine, deltas = services.engine.stats(), services.store.stats()
    return {
        "object": "status",
        "base": services.base_name,
        "version": metadata.version("deltakeeper"),
        "open": request.state.principal.role == "open",
        "ready": services.engine.alive and not services.drain.announced,
        "policy": services.admission is not None,
        "engine": {key: value for key, value in vars(engine).items() if key != "recent_steps"},
        "deltas": {key: value for key, value in vars(deltas).items() if key != "tenants"},
        "fidelities": _fidelities(services.store, deltas.tenants),
    }


def _fidelities(store: TenantPlaces, names: Iterable[str]) -> list[list[dict[str, Any]]]:
    """Names that stand for one artifact at different numbers of sign planes, coarsest first; None is all planes."""
    found: defaultdict[Path, list[dict[str, Any]]] = defaultdict(list)
    for name in names:
        with suppress(TenantError, OSError, RuntimeError):  # it was removed meanwhile, or its link leads in a circle
            source = store.source(name)
            found[source.path.resolve()].append({"id": name, "planes": source.planes})
    return [
        sorted(group, key=lambda one: (one["planes"] is None, one["planes"] or 0, one["id"]))
        for group in found.values()
        if len({one["planes"] for one in group}) > 1
    ]
