"""`GET /` and the files that it is made of. They say nothing of this service: what they show they ask with a key."""

from __future__ import annotations

from importlib import resources
from pathlib import PurePath

from fastapi import APIRouter, Response

from deltakeeper.service.guard import require

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",  # the form with the key is read by the script, and never sent
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # the browser itself refuses text as markup
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}
FILES = {
    "/": "index.html",
    "/web/page.css": "page.css",
    "/web/page.js": "page.js",
    "/web/service.js": "service.js",
    "/web/elements.js": "elements.js",
    "/web/overview.js": "overview.js",
    "/web/playground.js": "playground.js",
    "/web/icon.svg": "icon.svg",
}
"""Paths and the files behind them. There is no other way from a path to a file."""

_MEDIA = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

router = APIRouter(dependencies=[require("public")])


def _add(path: str, name: str) -> None:
    body = resources.files(__package__).joinpath(name).read_bytes()
    media = _MEDIA[PurePath(name).suffix]

    async def show() -> Response:
        return Response(body, media_type=media, headers=HEADERS)

    router.add_api_route(path, show, include_in_schema=False)


for _path, _name in FILES.items():
    _add(_path, _name)
