"""Per-user channels over SSE, and the call by which services publish into them."""

from __future__ import annotations

import re

from aiohttp import web

from handlers.answers import admit, choose_encoder, deliver
from handlers.identity import check_service
from handlers.keys import CHANNELS, CONFIG, USER
from handlers.middleware import json_response
from handlers.reading import Fields, read_object
from streaming.channels import CHANNEL, as_object
from streaming.encoders import SSE, encoder
from streaming.errors import InvalidField
from streaming.events import Event, Position
from streaming.log import now_ms

_NAME = re.compile(r"[^\s:\x00-\x1f\x7f]{1,128}")
_EVENT = re.compile(r"[A-Za-z0-9_.-]{1,64}")


async def events(request: web.Request) -> web.StreamResponse:
    """GET /api/v1/sse/stream/{channel}: `connected`, then what is published to the caller there."""
    channel = _channel(request.match_info["channel"])
    encoding = choose_encoder(request, CHANNEL, SSE, bare=False)
    if not encoding.heartbeat_event:
        encoding = encoder(encoding.dialect, encoding.framing, "heartbeat")
    channels = request.app[CHANNELS]
    connected = Event("connected", {"channel": channel}, Position("", 0), now_ms(), {})
    with await admit(request):
        async with channels.reading(request[USER], channel) as cursor:
            return await deliver(
                request, encoding, cursor, {}, opening=[connected], delivery=channels.delivery
            )


async def publish(request: web.Request) -> web.Response:
    """POST /api/v1/sse/publish {user_id, channel, event, data}, by a service."""
    check_service(request)
    limits = request.app[CONFIG].limits
    fields = Fields(await read_object(request, limits.frame_bytes), limits)
    user, channel = fields.text("user_id", most=128), _channel(fields.text("channel", most=128))
    event = fields.text("event", most=64)
    if not _EVENT.fullmatch(event):
        raise InvalidField("event", "must be a name of letters, digits, `_`, `.` and `-`")
    told = as_object(fields.data.get("data"))
    streams = await request.app[CHANNELS].publish(user, channel, event, told)
    return json_response({"delivered": streams}, 202)


def _channel(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidField("channel", "must be 1 to 128 characters without spaces and `:`")
    return name


def routes() -> list[web.RouteDef]:
    """This surface's routes."""
    return [
        web.get("/api/v1/sse/stream/{channel}", events, allow_head=False),
        web.post("/api/v1/sse/publish", publish),
    ]
