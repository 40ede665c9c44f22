"""From a generation to an answer: streamed in any encoding, resumed, or whole as JSON."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple

from aiohttp import web

from handlers.identity import address_of
from handlers.keys import (
    CONFIG,
    DELIVERY,
    GENERATION,
    GENERATIONS,
    IDENTITY,
    LIMITS,
    METRICS,
    REQUEST_ID,
    USER,
)
from handlers.middleware import error_response, json_response
from handlers.reading import framing, last_event_id, path_of
from streaming.channels import CHANNEL
from streaming.delivery import Delivery
from streaming.dialects import Dialect
from streaming.encoders import TEXT, Encoder, Framing, encoder
from streaming.errors import Conflict, Gone, InvalidField, RivuletError, Unavailable
from streaming.events import JSON, Event, Position
from streaming.frames import ROOMS as FRAMES
from streaming.generation import Generation
from streaming.limits import Entry
from streaming.log import Cursor, FellBehind, now_ms
from streaming.places import Draining, Expelled, Place, TooSlow
from streaming.responses import ResponseSink, open_stream

NOWHERE = Position("", 0)
AHEAD = 30.0  # seconds that a reader waits who is ahead of what is known here
_HEARTBEAT = re.compile(r"[A-Za-z0-9_.-]{1,32}")


def choose_encoder(
    request: web.Request, dialect: Dialect, default: Framing, *, bare: bool = True
) -> Encoder:
    """The dialect in the framing that the request asks for; `heartbeat=NAME` names its heartbeats.
    bare: there is a text that can stand alone. Raises InvalidField.
    """
    wish = request.query.get("heartbeat", "")
    if wish in ("1", "true"):
        wish = "heartbeat"
    if wish and not _HEARTBEAT.fullmatch(wish):
        raise InvalidField("heartbeat", "must be a name of letters, digits, `_`, `.` and `-`")
    chosen = framing(request, default)
    if chosen is TEXT and not bare:
        raise InvalidField("format", "must be sse or ndjson")
    return encoder(dialect, chosen, wish)


async def admit(request: web.Request) -> Entry:
    """Lets a stream in: before anything is begun for it, or who is refused would have begun that.
    Raises TooMany, Unavailable.
    """
    return await request.app[LIMITS].admit(address_of(request), request[USER])


async def stream(
    request: web.Request,
    generation: Generation,
    encoder: Encoder,
    after: int = 0,
    opening: list[Event] | None = None,
) -> web.StreamResponse:
    """Streams a generation from after offset `after` to its end, after the events of `opening`.

    A client that goes away cancels this and nothing else: the generation runs on. A stream that did
    not finish is cut where its encoding has no word for that.
    """
    request[GENERATION] = generation
    with generation:
        if encoder.dialect.holds:
            await _hold(request, generation)
        cursor = Cursor(generation.log, after)
        headers = headers_of(generation)
        return await deliver(request, encoder, cursor, headers, generation, opening)


async def deliver(
    request: web.Request,
    encoder: Encoder,
    cursor: Place,
    headers: Mapping[str, str],
    generation: Generation | None = None,
    opening: list[Event] | None = None,
    delivery: Delivery | None = None,
) -> web.StreamResponse:
    """Streams what the cursor reads to its end, after the events of `opening`; see `stream`."""
    delivery = delivery or request.app[DELIVERY]
    sink = await open_stream(delivery, request, encoder, cursor, headers)
    sink.who = request[IDENTITY]
    try:
        if opening:
            sink.write(encoder.encode(opening))
            opening.clear()  # a large room's members, perhaps: not to be kept as long as the stream
        try:
            last = await sink.follow()
        except Draining:
            await sink.cut()
        except Expelled as expelled:
            await sink.cut(_parting(request, sink, expelled.error))
        else:
            ending = generation.ending if generation is not None else None
            if encoder.cuts and ending is not None and ending.type != "finished":
                await sink.cut(last)
            else:
                await sink.end(last)
    except (TooSlow, FellBehind):
        sink.delivery.metrics.too_slow += 1
        sink.transport.abort()
    except ConnectionError:
        pass  # the client went first
    except Exception:
        await sink.cut()  # our own fault: an error page within the body would not look like one
        raise
    return sink.response


def _parting(request: web.Request, sink: ResponseSink, error: RivuletError) -> bytes:
    """What a reader is told who may read no more, in its dialect: where it can come back to once it
    may again.
    """
    (cursor,) = sink.cursors.values()
    place = Position(cursor.log.epoch, cursor.offset) if isinstance(cursor, Cursor) else NOWHERE
    body, dialect = error.body(request[REQUEST_ID]), sink.encoder.dialect
    data = body if dialect in (FRAMES, CHANNEL) else {"error": body, "status": error.status}
    type = "error" if dialect is FRAMES else "failed"
    return sink.encoder.encode([Event(type, data, place, now_ms(), cursor.logs[0].origin)])


async def _hold(request: web.Request, generation: Generation) -> None:
    """Waits for the first delta, `commit_after` at most. Raises what failed before it."""
    try:
        async with asyncio.timeout(request.app[CONFIG].generation.commit_after):
            await generation.spoken()
    except TimeoutError:
        return
    ending = generation.ending
    if ending is not None and ending.type != "finished" and not generation.spoke:
        raise failure_of(request, generation)


async def whole(
    request: web.Request, generation: Generation, shape: Callable[[Generation], JSON]
) -> web.Response:
    """Waits for the end and answers in one piece. A failure has its own status, never 200; a
    cancelled generation gives 409 with the text so far.
    """
    request[GENERATION] = generation
    with generation:
        await generation.ended()
    headers = headers_of(generation)
    assert generation.ending is not None
    if generation.ending.type == "finished":
        return json_response(shape(generation), headers=headers)
    error = failure_of(request, generation)
    return error_response(request, error, headers, {"text": generation.text()})


def failure_of(request: web.Request, generation: Generation) -> RivuletError:
    """The error that a generation which did not finish means for this request."""
    ending = generation.ending
    assert ending is not None
    if ending.type == "cancelled":
        return Conflict("Stopped", code="cancelled")
    error, status = ending.data["error"], ending.data["status"]
    upstream = ending.data.get("upstream_status", 0)
    if path_of(request).startswith("/v1/") and 400 <= upstream < 500:
        status = upstream  # an OpenAI client knows what its server's 401 means
    return RivuletError(
        error["message"],
        code=error["code"],
        param=error.get("param"),
        status=status,
        retry_after=ending.data.get("retry_after"),
    )


def headers_of(generation: Generation) -> dict[str, str]:
    """Which stream this is, and which conversation."""
    headers = {"X-Stream-Id": generation.id}
    if generation.conversation_id:
        headers["X-Conversation-Id"] = generation.conversation_id
    return headers


async def resume(
    request: web.Request, dialect: Dialect, default: Framing, also: Dialect | None = None
) -> web.StreamResponse | None:
    """The answer to a request that carries a position; None to one that carries none. also: the
    dialect that a generation goes on in where it was asked for in it.

    Never starts a generation. Where nothing is left to say: 204, which ends an `EventSource`, or to
    a POST 200 and an empty body. Raises Gone for every position that is not of a generation held
    here and owned by the caller.
    """
    text = last_event_id(request)
    if text is None:
        return None
    position, generation = Position.parse(text), None
    if position is not None:
        generation = await request.app[GENERATIONS].find(position.epoch, request[IDENTITY])
    gone = Gone("this position cannot be resumed", param="Last-Event-ID")
    if generation is None or position is None:
        raise gone
    if request.match_info.get("id", generation.id) != generation.id:
        raise gone  # of another stream than the one at this address
    if also is not None and generation.dialect is also:
        dialect = also
    place = await place_of(generation, position)
    if place is None:
        raise gone
    if place.opening:
        request.app[METRICS].gaps += 1
    else:
        request.app[METRICS].recoveries += 1
    return await attach(request, generation, choose_encoder(request, dialect, default), place)


class Found(NamedTuple):
    """Where reading goes on: after this offset, and what is to be said first."""

    after: int
    opening: list[Event]


async def place_of(generation: Generation, position: Position) -> Found | None:
    """Where a reader goes on who has come to this position; None where that is not known.

    Whoever has read at its maker's may be ahead of what is known here, and waits. What its maker
    has said and told no other instance is lost with it: the reader is told of the gap, and the end.
    Raises Unavailable.
    """
    log, offset = generation.log, position.offset
    if generation.mirrored and position.epoch == log.epoch and offset > log.top:
        with generation, contextlib.suppress(TimeoutError):
            async with asyncio.timeout(AHEAD):
                await generation.reached(offset)
        if offset > log.top and not log.closed:
            raise Unavailable("not known here yet", code="bridge_unavailable", retry_after=1)
    ending, hole = generation.ending, generation.hole
    if generation.mirrored and ending is not None and position.epoch == log.epoch:
        last = ending.id.offset
        if offset > last or (hole is not None and hole < offset < last):
            resumed = Position(log.epoch, last - 1)
            told = {"requested": str(position), "resumed": str(resumed)}
            return Found(last - 1, [Event("gap", told, resumed, now_ms(), log.origin)])
    return Found(offset, []) if log.holds(position) else None


async def attach(
    request: web.Request, generation: Generation, encoder: Encoder, place: Found
) -> web.StreamResponse:
    """Streams from a position, or says that nothing is left after it."""
    after = place.after
    if generation.log.closed and not _left(generation, encoder, after):
        headers = {**headers_of(generation), "Cache-Control": "no-store"}
        if request.method == "GET":
            return web.Response(status=HTTPStatus.NO_CONTENT, headers=headers)
        # fetch-event-source takes a 200 of another type for a failure, and asks again for ever.
        headers["Content-Type"] = encoder.framing.media_type
        return web.Response(headers=headers)
    with await admit(request):
        return await stream(request, generation, encoder, after, place.opening)


def _left(generation: Generation, encoder: Encoder, after: int) -> bool:
    ending = generation.ending
    if encoder.framing.cuts and ending is not None and ending.type != "finished":
        return True  # a cut is left: 204 would look like the end of a whole answer
    return any(encoder.encode([event]) for event in generation.log.read(after))
