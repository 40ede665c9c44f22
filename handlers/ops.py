"""What operators and their machines ask: is it alive, is it ready, does it stream."""

from __future__ import annotations

import asyncio

from aiohttp import web

from handlers.answers import admit, choose_encoder, deliver
from handlers.keys import CONFIG, STATE
from handlers.middleware import json_response
from handlers.reading import Fields, last_event_id
from streaming.dialects import Dialect, timestamp
from streaming.encoders import SSE
from streaming.errors import Gone
from streaming.events import JSON, Event, Position
from streaming.log import Cursor, Log, now_ms

_NO_STORE = {"Cache-Control": "no-store"}
EVENT_BYTES = 256  # about what one event of a count takes, so that a read of it is bounded


async def health(request: web.Request) -> web.Response:
    """GET /health: the process answers."""
    return json_response({"status": "healthy"}, headers=_NO_STORE)


async def ready(request: web.Request) -> web.Response:
    """GET /ready: 200, or 503 when no new client should come here: `status` says why, and where
    there is more than one reason `also` has the others.
    """
    state = request.app[STATE]
    wrong = ["draining"] if state.draining else []
    wrong += [why for why, need in state.needs.items() if not need.ready]
    if wrong:
        body = {"status": wrong[0], **({"also": wrong[1:]} if wrong[1:] else {})}
        return json_response(body, 503, {**_NO_STORE, "Retry-After": "1"})
    return json_response({"status": "ready"}, headers=_NO_STORE)


async def heartbeat(request: web.Request) -> web.Response:
    """GET or POST /api/heartbeat"""
    body = {"status": "ok", "timestamp": timestamp(now_ms())}
    return json_response(body, headers=_NO_STORE)


def _say_count(event: Event) -> list[JSON] | None:
    if event.type != "delta":
        return [{"type": event.type}]
    content = event.data["content"].rstrip()
    return [{"type": "data", "content": content, "timestamp": event.time}]


COUNT = Dialect("count", _say_count, ids="after", merge=False)
COUNT_EPOCH = "api_stream_count"  # its events are computed, so every life of it is the same


class CountLog(Log):
    """A start, numbered messages, an end; it holds none of them: an event is made where it is read,
    so that the longest count costs nothing. Event 1 is the start, event n message n - 1.
    """

    def __init__(self, after: int, last: int) -> None:
        super().__init__({}, epoch=COUNT_EPOCH, start=after)
        self._last = last

    def read(self, after: int, *, merge: bool = True, limit: int = 1 << 62) -> list[Event]:
        """See Log.read."""
        until = min(self.top, after + max(1, limit // EVENT_BYTES))
        return [self._event(number) for number in range(after + 1, until + 1)]

    def _event(self, number: int) -> Event:
        type, data = "delta", {"kind": "text", "content": f"Message {number - 1}\n"}
        if number in (1, self._last):
            type, data = "start" if number == 1 else "end", {}
        return Event(type, data, Position(self.epoch, number), now_ms(), self.origin)

    def advance(self, whole: bool) -> None:
        """Goes on by one message, or to the end; the end comes with the last message."""
        self.top = max(self.top + 1, 2)
        if whole or self.top >= self._last - 1:
            self.top = self._last
            self.close()
        for listener in self.listeners:
            listener()


async def count(request: web.Request) -> web.StreamResponse:
    """GET /api/stream?count=10&interval=1: counts, to try a client or a proxy on. Event n of it is
    the same whenever it is asked for, so it resumes with nothing kept.
    """
    fields = Fields(request.query, request.app[CONFIG].limits)
    messages = fields.integer("count", 10, 0, 1_000_000)
    interval = fields.number("interval", 1.0, 0.0, 3600.0)
    encoder = choose_encoder(request, COUNT, SSE)
    resumed = last_event_id(request)
    position = Position(COUNT_EPOCH, 0) if resumed is None else Position.parse(resumed)
    if position is None or position.epoch != COUNT_EPOCH:
        raise Gone("this position cannot be resumed", param="Last-Event-ID")
    last = messages + 2
    if position.offset >= last:
        return web.Response(status=204, headers=_NO_STORE)
    log = CountLog(position.offset, last)
    log.advance(whole=not interval)
    task = asyncio.create_task(_count(log, interval))
    try:
        with await admit(request):
            return await deliver(request, encoder, Cursor(log, position.offset), {})
    finally:
        task.cancel()


async def _count(log: CountLog, interval: float) -> None:
    while not log.closed:
        await asyncio.sleep(interval)
        log.advance(whole=False)


def routes() -> list[web.RouteDef]:
    """This surface's routes."""
    return [
        web.get("/health", health, allow_head=False, name="health"),
        web.get("/ready", ready, allow_head=False),
        web.get("/api/heartbeat", heartbeat, allow_head=False),
        web.post("/api/heartbeat", heartbeat),
        web.get("/api/stream", count, allow_head=False),
    ]
