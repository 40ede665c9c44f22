"""Who is asking, and what they may do: from a request's credentials to an `Identity`."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext, suppress

from aiohttp import web

from handlers.keys import AUTH, CONFIG, IDENTITY, TICKETS
from handlers.reading import check_query, path_of
from streaming.auth import USER_CHARS, Identity
from streaming.errors import BadRequest, Forbidden, InvalidField, NotFound, Unauthorized
from streaming.generation import Generation
from streaming.grants import PERSONAL
from streaming.limits import client_ip
from streaming.tickets import target

COOKIE = "rivulet_token"
# To be asked by machines and pages that have no credentials yet.
PUBLIC = frozenset(("/", "/health", "/ready", "/api/heartbeat", "/openapi.json"))
NOBODY = Identity("")
_NAME = re.compile(r"[^\s\x00-\x1f\x7f]{1,128}")


async def identify(request: web.Request) -> Identity:
    """Who is asking; NOBODY where nobody has to say. Raises Unauthorized, BadRequest."""
    check_query(request)
    auth = request.app[AUTH]
    public, ticket = path_of(request) in PUBLIC, ticket_of(request)
    if ticket and not public:
        tickets, asked = request.app[TICKETS], target(request.raw_path)
        with suppress(*([Unauthorized] if auth.open else [])):  # there any or no token is taken
            return await tickets.redeem(ticket, asked, _is_socket(request))
    if auth.open:
        return auth.guest(_claimed(request))
    token = _token(request)
    if public or (not token and is_room_socket(request)):
        return NOBODY
    return auth.identify(token)


def is_room_socket(request: web.Request) -> bool:
    """Whether it opens a WebSocket of rooms, on which a client may say later who it is."""
    return _is_socket(request) and (path_of(request) + "/").startswith("/ws/")


def _is_socket(request: web.Request) -> bool:
    return request.headers.get("Upgrade", "").lower() == "websocket"


def ticket_of(request: web.Request) -> str:
    """The ticket in its query, or ""."""
    return request.query.get("ticket", "") if request.method == "GET" else ""


def holding(request: web.Request) -> AbstractContextManager[None]:
    """Keeps the ticket good that a stream came with, as long as this is open."""
    ticket = "" if _is_socket(request) else ticket_of(request)
    return request.app[TICKETS].held(ticket) if ticket else nullcontext()


def address_of(request: web.Request) -> str:
    """The address of whoever asks, as far as the proxies before this server are trusted."""
    forwarded = ",".join(request.headers.getall("X-Forwarded-For", []))
    return client_ip(request.remote or "", forwarded, request.app[CONFIG].server.trusted_proxies)


def _token(request: web.Request) -> str | None:
    headers = request.headers
    scheme, _, bearer = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return bearer.strip()
    named = headers.get("X-API-Key") or headers.get("api-key")
    return named or request.cookies.get(COOKIE)


def _claimed(request: web.Request) -> str:
    """In open mode, who the client says it is; else `anonymous`."""
    name = request.headers.get("X-User-Id") or request.query.get("user_id") or "anonymous"
    if len(name) > USER_CHARS or not name.isprintable():
        message = f"a user id has at most {USER_CHARS} printable characters"
        raise BadRequest(message, param="X-User-Id")
    return name


def check_room(name: str, who: Identity, action: str) -> str:
    """The name, where it is one and this person may do that in the room: one of grants.ACTIONS.

    Raises InvalidField, Forbidden; NotFound, as if it were not there, for the conversation or the
    personal room of another.
    """
    if not _NAME.fullmatch(name):
        raise InvalidField("room", "must be 1 to 128 characters without spaces")
    if not who.may(action, name):
        if name.startswith(PERSONAL):
            raise NotFound("no such room", param="room")
        raise Forbidden(f"your token does not let you {action} in this room", param="room")
    return name


def check_stop(generation: Generation, who: Identity) -> None:
    """Raises Forbidden for whoever may read it, and not stop it."""
    if not any(generation.open_to(who, action) for action in ("generate", "moderate")):
        raise Forbidden("your token does not let you stop this answer")


def check_service(request: web.Request) -> None:
    """Raises Forbidden for whoever may not speak for others."""
    if not request[IDENTITY].service:
        raise Forbidden("this takes the key of a service")
