"""The page at `/`: static files of this folder's `static`, which ask nobody but this service."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

_STATIC = Path(__file__).parent / "static"
_KINDS = {"index.html": "text/html", "style.css": "text/css", "script.js": "text/javascript", "icon.svg": "image/svg+xml"}
_HEADERS = {
    # No code and no style but from these files, nothing from elsewhere, and nobody shows the page inside another one.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes(*, needs_token: bool) -> APIRouter:
    """Routes of the page and its files.

    Args:
        needs_token: the page asks for one, which it sends with what may change something.
    """
    api = APIRouter(include_in_schema=False)
    files = {name: (_STATIC / name).read_bytes() for name in _KINDS}
    if needs_token:
        files["index.html"] = files["index.html"].replace(b'data-token="no"', b'data-token="yes"')

    def add(path: str, name: str) -> None:
        async def file() -> Response:
            return Response(files[name], media_type=_KINDS[name], headers=_HEADERS)

        api.add_api_route(path, file, methods=["GET", "HEAD"])

    add("/", "index.html")
    for name in files.keys() - {"index.html"}:
        add(f"/static/{name}", name)
    return api
