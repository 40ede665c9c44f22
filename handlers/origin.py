"""From where a browser may ask: the rules on `Host` and `Origin`, and CORS (Fetch standard, 3.2).

A browser sends what it has for this server, a cookie or its place on the same machine, whichever
page asks. So a request from a page of another origin is refused, also one whose answer that page
could not read, unless its origin is listed.
"""

from __future__ import annotations

import re

from aiohttp import web

from handlers.keys import CONFIG
from streaming.config import Cors, is_loopback
from streaming.errors import Forbidden

EXPOSED = ", ".join(
    (
        "X-Stream-Id", "X-Conversation-Id", "X-Request-Id", "X-Workflow-Run-Id",
        "X-Workflow-Stream-Tail-Index", "Retry-After",
        "RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset",
    )
)  # fmt: skip
METHODS = "GET, POST, PUT, DELETE"
MAX_AGE = "600"  # seconds that a browser remembers a preflight
_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]*))(?::[0-9]*)?")


def check_host(request: web.Request) -> None:
    """In open mode on loopback a page could make its own name resolve to this machine, and be of
    the same origin (DNS rebinding): only names of loopback are answered to. Raises Forbidden.
    """
    auth, host = request.app[CONFIG].auth, request.headers.get("Host")
    if auth.mode == "open" and not auth.open_anywhere and host and not names_loopback(host):
        message = "in open mode this server answers to localhost only (auth.open_anywhere)"
        raise Forbidden(message, code="host_not_allowed")


def check_origin(request: web.Request) -> None:
    """Raises Forbidden where a page of another origin asks that is not listed."""
    origin = request.headers.get("Origin")
    if origin is None:
        # Another port of this machine is of the same site, and another origin all the same.
        foreign = request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site")
    else:
        own = origin.partition("://")[2] == request.headers.get("Host")
        foreign = not own and origin not in request.app[CONFIG].cors.origins
    if foreign:
        message = "pages of this origin may not use this server (cors.origins)"
        raise Forbidden(message, code="origin_not_allowed")


def names_loopback(host: str) -> bool:
    """Whether a `Host` names this machine to itself."""
    parts = _HOST.fullmatch(host)
    name = (parts[1] or parts[2]).rstrip(".").lower() if parts else ""
    return is_loopback(name) or name.endswith(".localhost")


def preflight(request: web.Request) -> web.Response | None:
    """The answer to a browser that asks whether it may ask; None to any other request. Raises
    Forbidden.
    """
    if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
        return None
    check_origin(request)
    headers = {
        "Access-Control-Allow-Methods": METHODS,
        # All that are asked for: none of them says anything to us from which harm comes.
        "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", ""),
        "Access-Control-Max-Age": MAX_AGE,
        "Cache-Control": "no-store",
    }
    return web.Response(status=204, headers=headers)


def headers_for(origin: str | None, cors: Cors) -> dict[str, str]:
    """What each answer says to browsers: who may read it, and what not to make of it. origin: of
    the page that asks.
    """
    headers = {
        "Vary": "Origin",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",  # a URL here may have a ticket in it
        "Cross-Origin-Resource-Policy": "same-site",
    }
    if origin is not None and origin in cors.origins:
        headers["Access-Control-Allow-Origin"] = origin
        headers["Access-Control-Allow-Credentials"] = "true"
        headers["Access-Control-Expose-Headers"] = EXPOSED
    return headers
