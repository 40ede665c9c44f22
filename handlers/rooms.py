"""Rooms over HTTP: publish, follow, look back, who is here."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from handlers.answers import admit, choose_encoder, deliver
from handlers.identity import check_room
from handlers.keys import CONFIG, GENERATIONS, IDENTITY, PRESENCE, ROOMS, USER
from handlers.middleware import json_response
from handlers.reading import Fields, idempotency_key, last_event_id, read_json
from streaming.encoders import SSE
from streaming.errors import BadRequest, Conflict, Forbidden, InvalidField, NotFound, TooLarge
from streaming.events import JSON, Position
from streaming.frames import RESERVED, message
from streaming.frames import ROOMS as FRAMES
from streaming.room import Room

_TYPE = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
PAGE = 50  # messages of history, unless `limit` says
BATCH = 100


def is_personal(name: str) -> bool:
    """Whether it is a `user:{id}`, in which every connection of theirs is as long as it lives."""
    return name.startswith("user:")


def _named(request: web.Request, action: str) -> str:
    """The name of the room in the path, where whoever asks may do that in it."""
    return check_room(request.match_info["room"], request[IDENTITY], action)


async def room_of(request: web.Request, after: str | None = None) -> Room:
    """The room in the request's path, for who may read it, made where there is none, as of position
    `after` at least.
    """
    return await request.app[ROOMS].open(_named(request, "subscribe"), after)


def said(fields: Fields, user: str, type: str) -> JSON:
    """The data of an event of this type, from its fields. Raises InvalidField, TooLarge."""
    event: JSON = {"user_id": user}
    if type == "message" or fields.data.get("content") is not None:
        event["content"] = fields.text("content")
    if fields.data.get("data") is not None:
        event["data"] = fields.data["data"]
    return event


def _type(fields: Fields) -> str:
    type = fields.text("type", "message", most=64)
    if not _TYPE.fullmatch(type) or type in RESERVED:
        raise InvalidField("type", "must be a name that the server does not use itself")
    return type


async def post_messages(request: web.Request) -> web.Response:
    """POST /api/v1/rooms/{room}/messages: one event, or a list of them, all or none."""
    name, user = _named(request, "publish"), request[USER]
    limits = request.app[CONFIG].limits
    body = await read_json(request, limits.frame_bytes)  # as on a socket: a room keeps many of them
    batch = body if isinstance(body, list) else [body]
    if len(batch) > BATCH:
        raise TooLarge(f"a batch has at most {BATCH} events", param="body")
    if not batch or not all(isinstance(each, dict) for each in batch):
        raise BadRequest("the body must be a JSON object or a list of them", param="body")
    fields = [Fields(each, limits) for each in batch]
    told = [(type := _type(each), said(each, user, type)) for each in fields]
    room = await request.app[ROOMS].open(name)  # not before: it may be forgotten while a body comes
    ids = await room.publish(told, key=(user, idempotency_key(request)))
    answer: JSON = {"ids": ids} if isinstance(body, list) else {"id": ids[0]}
    return json_response(answer, 201)


async def get_messages(request: web.Request) -> web.Response:
    """GET /api/v1/rooms/{room}/messages?before=&limit=: a page of history, the newest first."""
    return json_response(history(await room_of(request), request.query, request.app[CONFIG].limits))


def history(room: Room, query: Mapping[str, Any], limits: Any) -> JSON:
    """One page: messages oldest first, and where the page before it ends. Raises InvalidField."""
    limit = Fields(query, limits).integer("limit", PAGE, 1, 1000)
    before, top = query.get("before"), room.log.top + 1
    if before is not None:
        position = Position.parse(before) if isinstance(before, str) else None
        if position is None or position.epoch != room.log.epoch:
            raise InvalidField("before", "must be the id of a message of this room")
        top = position.offset
    page = room.history(top, limit + 1)
    more, page = len(page) > limit, page[-limit:]
    return {
        "messages": [message(event) for event in page],
        "next": str(page[0].id) if more else None,
    }


async def presence(request: web.Request) -> web.Response:
    """GET /api/v1/rooms/{room}/presence"""
    room = await room_of(request)
    return json_response({"room": room.name, "members": room.members})


async def rooms(request: web.Request) -> web.Response:
    """GET /api/v1/rooms: which rooms live, on any instance, as far as whoever asks may moderate
    them. It says so where an instance did not answer.
    """
    who = request[IDENTITY]
    if not who.grants.have("moderate"):
        raise Forbidden("your token does not let you moderate any room")
    listed, whole = await request.app[ROOMS].listed()
    listed = [room for room in listed if who.may("moderate", room["room"])]
    return json_response({"rooms": listed, **({} if whole else {"incomplete": True})})


async def delete(request: web.Request) -> web.Response:
    """DELETE /api/v1/rooms/{room}: ends it and what runs in it; everybody in it is told `left`."""
    name, who = _named(request, "moderate"), request[IDENTITY]
    if is_personal(name):
        raise Conflict("all connections of its owner are in this room", param="room")
    rooms = request.app[ROOMS]
    room = await rooms.seek(name)
    if room is None:
        raise NotFound("no such room", param="room")
    for stream_id in list(room.running):
        generation = await request.app[GENERATIONS].find(stream_id, who, "moderate")
        if generation is not None:
            generation.stop()
    # A client that goes away meanwhile leaves no half of it.
    await asyncio.shield(asyncio.create_task(rooms.delete(room, who.user)))
    return json_response({"deleted": True})


async def events(request: web.Request) -> web.StreamResponse:
    """GET /api/v1/rooms/{room}/events: `joined`, then what comes, from `Last-Event-ID` on."""
    encoder = choose_encoder(request, FRAMES, SSE, bare=False)
    after, user = last_event_id(request), request[USER]
    room, here = await room_of(request, after), request.app[PRESENCE]
    with await admit(request):
        here.enter(room, user)
        try:
            cursor, opening = room.join(after)
            return await deliver(request, encoder, cursor, {}, opening=opening)
        finally:
            here.leave(room, user)


def routes() -> list[web.RouteDef]:
    """This surface's routes."""
    return [
        web.get("/api/v1/rooms", rooms, allow_head=False),
        web.delete("/api/v1/rooms/{room}", delete),
        web.post("/api/v1/rooms/{room}/messages", post_messages),
        web.get("/api/v1/rooms/{room}/messages", get_messages, allow_head=False),
        web.get("/api/v1/rooms/{room}/presence", presence, allow_head=False),
        web.get("/api/v1/rooms/{room}/events", events, allow_head=False),
    ]
