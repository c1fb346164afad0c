"""Whether the service lives and takes requests; neither says anything of tenants."""

from __future__ import annotations

from importlib import metadata

from fastapi import APIRouter, Request

from deltakeeper.service.errors import Unavailable
from deltakeeper.service.guard import require
from deltakeeper.service.running import Services

router = APIRouter(tags=["health"], dependencies=[require("public")])


@router.head("/health", include_in_schema=False)
@router.get("/health")
@router.head("/ping", include_in_schema=False)
@router.post("/ping")
@router.get("/ping")
async def health(request: Request) -> dict[str, str]:
    """200 as long as the engine lives; 503 once its loop has ended, since only a restart helps then."""
    services: Services = request.app.state.services
    if not services.engine.alive:
        raise Unavailable("The engine has stopped; start the service anew.")
    return {"status": "ok"}


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    """200 while requests are taken; 503 from when it is told to stop, and while it cannot tell keys.

    Nothing new is to be routed here then.
    """
    services: Services = request.app.state.services
    if services.drain.announced:
        raise _stopping(services)
    check_taking(services)
    if not services.gate.knows:
        raise Unavailable("Keys cannot be checked at the moment.", retry_after=services.settings.retry_seconds)
    return {"status": "ready"}


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of this program, in vLLM's shape."""
    return {"version": metadata.version("deltakeeper")}


def check_taking(services: Services) -> None:
    """Let nothing new in once the service is about to stop; raises `Unavailable`."""
    if services.drain.begun or not services.engine.alive:
        raise _stopping(services)


def _stopping(services: Services) -> Unavailable:
    return Unavailable(
        "The service is stopping; ask again, elsewhere or later.",
        code="draining",
        retry_after=services.settings.retry_seconds,
    )
