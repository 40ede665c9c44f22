"""Tickets for those who can send no header, and sending somebody away."""

from __future__ import annotations

from aiohttp import web

from handlers.keys import CONFIG, IDENTITY, TICKETS, VIGIL
from handlers.middleware import json_response
from handlers.reading import Fields, read_object
from streaming.auth import USER_CHARS
from streaming.errors import Forbidden
from streaming.tickets import FRESH


async def tickets(request: web.Request) -> web.Response:
    """POST /api/v1/tickets {path?}: a ticket for whoever asks, to be used within 30 s."""
    fields = Fields(
        await read_object(request) if request.can_read_body else {}, request.app[CONFIG].limits
    )
    ticket = await request.app[TICKETS].issue(request[IDENTITY], fields.text("path", ""))
    headers = {"Cache-Control": "no-store"}
    return json_response({"ticket": ticket, "expires_in": int(FRESH)}, headers=headers)


async def disconnect(request: web.Request) -> web.Response:
    """POST /api/v1/disconnect {user}: ends all connections of a user, on every instance. For the
    user, services, and who may moderate that user's room.
    """
    fields = Fields(await read_object(request), request.app[CONFIG].limits)
    user, who = fields.text("user", most=USER_CHARS), request[IDENTITY]
    if not (who.service or who.may("moderate", f"user:{user}")):
        raise Forbidden("your token does not let you send this user away", param="user")
    await request.app[VIGIL].disconnect(user)
    return json_response({"disconnected": True})


def routes() -> list[web.RouteDef]:
    """This surface's routes."""
    return [
        web.post("/api/v1/tickets", tickets),
        web.post("/api/v1/disconnect", disconnect),
    ]
