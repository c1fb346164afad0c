"""`GET /v1/models`: the base and the tenants that a key may ask, without a word on where they lie."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request

from deltakeeper.service.access import Principal
from deltakeeper.service.guard import require
from deltakeeper.service.running import Services
from deltakeeper.service.tenants import check_known, is_refused

router = APIRouter(prefix="/v1", tags=["models"], dependencies=[require("ask")])
_STARTED = int(time.time())


@router.get("/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The base first, then every tenant that this key may ask and that is not known to be unfit."""
    services: Services = request.app.state.services
    principal: Principal = request.state.principal
    found = services.store.stats().tenants
    usable = (name for name, stats in sorted(found.items()) if not stats.unusable and not is_refused(services, name))
    names = [services.base_name, *usable]
    versions = {name: stats.version for name, stats in found.items()}
    cards = [_card(services, name, versions.get(name)) for name in names if principal.may_use(name)]
    return {"object": "list", "data": cards}


@router.get("/models/{model:path}")
async def show_model(model: str, request: Request) -> dict[str, Any]:
    """One of them; what there is not and what is not theirs give the same 404."""
    services: Services = request.app.state.services
    await check_known(services, request.state.principal, model)
    stats = services.store.stats().tenants.get(model)
    return _card(services, model, None if stats is None else stats.version)


def _card(services: Services, name: str, version: str | None) -> dict[str, Any]:
    """A model as OpenAI's clients know it.

    `root` is what is served: the fingerprint of the base, or the version of a tenant, which is a hash of its content
    and known once it is in memory; until then it is its name.
    """
    base = name == services.base_name
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "deltakeeper",
        "root": services.base.root if base else version or name,
        "parent": None if base else services.base_name,
        "max_model_len": services.engine.context,
    }
