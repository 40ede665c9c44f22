"""Delivery: cursor -> encoder -> socket.

A connection is a `Sink`. While it is live its cursor stands at the top of its log, in the log's
`Feed`: what is appended in one turn of the loop is encoded once for each kind of reader and
written straight to every transport. A transport whose buffer passes the high-water mark puts its
sink out of the feed; the sink's own coroutine then waits for the socket, reads from the log at its
own pace, and rejoins. So one stalled reader adds nothing to the others and holds no more than one
read.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import random
import socket
import struct
import sys
import termios
from collections import OrderedDict
from collections.abc import Coroutine, Mapping
from http import HTTPStatus
from typing import Any

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp_sse import EventSourceResponse

from streaming.config import Delivery as DeliveryConfig
from streaming.encoders import TEXT, Encoder
from streaming.log import Cursor, Log, now_ms

READ_LIMIT = 256 * 1024  # bytes of text in one read of a sink that catches up: its share of memory
STREAM_HEADERS = {
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
    "X-Content-Type-Options": "nosniff",
}
OUTQ = termios.TIOCOUTQ  # also called SIOCOUTQ


class TooSlow(Exception):
    """A reader has taken nothing for `write_timeout` seconds. It is cut, and can resume."""


class Draining(Exception):
    """The server is going away, and this stream with it."""


class Delivery:
    """What all sinks share: the feeds, the heartbeats, the end.

    heartbeat: seconds of silence after which a stream gets one.
    """

    def __init__(self, config: DeliveryConfig) -> None:
        self.config = config
        self._sinks: set[Sink] = set()
        self._idle = asyncio.Event()  # no sink is there
        self._feeds: dict[Log, Feed] = {}
        self._silent: OrderedDict[Feed, float] = OrderedDict()  # by the time of the last write
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, sink: Sink) -> None:
        """A sink begins to follow."""
        self._sinks.add(sink)
        self._idle.clear()

    def leave(self, sink: Sink) -> None:
        """A sink follows no more."""
        self._sinks.discard(sink)
        if not self._sinks:
            self._idle.set()

    def feed(self, log: Log) -> Feed:
        """The feed of this log, made where there is none."""
        feed = self._feeds.get(log)
        if feed is None:
            feed = self._feeds[log] = Feed(self, log)
            self.written(feed)
        return feed

    def forget(self, feed: Feed) -> None:
        """A feed that has no sink left goes."""
        del self._feeds[feed.log], self._silent[feed]
        feed.log.listener = None

    def written(self, feed: Feed) -> None:
        """Something has just gone out to this feed's sinks."""
        loop = asyncio.get_running_loop()
        self._silent[feed] = loop.time()
        self._silent.move_to_end(feed)
        if self._timer is None:
            self._timer = loop.call_later(self.config.heartbeat, self._beat)

    def _beat(self) -> None:
        # One timer for all: the feeds stand in the order of their last write.
        loop = asyncio.get_running_loop()
        self._timer = None
        due = loop.time() - self.config.heartbeat
        while self._silent:
            feed, last = next(iter(self._silent.items()))
            if last > due:
                self._timer = loop.call_at(last + self.config.heartbeat, self._beat)
                break
            self.written(feed)
            feed.beat()

    async def close(self, retry: float, patience: float) -> None:
        """Cuts every stream that is not at its end, so that its client comes back after up to
        `retry` seconds, and waits until all are gone, for `patience` seconds at most.
        """
        if not self._sinks:
            self._idle.set()
        for sink in list(self._sinks):
            if not sink.cursor.log.closed:  # else its end is on the way
                sink.say_retry(random.uniform(0, retry))
                sink.wake(Draining())
        try:
            async with asyncio.timeout(patience):
                await self._idle.wait()
        except TimeoutError:
            pass
        if self._timer is not None:
            self._timer.cancel()


class Feed:
    """The live sinks of one log, in groups that get the same bytes."""

    def __init__(self, delivery: Delivery, log: Log) -> None:
        self.log = log
        self.offset = log.top  # what has been written to every live sink
        self._delivery = delivery
        self._groups: dict[tuple[Encoder, bool], set[Sink]] = {}
        self._scheduled = False
        log.listener = self._appended

    def add(self, sink: Sink) -> None:
        """Makes a sink live; its cursor must stand where this feed does."""
        assert sink.cursor.offset == self.offset
        self._groups.setdefault((sink.encoder, sink.chunked), set()).add(sink)

    def remove(self, sink: Sink) -> None:
        """Puts a sink out, its cursor behind what it was written. Does nothing for one not in."""
        group = self._groups.get((sink.encoder, sink.chunked))
        if group is None or sink not in group:
            return
        group.remove(sink)
        sink.cursor.offset = self.offset
        if not group:
            del self._groups[sink.encoder, sink.chunked]
            if not self._groups:
                self._delivery.forget(self)

    def _appended(self) -> None:
        # What comes in one turn of the loop goes out in one write.
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Writes what is new to every live sink. At the log's end lets them go: each ends its own
        body, with the last events in the same write.
        """
        self._scheduled = False
        log = self.log
        if not self._groups:
            return
        lagging: list[Sink] = []
        if log.closed:
            lagging = [sink for sinks in self._groups.values() for sink in sinks]
        elif self.offset < log.top:
            start, self.offset = self.offset, log.top
            for (encoder, chunked), sinks in self._groups.items():
                data = encoder.encode(log.read(start, merge=encoder.dialect.merge))
                if data:
                    _write_all(sinks, chunk(data) if chunked else data, lagging)
            self._delivery.written(self)
        for sink in lagging:
            self.remove(sink)
            sink.wake()

    def beat(self) -> None:
        """Writes a heartbeat to every live sink."""
        lagging: list[Sink] = []
        for (encoder, chunked), sinks in self._groups.items():
            if data := encoder.heartbeat(now_ms()):
                _write_all(sinks, chunk(data) if chunked else data, lagging)
        for sink in lagging:
            self.remove(sink)
            sink.wake()


def _write_all(sinks: set[Sink], data: bytes, lagging: list[Sink]) -> None:
    for sink in sinks:
        transport = sink.transport
        if not transport.is_closing():  # closing: its coroutine is about to be cancelled
            transport.write(data)
            if sink.protocol.writing_paused:
                lagging.append(sink)


def chunk(data: bytes) -> bytes:
    """One chunk of HTTP/1.1's chunked coding (RFC 9112, section 7.1); data must not be empty."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Sink:
    """One streaming response: transport, encoder, cursor. Made by `open_stream`."""

    def __init__(
        self,
        delivery: Delivery,
        request: web.Request,
        response: web.StreamResponse,
        writer: AbstractStreamWriter,
        encoder: Encoder,
        cursor: Cursor,
    ) -> None:
        assert request.transport is not None
        self.response = response
        self.encoder = encoder
        self.cursor = cursor
        self.transport = request.transport
        self.protocol = request.protocol
        # On HTTP/1.0 the end of the body is the end of the connection.
        self.chunked = request.version >= HttpVersion11
        self._delivery = delivery
        self._writer = writer
        self._opening = encoder.opening  # goes out with the first bytes
        self._parked: asyncio.Future[None] | None = None
        self._woken: Exception | None = None

    def write(self, data: bytes) -> None:
        """Hands bytes to the transport. Empty bytes, and a closing transport, are passed over."""
        data, self._opening = self._opening + data, b""
        if data and not self.transport.is_closing():
            self.transport.write(chunk(data) if self.chunked else data)

    async def follow(self) -> bytes:
        """Delivers everything from the cursor to the end of the log, live once it has caught up.

        Returns the last bytes, which are the caller's to end the body with. Raises TooSlow,
        FellBehind where the log was trimmed past it, Draining. When it returns or raises, or is
        cancelled, the sink is in no feed and nothing is written to it any more.
        """
        self._delivery.enter(self)
        try:
            while True:
                if self._woken is not None:
                    raise self._woken
                merge = self.encoder.dialect.merge
                events = self.cursor.read(merge=merge, limit=READ_LIMIT)
                data = self.encoder.encode(events)
                if self.cursor.ended:
                    return data
                self.write(data)
                live = not events
                del events, data  # up to 256 KiB each, while it waits
                if not live:
                    await self.drained()
                    if self.cursor.offset < self.cursor.log.top:
                        await asyncio.sleep(0)  # a long way to catch up: others get their turn
                else:
                    await self._live()
        finally:
            self._delivery.leave(self)

    async def _live(self) -> None:
        feed = self._delivery.feed(self.cursor.log)
        if feed.offset != self.cursor.offset:
            # The feed's own flush is about to come: with it they stand at the same place. It may
            # put out the last sink of the feed, and the feed with it.
            feed.flush()
            feed = self._delivery.feed(self.cursor.log)
        self._parked = asyncio.get_running_loop().create_future()
        feed.add(self)
        try:
            await self._parked
        finally:
            self._parked = None
            feed.remove(self)
        await self.drained()

    async def end(self, data: bytes) -> None:
        """Ends the body with these bytes, in one write. Raises as `drained`."""
        data, self._opening = self._opening + data, b""
        held = self.transport.get_write_buffer_size() + len(data)
        if held < self._delivery.config.high_water:
            await self.response.write_eof(data)  # does not wait
        else:
            await self._taken(self.response.write_eof(data))
        if self.transport.get_write_buffer_size():  # the rest too: nobody waits for it later
            self.transport.set_write_buffer_limits(high=0)
            await self.drained()
        if not self.chunked:
            _reset_on_close(self.transport, False)

    async def cut(self, data: bytes = b"") -> None:
        """Ends the connection after these bytes so that the body does not look whole: no last
        chunk, and where HTTP/1.0 has no chunks, a reset. What was written goes out first.
        """
        self.write(data)
        self.transport.set_write_buffer_limits(high=0)
        await self.drained()
        self.transport.abort()

    def wake(self, error: Exception | None = None) -> None:
        """Ends the live state; with an error, ends `follow` with it."""
        if error is not None:
            self._woken = error
        if self._parked is not None and not self._parked.done():
            self._parked.set_result(None)

    async def drained(self) -> None:
        """Waits until the socket has taken enough of what was written.

        Raises TooSlow after `write_timeout` seconds in which it took nothing, ConnectionError where
        it is gone.
        """
        while self.protocol.writing_paused:
            await self._taken(self._writer.drain())

    async def _taken(self, writing: Coroutine[Any, Any, None]) -> None:
        """Waits for a write of aiohttp's to end, as long as the client takes anything.

        In a task: `asyncio.timeout` would cancel a future that aiohttp's next write waits for too.
        """
        task = asyncio.ensure_future(writing)
        try:
            untaken = self._untaken()
            while not (await asyncio.wait([task], timeout=self._delivery.config.write_timeout))[0]:
                before, untaken = untaken, self._untaken()
                if untaken >= before:
                    raise TooSlow
            await task
        finally:
            task.cancel()

    def _untaken(self) -> int:
        """Bytes that the client has not taken yet. The kernel asks for more only once a good part
        of its own buffer is empty, which takes a client that reads 2 KB/s longer than a minute: it
        is slow, and not to be cut, so what the kernel holds counts too (tcp(7), SIOCOUTQ).
        """
        untaken = self.transport.get_write_buffer_size()
        raw = self.transport.get_extra_info("socket")
        if raw is not None:
            with contextlib.suppress(OSError, ValueError):
                untaken += int.from_bytes(fcntl.ioctl(raw.fileno(), OUTQ, bytes(4)), sys.byteorder)
        return untaken

    def say_retry(self, seconds: float) -> None:
        """Tells an EventSource when to come back (HTML standard, 9.2.6: `retry:`)."""
        if self.encoder.framing.comments:
            self.write(b"retry: %d\n\n" % (seconds * 1000))


async def open_stream(
    delivery: Delivery,
    request: web.Request,
    encoder: Encoder,
    cursor: Cursor,
    headers: Mapping[str, str],
) -> Sink:
    """Sends status and headers of a streaming answer. Raises ConnectionError."""
    response: web.StreamResponse
    if encoder.framing.comments:
        # For its headers and its TCP_USER_TIMEOUT; what is sent goes past it.
        response = EventSourceResponse(allow_all_methods=True, headers=headers)
    else:
        response = web.StreamResponse(status=HTTPStatus.OK, headers=headers)
        response.content_type = encoder.framing.media_type
        if encoder.framing is TEXT:
            response.charset = "utf-8"
    response.headers.update(STREAM_HEADERS)
    if request.version < HttpVersion11 or not request.keep_alive:
        response.force_close()
        response.headers["Connection"] = "close"  # aiohttp-sse says keep-alive to everybody
    writer = await response.prepare(request)
    if isinstance(response, EventSourceResponse):
        response.stop_streaming()  # its ping task: heartbeats here come from one timer for all
    assert writer is not None and request.transport is not None
    request.transport.set_write_buffer_limits(high=delivery.config.high_water)
    if request.version < HttpVersion11:
        _reset_on_close(request.transport, True)
    return Sink(delivery, request, response, writer, encoder, cursor)


def _reset_on_close(transport: asyncio.Transport, on: bool) -> None:
    """HTTP/1.0 ends a body by closing. Until a body has ended, closing is therefore a reset,
    whoever closes (a stop, a timeout, the kernel after a crash): no cut answer looks whole.
    """
    raw = transport.get_extra_info("socket")
    if raw is not None:
        with contextlib.suppress(OSError):  # it is closed already
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", on, 0))
