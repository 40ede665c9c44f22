"""Delivery: cursor -> encoder -> socket.

A connection is a `Sink` with cursors. While it is live its cursors stand at the top of what they
read, in a `Feed` each: what is appended in one turn of the loop is encoded once for each kind of
reader and written straight to every transport. A transport whose buffer passes the high-water mark
puts its sink out of the feeds; the sink then waits for its socket, reads from its cursors at its
own pace, and rejoins. So one stalled reader adds nothing to the others and holds no more than one
read.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import socket
import sys
import termios
import time
from collections.abc import Coroutine, Hashable, Iterator
from typing import Any

from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import StreamWriter

from streaming.auth import Identity
from streaming.clock import Wheel
from streaming.config import Delivery as DeliveryConfig
from streaming.encoders import Encoder
from streaming.errors import RivuletError
from streaming.events import Event
from streaming.log import FellBehind, Log, now_ms
from streaming.metrics import Metrics
from streaming.places import Place, TooSlow

READ_LIMIT = 256 * 1024  # bytes of text in one read of a sink that catches up: its share of memory
DEAD = 120.0  # seconds until a machine that acknowledges nothing is given up by the kernel
REST_AFTER = 0.001  # seconds of writing after which a feed rests as long, ...
REST_MOST = 0.05  # ... at most
THROUGH = -1  # instead of a socket: the transport is to be written to
OUTQ = termios.TIOCOUTQ  # also called SIOCOUTQ


class Delivery:
    """What all sinks share: the feeds, the heartbeats, the end."""

    def __init__(self, config: DeliveryConfig, metrics: Metrics | None = None) -> None:
        self.config = config
        self.metrics = metrics or Metrics()
        self.silence = Wheel(config.heartbeat)  # of feeds, touched when they write
        self.pings = Wheel(config.heartbeat / 2)  # of sockets
        self._sinks: dict[Sink, float] = {}  # and when it began
        self.sockets = 0  # of them: WebSockets, whose connections aiohttp does not have
        self._ending: dict[Sink, asyncio.Task[None]] = {}  # those that a drain ends
        self._idle = asyncio.Event()  # no sink is there
        self._feeds: dict[Hashable, Feed] = {}

    def __iter__(self) -> Iterator[Sink]:
        """The connections that are open."""
        return iter(self._sinks)

    def enter(self, sink: Sink) -> None:
        """A connection begins."""
        self._sinks[sink] = time.monotonic()
        self._idle.clear()

    def leave(self, sink: Sink) -> float:
        """A connection is over; the seconds that it has lasted."""
        seconds = time.monotonic() - self._sinks.pop(sink)
        self.metrics.connection_seconds[sink.encoder.framing.name].observe(seconds)
        if (ending := self._ending.pop(sink, None)) is not None:
            ending.cancel()
        if not self._sinks:
            self._idle.set()
        return seconds

    def feed(self, cursor: Place) -> Feed:
        """The feed of what this cursor reads; a new one stands where the cursor does."""
        feed = self._feeds.get(cursor.source)
        if feed is None:
            feed = self._feeds[cursor.source] = Feed(self, cursor.copy())
            self.silence.touch(feed)
        return feed

    def forget(self, feed: Feed) -> None:
        """A feed that has no sink left goes."""
        del self._feeds[feed.cursor.source]
        self.silence.drop(feed)
        feed.listen([])

    def broadcast(self, source: Hashable, event: Event) -> None:
        """Writes an ephemeral event to whoever is live now."""
        feed = self._feeds.get(source)
        if feed is not None:
            feed.broadcast(event)

    async def drain(self, window: float) -> None:
        """Ends the connections that do not wait for an end, spread over `window` seconds."""
        for sink in self._sinks:
            if sink.endless:
                ending = _end(sink, random.uniform(0, window))
                self._ending[sink] = asyncio.create_task(ending)
        if self._ending:
            await asyncio.wait(list(self._ending.values()), timeout=window)

    async def close(self, retry: float, patience: float) -> None:
        """Cuts every connection that is not at its end, so that its client comes back after up to
        `retry` seconds, and waits until all are gone, for `patience` seconds at most.
        """
        for sink in list(self._sinks):
            sink.drain(retry)
        if self._sinks:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._idle.wait()
        self.silence.stop()
        self.pings.stop()


async def _end(sink: Sink, wait: float) -> None:
    await asyncio.sleep(wait)
    sink.drain(0)


class Feed:
    """The live sinks of one source, in groups that get the same bytes."""

    def __init__(self, delivery: Delivery, cursor: Place) -> None:
        self.cursor = cursor  # what has been written to every live sink
        self._delivery = delivery
        # With each sink the socket that may be written to past its transport; see `Sink.direct`.
        self._groups: dict[tuple[Encoder, bool], dict[Sink, int]] = {}
        self._scheduled = False
        self._rests = 0.0  # until then, as time.monotonic() has it
        self._loop = asyncio.get_running_loop()  # asking for it costs a system call each time
        self._logs: list[Log] = []
        self.listen(cursor.logs)

    def listen(self, logs: list[Log]) -> None:
        """Waits for the next event of these logs, and of no other."""
        for log in self._logs:
            if log not in logs:
                log.listeners.remove(self._appended)
        for log in logs:
            if log not in self._logs:
                log.listeners.append(self._appended)
        self._logs = logs

    def add(self, sink: Sink) -> None:
        """Makes a sink live, whose cursor must stand where this feed's does, or has another look at
        how one that is live is to be written to.
        """
        self._groups.setdefault((sink.encoder, sink.chunked), {})[sink] = sink.direct

    def remove(self, sink: Sink) -> bool:
        """Puts a sink out; whether it was in."""
        group = self._groups.get((sink.encoder, sink.chunked))
        if group is None or sink not in group:
            return False
        del group[sink]
        if not group:
            del self._groups[sink.encoder, sink.chunked]
            if not self._groups:
                self._delivery.forget(self)
        return True

    def _appended(self) -> None:
        # What comes in one turn of the loop goes out in one write.
        if not self._scheduled:
            self._scheduled = True
            if self._rests and (wait := self._rests - time.monotonic()) > 0:
                self._loop.call_later(wait, self.flush)
            else:
                self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Writes what is new to every live sink. At the end of the source lets them go: each reads
        the last events itself, to end its body with them; and where one turn brought more than the
        source keeps, each learns that it fell behind.
        """
        self._scheduled = False
        if not self._groups or not (self.cursor.behind or self.cursor.closed):
            return
        start = self.cursor.copy()
        try:
            events = [] if self.cursor.closed else self.cursor.read()
        except FellBehind:
            events = []
        if not events:
            self._put_out([sink for sinks in self._groups.values() for sink in sinks])
            return
        self.listen(self.cursor.logs)
        began = time.monotonic()
        lagging: list[Sink] = []
        for (encoder, chunked), sinks in self._groups.items():
            if not encoder.dialect.merge:
                events = start.copy().read(merge=False)
            _write_all(sinks, encoder.encode(events), chunked, lagging)
            self._delivery.metrics.encoded += len(events)
            self._delivery.metrics.deliveries += len(events) * len(sinks)
        ended = self._delivery.silence.touch(self)
        self._put_out(lagging)
        # Writing to a thousand takes milliseconds, and a write of four events hardly more than a
        # write of one. So a large and busy room leaves half of the time to others, and what it is
        # told meanwhile goes out together.
        took = ended - began
        self._rests = ended + min(took, REST_MOST) if took > REST_AFTER else 0.0

    def broadcast(self, event: Event) -> None:
        """Writes an ephemeral event to every live sink, after what is there already."""
        self.flush()
        lagging: list[Sink] = []
        for (encoder, chunked), sinks in self._groups.items():
            _write_all(sinks, encoder.encode([event]), chunked, lagging)
            self._delivery.metrics.encoded += 1
            self._delivery.metrics.deliveries += len(sinks)
        self._put_out(lagging)

    def beat(self) -> None:
        """Writes a heartbeat to every live sink."""
        lagging: list[Sink] = []
        for (encoder, chunked), sinks in self._groups.items():
            _write_all(sinks, encoder.heartbeat(now_ms()), chunked, lagging)
        self._put_out(lagging)

    def _put_out(self, sinks: list[Sink]) -> None:
        for sink in sinks:
            sink.leave()
            sink.lag()


def _write_all(sinks: dict[Sink, int], data: bytes, chunked: bool, lagging: list[Sink]) -> None:
    """Writes the same bytes to each. To a socket past its transport where that may be: in a room
    of a thousand nothing of theirs is in the processor's caches, and to look at each sink and each
    transport is a fifth of the work (bench/README.md, the steady table).
    """
    if not data:
        return
    if chunked:
        data = chunk(data)
    size = len(data)
    for sink, fd in sinks.items():
        rest = data
        if fd != THROUGH:
            try:
                sent = os.write(fd, data)
            except OSError:
                sent = 0  # its transport will find the same, and knows what to do
            if sent == size:
                continue
            rest = data[sent:]
        transport = sink.transport
        if not transport.is_closing():
            transport.write(rest)
            if sink.protocol.writing_paused:
                lagging.append(sink)
            else:
                sink.held()
        else:  # its coroutine is cancelled, or finds out by this where aiohttp is not told to
            lagging.append(sink)


def chunk(data: bytes) -> bytes:
    """One chunk of HTTP/1.1's chunked coding (RFC 9112, section 7.1); data must not be empty."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Sink:
    """A connection that follows what its cursors read, in one encoding.

    It is live (in the feeds) or catching up. chunked: its bytes go out in HTTP/1.1's chunks. who:
    reads it, as long as that identity holds. endless: it waits for no end of what it reads.
    """

    who: Identity | None = None
    endless = False

    def __init__(
        self,
        delivery: Delivery,
        transport: asyncio.Transport,
        protocol: BaseProtocol,
        encoder: Encoder,
        chunked: bool,
    ) -> None:
        self.cursors: dict[Hashable, Place] = {}
        self.delivery = delivery
        self.transport = transport
        self.protocol = protocol
        self.encoder = encoder
        self.chunked = chunked
        self.live = False
        transport.set_write_buffer_limits(high=delivery.config.high_water)
        raw = transport.get_extra_info("socket")
        if raw is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            seconds = max(DEAD, delivery.config.write_timeout)
            with contextlib.suppress(OSError):  # a socket of another kind
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * seconds))

    @property
    def direct(self) -> int:
        """The socket that a feed may write to past the transport now: nothing waits in the
        transport, and the sink leaves its feeds before the socket is closed (its number may be
        another's then). Else THROUGH.
        """
        return THROUGH

    def held(self) -> None:
        """Its transport has been written to by a feed, and may hold something, or no more."""

    def write(self, data: bytes) -> None:
        """Hands bytes to the transport. Empty bytes, and a closing transport, are passed over."""
        if data and not self.transport.is_closing():
            self.transport.write(chunk(data) if self.chunked else data)

    def read(self) -> bytes:
        """One bounded read of every cursor, encoded. Raises FellBehind."""
        return b"".join([self.told(cursor) for cursor in self.cursors.values()])

    def told(self, cursor: Place) -> bytes:
        """One bounded read of this cursor, encoded. Raises FellBehind."""
        events = cursor.read(merge=self.encoder.dialect.merge, limit=READ_LIMIT)
        self.delivery.metrics.encoded += len(events)
        self.delivery.metrics.deliveries += len(events)
        return self.encoder.encode(events)

    @property
    def behind(self) -> bool:
        """Whether something is there that it has not read."""
        return any(cursor.behind for cursor in self.cursors.values())

    def join(self) -> None:
        """Makes it live. All its cursors must be at the top."""
        for cursor in self.cursors.values():
            self.enter(cursor)
        self.live = True

    def enter(self, cursor: Place) -> None:
        """Stands in the feed of this cursor, which must be at the top."""
        feed = self.delivery.feed(cursor)
        if feed.cursor.behind:
            # The feed's own flush is about to come: with it they stand at the same place. It may
            # put out the last sink of the feed, and the feed with it.
            feed.flush()
            feed = self.delivery.feed(cursor)
        feed.add(self)

    def leave(self) -> None:
        """Ends the live state: its cursors stand behind what was written to it."""
        if self.live:
            self.live = False
            for source, cursor in list(self.cursors.items()):
                feed = self.delivery.feed(cursor)
                if feed.remove(self):
                    self.cursors[source] = feed.cursor.copy()

    def lag(self) -> None:
        """It has been put out of its feeds: it has to catch up, or the source has ended."""
        raise NotImplementedError

    def drain(self, spread: float) -> None:
        """The server is going away: ends, so that its client comes back within `spread` seconds."""
        raise NotImplementedError

    def expel(self, error: RivuletError) -> None:
        """Its client's identity holds no more, or somebody wants it gone: tells it so, and ends."""
        raise NotImplementedError

    async def drained(self) -> None:
        """Waits until the socket has taken enough of what was written.

        Raises TooSlow after `write_timeout` seconds in which it took nothing, ConnectionError where
        it is gone.
        """
        while self.protocol.writing_paused:
            await self.taken(StreamWriter(self.protocol, asyncio.get_running_loop()).drain())

    async def taken(self, writing: Coroutine[Any, Any, None]) -> None:
        """Waits for a write of aiohttp's to end, as long as the client takes anything.

        In a task: `asyncio.timeout` would cancel a future that aiohttp's next write waits for too.
        """
        task = asyncio.ensure_future(writing)
        try:
            untaken = self._untaken()
            while not (await asyncio.wait([task], timeout=self.delivery.config.write_timeout))[0]:
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
