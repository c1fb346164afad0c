"""The application: all routes behind one door."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import JSONResponse, Response

from deltakeeper.service import health, models
from deltakeeper.service.doorway import Doorway
from deltakeeper.service.error_answers import ErrorBody, add_error_answers
from deltakeeper.service.guard import require
from deltakeeper.service.openai import chat, completions, tokenization
from deltakeeper.service.running import Services
from deltakeeper.service.texts import Texts

_ABOUT = "OpenAI's API for a base model and any number of its fine-tunes, each asked by the name in `model`."


def build_app(services: Services, more: Iterable[APIRouter] = ()) -> FastAPI:
    """Make the application of a running service.

    Args:
        services: its parts; the engine's thread runs.
        more: further routers, such as those of keys, deltas and metrics.

    Raises:
        RouteError: a route does not say who may call it.
    """
    app = FastAPI(
        title="deltakeeper",
        description=_ABOUT,
        version=metadata.version("deltakeeper"),
        openapi_url=None,  # these would be routes without a guard
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would be an answer that no route has given
        responses={status: {"model": ErrorBody, "description": "An error."} for status in ("4XX", "5XX")},
    )
    app.state.services = services
    settings = services.settings
    app.state.texts = Texts(services.base, with_defaults=settings.with_defaults, most_unread=settings.max_unread)
    add_error_answers(app)
    for router in (
        health.router,
        models.router,
        chat.router,
        completions.router,
        tokenization.router,
        _document,
        *more,
    ):
        app.include_router(router)
    app.add_middleware(
        Doorway,
        routes=app.routes,
        gate=services.gate,
        settings=settings,
        traces=services.traces,
        metrics=services.metrics,
        context=services.engine.context,
    )
    return app


_document = APIRouter(dependencies=[require("public")])


@_document.get("/openapi.json", include_in_schema=False)
async def document(request: Request) -> Response:
    """The OpenAPI document of all routes."""
    found = request.app.openapi()
    for methods in found["paths"].values():
        for operation in methods.values():
            answers = operation["responses"]
            answers.pop("422", None)  # the framework's own shape of bad input, which is never answered here
            for status in ("4XX", "5XX"):  # it documents them under the media type of what the route gives
                answers[status]["content"] = {"application/json": next(iter(answers[status]["content"].values()))}
    return JSONResponse(found)
