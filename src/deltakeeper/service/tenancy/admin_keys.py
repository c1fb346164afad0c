"""Routes to make and revoke keys and to set quotas, for admin keys."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from deltakeeper.service.errors import NotFound
from deltakeeper.service.guard import require
from deltakeeper.service.running import Services
from deltakeeper.service.tenancy.gate import StateGate
from deltakeeper.service.tenancy.keys import KeyRole
from deltakeeper.service.tenancy.quotas import EACH, MOST, Limits, Quota, Scope

router = APIRouter(prefix="/admin", tags=["keys and quotas"], dependencies=[require("manage")])


class KeyWanted(BaseModel):
    """A key to be made. A tenant's key says which models it may ask, or `all`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=128)
    role: KeyRole = "tenant"
    models: list[str] | Literal["all"] | None = None
    expires_in: int | None = Field(default=None, ge=1, le=10**10, description="Seconds; none for never.")


class LimitsWanted(BaseModel):
    """Limits of a quota; one that is left out is none."""

    model_config = ConfigDict(extra="forbid", strict=True)

    requests_per_minute: int | None = Field(default=None, ge=1, le=MOST)
    tokens_per_minute: int | None = Field(default=None, ge=1, le=MOST)
    concurrent: int | None = Field(default=None, ge=1, le=MOST)


def _gate(request: Request) -> StateGate:
    gate = request.app.state.services.gate
    if not isinstance(gate, StateGate):
        raise NotFound("This service keeps no keys and quotas.")
    return gate


KeptGate = Annotated[StateGate, Depends(_gate)]
Subject = Annotated[str, Path(min_length=1, max_length=256)]


@router.get("/keys")
def list_keys(gate: KeptGate) -> dict[str, Any]:
    """All keys that were ever made, without their secrets."""
    now = time.time()
    return {"object": "list", "data": [key.to_json(now) for key in gate.keys.all()]}


@router.post("/keys", status_code=201)
def create_key(wanted: KeyWanted, gate: KeptGate, request: Request, response: Response) -> dict[str, Any]:
    """Make a key. The answer is the only place where its secret is ever shown.

    It has a `warning` if the key is for models that are not known yet.
    """
    models = None if wanted.models == "all" else wanted.models
    if wanted.role == "tenant" and wanted.models is None:
        models = []  # refused below: what is not allowed is denied
    made = gate.keys.create(wanted.name, wanted.role, models, expires_in=wanted.expires_in)
    gate.refresh()
    response.headers["Cache-Control"] = "no-store"
    return {**made.key.to_json(time.time()), "secret": made.secret, **_warning(request, models or ())}


@router.get("/keys/{key_id}")
def get_key(key_id: Subject, gate: KeptGate) -> dict[str, Any]:
    """One key, without its secret."""
    return gate.keys.get(key_id).to_json(time.time())


@router.delete("/keys/{key_id}")
def revoke_key(key_id: Subject, gate: KeptGate) -> dict[str, Any]:
    """Revoke a key: the next request with it is refused."""
    key = gate.keys.revoke(key_id)
    gate.refresh()
    return key.to_json(time.time())


@router.get("/quotas")
def list_quotas(gate: KeptGate) -> dict[str, Any]:
    """All quotas."""
    return {"object": "list", "data": [quota.to_json() for quota in gate.quotas.all()]}


@router.get("/quotas/{scope}/{subject:path}")
def get_quota(scope: Scope, subject: Subject, gate: KeptGate) -> dict[str, Any]:
    """The quota of a key's id or a model's name, or of `*`."""
    return gate.quotas.get(scope, subject).to_json()


@router.put("/quotas/{scope}/{subject:path}")
def set_quota(scope: Scope, subject: Subject, wanted: LimitsWanted, gate: KeptGate, request: Request) -> dict[str, Any]:
    """Set a quota; it holds for the next request. There is a `warning` if it is of a model that is not known yet."""
    if scope == "key" and subject != EACH:
        gate.keys.get(subject)
    quota = Quota(scope, subject, Limits(**wanted.model_dump()))
    gate.quotas.set(quota)
    gate.refresh()
    return quota.to_json() | _warning(request, {subject} - {EACH} if scope == "model" else ())


@router.delete("/quotas/{scope}/{subject:path}")
def remove_quota(scope: Scope, subject: Subject, gate: KeptGate) -> dict[str, Any]:
    """Take a quota away."""
    gate.quotas.remove(scope, subject)
    gate.refresh()
    return {"scope": scope, "subject": subject, "deleted": True}


def _warning(request: Request, names: Iterable[str]) -> dict[str, str]:
    """A sentence on models that are not known: they may come later, or be misspelt."""
    services: Services = request.app.state.services
    unknown = sorted(set(names) - {services.base_name, *services.store.names()})
    if not unknown:
        return {}
    return {"warning": f"No model is known as {', '.join(map(repr, unknown[:8]))} yet."}
