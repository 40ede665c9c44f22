"""A generation by its stream id: its status, its events in any dialect, its stop."""

from __future__ import annotations

import asyncio
import contextlib
import re

from aiohttp import web

from handlers.answers import Found, attach, choose_encoder, place_of, resume
from handlers.identity import check_stop
from handlers.keys import GENERATIONS, IDENTITY
from handlers.middleware import json_response
from streaming.dialects import DIALECTS, NATIVE
from streaming.encoders import SSE
from streaming.errors import InvalidField, NotFound
from streaming.events import Position
from streaming.generation import Generation

STOPPING = 1.0  # seconds
_OFFSET = re.compile(r"[0-9]{1,15}")


async def status(request: web.Request) -> web.Response:
    """GET /api/v1/streams/{id}"""
    return json_response((await _find(request)).status(), headers={"Cache-Control": "no-store"})


async def events(request: web.Request) -> web.StreamResponse:
    """GET /api/v1/streams/{id}/events: from the start, from `starting_after`, or from where
    `Last-Event-ID` says, which counts more: an `EventSource` sends its URL again as it was.
    """
    name = request.query.get("dialect", NATIVE.name)
    if name not in DIALECTS:
        raise InvalidField("dialect", f"must be one of {', '.join(DIALECTS)}")
    dialect = DIALECTS[name]
    resumed = await resume(request, dialect, SSE)
    if resumed is not None:
        return resumed
    generation = await _find(request)
    encoder = choose_encoder(request, dialect, SSE)
    return await attach(request, generation, encoder, await _starting_after(request, generation))


async def stop(request: web.Request) -> web.Response:
    """POST /api/v1/streams/{id}/stop: 200 however often it is called, before, during and after."""
    generation = await _find(request)
    check_stop(generation, request[IDENTITY])
    generation.stop()
    with contextlib.suppress(TimeoutError):  # here at once; of another instance as soon as it says
        async with asyncio.timeout(STOPPING):
            await generation.ended()
    return json_response(generation.status())


async def _find(request: web.Request) -> Generation:
    generation = await request.app[GENERATIONS].find(request.match_info["id"], request[IDENTITY])
    if generation is None:
        raise NotFound("no such stream", param="id")
    return generation


async def _starting_after(request: web.Request, generation: Generation) -> Found:
    text = request.query.get("starting_after", "0")
    if _OFFSET.fullmatch(text):
        text = f"{generation.id}-{text}"
    position = Position.parse(text)
    place = await place_of(generation, position) if position is not None else None
    if place is None:
        raise InvalidField("starting_after", "must be an offset or a position of this stream")
    return place


def routes() -> list[web.RouteDef]:
    """This surface's routes."""
    return [
        web.get("/api/v1/streams/{id}", status, allow_head=False),
        web.get("/api/v1/streams/{id}/events", events, allow_head=False),
        web.post("/api/v1/streams/{id}/stop", stop),
    ]
