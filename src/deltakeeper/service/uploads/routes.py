"""`PUT /admin/artifacts/{name}`: an artifact from elsewhere, as one archive."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from starlette.requests import ClientDisconnect

from deltakeeper.service.admission.changes import alone, checked_name
from deltakeeper.service.admission.inspection import describe
from deltakeeper.service.admission.placing import unwritable
from deltakeeper.service.errors import BadRequest, Conflict, Refused
from deltakeeper.service.guard import require, takes_uploads
from deltakeeper.service.running import Services
from deltakeeper.service.uploads.arrival import Arrival

router = APIRouter(tags=["deltas"], dependencies=[require("manage")])
_PIECE = 1 << 20
_BODY = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}, "required": True}


@router.put(
    "/admin/artifacts/{name}",
    status_code=201,
    dependencies=[takes_uploads()],
    openapi_extra={"requestBody": _BODY},
)
async def put_artifact(name: Annotated[str, Path(max_length=128)], request: Request) -> dict[str, Any]:
    """Put an artifact among the deltas, from a tar archive of its files; a name that is taken is not overwritten.

    It is checked against its hashes, the base and the policy first. It is loaded when it is asked for by its name, or
    when a name is turned over to it with `PUT /admin/deltas/{name}`.
    """
    services: Services = request.app.state.services
    checked_name(services, name)
    with alone(services, name):
        place = services.deltas / name
        if place.exists() or place.is_symlink():
            raise Conflict(f"The name '{name}' is taken; give the artifact another, and turn the name over to it.")
        try:
            arrival = await asyncio.to_thread(Arrival, services.deltas, name, _most_bytes(services))
            try:
                await _receive(request, arrival)
                artifact = await asyncio.to_thread(arrival.check, services.base.root)
                if services.admission is not None:
                    decision = await asyncio.to_thread(services.admission.decide, name, arrival.folder)
                    if decision.verdict == "refused":
                        told = " ".join(decision.reasons).replace(str(arrival.folder), name)  # where it is not for long
                        raise Refused(told, code="not_admitted")
                card = describe(artifact)
                arrival.place()
                services.notes.put_away.discard(name)  # it was the name of another
            finally:
                await asyncio.to_thread(arrival.discard)
        except ClientDisconnect as error:
            raise BadRequest("The upload broke off; send it again.", code="archive_cut_off") from error
        except OSError as error:
            raise unwritable(error) from error
    return {"id": name, "object": "artifact", **card}


async def _receive(request: Request, arrival: Arrival) -> None:
    """Write on threads what comes, a piece at a time: a disk that is slow holds up this upload alone."""
    held = bytearray()
    async for piece in request.stream():
        held += piece
        if len(held) >= _PIECE:
            await asyncio.to_thread(arrival.feed, bytes(held))
            held.clear()
    await asyncio.to_thread(arrival.feed, bytes(held))


def _most_bytes(services: Services) -> int:
    allowed = None if services.admission is None else services.admission.max_bytes
    most = services.settings.max_upload_bytes
    return most if allowed is None else min(most, allowed)
