"""Who may call which route: every route says so itself, and one that says nothing is never served."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

from fastapi import Depends, Request
from fastapi.openapi.models import HTTPBearer
from fastapi.routing import iter_route_contexts
from fastapi.security.base import SecurityBase

from deltakeeper.errors import DeltakeeperError
from deltakeeper.service.access import Principal
from deltakeeper.service.errors import Forbidden

Kind = Literal["public", "ask", "measure", "manage"]
"""`public` is for everybody, `ask` for keys of models, `measure` for those of metrics, `manage` for an admin's."""

_STRICTNESS: tuple[Kind, ...] = get_args(Kind)


class RouteError(DeltakeeperError):
    """A route that does not say who may call it; it is a mistake in the program, found when the service is built."""


class Guard:
    """The dependency that a route or its router declares; see `require`."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    async def __call__(self, request: Request) -> None:
        """Let the caller through, or raise `Unauthorized` or `Forbidden`."""
        if self.kind != "public":
            let_in(request.app.state.services.gate, request.scope, self.kind)


class KeyGuard(Guard, SecurityBase):
    """A guard that asks for a key, and says so in the OpenAPI document."""

    scheme_name = "key"
    model = HTTPBearer(description="A key of the service; on loopback everybody is let in until the first one is made.")


def require(kind: Kind) -> Any:
    """Declare who may call a route: `APIRouter(dependencies=[require("manage")])`.

    The caller is then `request.state.principal`, an `access.Principal`; public routes have none.
    """
    return Depends(Guard(kind) if kind == "public" else KeyGuard(kind))


class Upload:
    """The dependency of a route whose body is a file, which it reads as it comes; see `takes_uploads`."""

    async def __call__(self) -> None:
        """Nothing: it is the doorway that looks for it."""


def takes_uploads() -> Any:
    """Declare that a route's body may be as large as an artifact."""
    return Depends(Upload())


def is_upload(route: Any) -> bool:
    """Whether a route declares that."""
    found = (getattr(entry, "dependency", None) for entry in getattr(route, "dependencies", None) or ())
    return any(isinstance(one, Upload) for one in found)


def let_in(gate: Any, scope: Any, kind: Kind) -> Principal:
    """Identify the caller of a request that is not public, once, and keep them in its state.

    Args:
        gate: an `access.Gate`.
        scope: the ASGI scope of the request.
        kind: what the route requires.

    Raises:
        Unauthorized: there is no key, or an unknown one.
        Forbidden: the key may not do this.
    """
    state = scope.setdefault("state", {})
    principal: Principal | None = state.get("principal")
    if principal is None:
        keys = [value for name, value in scope["headers"] if name == b"authorization"]
        principal = state["principal"] = gate.identify(keys[0].decode("latin-1") if len(keys) == 1 else None)
    if kind == "ask" and not principal.asks:
        raise Forbidden("This key reads metrics alone; use a key of the models that you ask.")
    if kind == "measure" and not principal.measures:
        raise Forbidden("This key asks models and reads no metrics; use a monitor's or an admin key.")
    if kind == "manage" and not principal.manages:
        raise Forbidden("This key does not manage the service; use an admin key.")
    return principal


def kind_of(route: Any) -> Kind | None:
    """What a route requires, the strictest where it is said twice; None where nothing is said.

    Args:
        route: a route of FastAPI, or what `fastapi.routing.iter_route_contexts` gives for one.
    """
    guards = (getattr(entry, "dependency", None) for entry in getattr(route, "dependencies", None) or ())
    kinds = [guard.kind for guard in guards if isinstance(guard, Guard)]
    return max(kinds, key=_STRICTNESS.index, default=None)


def guarded_routes(routes: Iterable[Any]) -> Iterator[tuple[Any, Kind]]:
    """All routes, those of included routers too, with what each requires.

    Raises:
        RouteError: one of them does not say.
    """
    for route in iter_route_contexts(list(routes)):
        kind = kind_of(route)
        if kind is None:
            raise RouteError(f"the route {getattr(route, 'path', route)} does not say who may call it; add require(…).")
        yield route, kind
