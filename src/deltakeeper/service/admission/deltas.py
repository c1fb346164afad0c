"""Routes that manage deltas: our own, and vLLM's for clients that know those."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from deltakeeper.artifact import open_artifact
from deltakeeper.errors import ArtifactError, TenantError
from deltakeeper.service.admission.changes import Change, apply_change, forget, put_away
from deltakeeper.service.admission.inspection import describe
from deltakeeper.service.errors import BadRequest, NotFound
from deltakeeper.service.guard import require
from deltakeeper.service.running import Services

router = APIRouter(tags=["deltas"], dependencies=[require("manage")])

Name = Annotated[str, Path(max_length=128)]


class DeltaPlace(BaseModel):
    """What a name is to stand for.

    Attributes:
        path: subfolder of the deltas that holds the artifact; the one called like the name by default.
        planes: sign planes to serve; policy may allow fewer.
        replace: turn a name that stands for something else over to this, or load it anew.
        load: load it and run its canary before answering; otherwise with the first request.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    path: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    planes: Annotated[int, Field(ge=1, le=64)] | None = None
    replace: bool = False
    load: bool = True


@router.put("/admin/deltas/{name}", status_code=200, responses={201: {"description": "The name is new"}})
def put_delta(name: Name, request: Request, response: Response, place: DeltaPlace | None = None) -> dict[str, Any]:
    """Let a name stand for an artifact; 201 where the name is new. If anything keeps it out, nothing is changed."""
    services: Services = request.app.state.services
    wanted = place or DeltaPlace()
    change = Change(name, wanted.path or name, wanted.planes, wanted.replace, wanted.load)
    if apply_change(services, change):
        response.status_code = 201
    return _card(services, name)


@router.get("/admin/deltas")
def list_deltas(request: Request) -> dict[str, Any]:
    """All tenants, with where each stands and what was decided on it."""
    services: Services = request.app.state.services
    stats = services.store.stats()
    return {
        "object": "list",
        "data": [_state(services, name, one) for name, one in sorted(stats.tenants.items())],
        "byte_budget": stats.byte_budget,
        "resident_bytes": stats.resident_bytes,
        "reserved_bytes": stats.reserved_bytes,
    }


@router.get("/admin/deltas/{name}")
def get_delta(name: Name, request: Request) -> dict[str, Any]:
    """One tenant, with what its artifact's headers say."""
    return _card(request.app.state.services, name)


@router.delete("/admin/deltas/{name}")
def delete_delta(name: Name, request: Request) -> dict[str, Any]:
    """Serve a name no more; its artifact is moved to the hidden folder `.removed` among the deltas."""
    forget(request.app.state.services, name)
    return {"id": name, "object": "delta", "deleted": True}


class LoraLoad(BaseModel):
    """vLLM's request; what else its clients send is not looked at."""

    lora_name: Annotated[str, Field(max_length=4096)] = ""
    lora_path: Annotated[str, Field(max_length=4096)] = ""
    load_inplace: bool = False


class LoraUnload(BaseModel):
    """vLLM's request."""

    lora_name: Annotated[str, Field(max_length=4096)] = ""


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
def load_lora_adapter(body: LoraLoad, request: Request) -> str:
    """Load a delta under a name, as vLLM's route loads an adapter; its path lies among the deltas."""
    services: Services = request.app.state.services
    name = body.lora_name
    if not name or not body.lora_path:
        raise BadRequest("Both 'lora_name' and 'lora_path' must be provided.")
    stats = services.store.stats().tenants.get(name)
    if stats is not None and stats.state in ("resident", "loading") and not body.load_inplace:
        raise BadRequest(
            f"The lora adapter '{name[:140]}' has already been loaded. If you want to load the adapter in place, set "
            "'load_inplace' to True."
        )
    apply_change(services, Change(name, body.lora_path, replace=body.load_inplace))
    return f"Success: LoRA adapter '{name}' added successfully."


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
def unload_lora_adapter(body: LoraUnload, request: Request) -> str:
    """Serve a name no more, as vLLM's route does, until it is loaded again; the artifact is kept."""
    services: Services = request.app.state.services
    if not body.lora_name:
        raise BadRequest("'lora_name' needs to be provided to unload a LoRA adapter.")
    try:
        put_away(services, body.lora_name)
    except (NotFound, TenantError) as error:
        raise NotFound(f"The lora adapter '{body.lora_name[:140]}' cannot be found.") from error
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


def _state(services: Services, name: str, stats: Any) -> dict[str, Any]:
    decision = None if services.admission is None else services.admission.known(name, stats.version)
    card = {"id": name, "object": "delta", "parent": services.base_name, **asdict(stats)}
    return card | {"decision": None if decision is None else asdict(decision)}


def _card(services: Services, name: str) -> dict[str, Any]:
    stats = services.store.stats().tenants.get(name)
    if stats is None:
        raise NotFound(f"There is no delta {name[:140]!r}.", code="delta_not_found")
    try:
        source = services.store.source(name)
        artifact, folder = open_artifact(source.path), source.path.resolve().name
    except (ArtifactError, OSError, TenantError):  # its folder or link went away; what is in memory is served on
        return _state(services, name, stats) | {"artifact": None}
    served = {"folder": folder, "asked_planes": source.planes}
    return _state(services, name, stats) | {"artifact": served | describe(artifact)}
