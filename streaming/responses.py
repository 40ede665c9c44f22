"""A log over HTTP: one streaming response, until its log ends or its client goes."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Mapping
from http import HTTPStatus

from aiohttp import HttpVersion11, web
from aiohttp_sse import EventSourceResponse

from streaming.delivery import Delivery, Sink
from streaming.encoders import TEXT, Encoder
from streaming.errors import RivuletError
from streaming.frames import ROOMS
from streaming.places import Draining, Expelled, Place

PARTING = 1.0  # seconds for the last words to a client that is sent away

STREAM_HEADERS = {
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}


class ResponseSink(Sink):
    """One streaming response with one cursor. Made by `open_stream`."""

    def __init__(
        self,
        delivery: Delivery,
        request: web.Request,
        response: web.StreamResponse,
        encoder: Encoder,
        cursor: Place,
    ) -> None:
        assert request.transport is not None
        # On HTTP/1.0 there are no chunks: the end of the body is the end of the connection.
        chunked = request.version >= HttpVersion11
        super().__init__(delivery, request.transport, request.protocol, encoder, chunked)
        self.response = response
        self.cursors[cursor.source] = cursor
        self._opening = encoder.opening  # goes out with the first bytes
        self._parked: asyncio.Future[None] | None = None
        self._over: Draining | Expelled | None = None  # why it ends before its source does
        # Of a room, in NDJSON, which has no word for when to come back.
        self.endless = encoder.dialect is ROOMS and not encoder.framing.comments

    def write(self, data: bytes) -> None:
        """See Sink.write; the first bytes have the encoding's opening before them."""
        data, self._opening = self._opening + data, b""
        super().write(data)

    async def follow(self) -> bytes:
        """Delivers everything from the cursor to the end of its source, live once it has caught up.

        Returns the last bytes, which are the caller's to end the body with. Raises TooSlow,
        FellBehind where the log was trimmed past it, Draining, Expelled, ConnectionError. When it
        returns or raises, or is cancelled, the sink is in no feed and nothing is written to it.
        """
        self.delivery.enter(self)
        missed = False  # comings and goings, which are told to who is live
        try:
            while True:
                missed |= self.protocol.writing_paused
                await self.drained()
                if self._over is not None:
                    raise self._over
                if self.transport.is_closing():
                    raise ConnectionResetError
                data = self.read()
                (cursor,) = self.cursors.values()
                if cursor.ended:
                    return data
                self.write(data)
                del data  # up to 256 KiB, while it is parked
                if cursor.behind:
                    missed = True
                    await asyncio.sleep(0)  # a long way to catch up: others get their turn
                elif not self.protocol.writing_paused:
                    if missed:
                        self.write(self.encoder.encode(cursor.rejoined()))
                        missed = False
                    await self._parked_live()
        finally:
            self.delivery.leave(self)

    async def _parked_live(self) -> None:
        """Stays live until it is put out."""
        self._parked = asyncio.get_running_loop().create_future()
        self.join()
        try:
            await self._parked
        finally:
            self._parked = None
            self.leave()

    def lag(self) -> None:
        """See Sink.lag: `follow` goes on."""
        if self._parked is not None and not self._parked.done():
            self._parked.set_result(None)

    def drain(self, spread: float) -> None:
        """Says when to come back (HTML standard, 9.2.6: `retry:`), and ends `follow`."""
        (cursor,) = self.cursors.values()
        if cursor.closed:
            return  # its end is on the way
        if self.encoder.framing.comments:
            self.write(b"retry: %d\n\n" % (random.uniform(0, spread) * 1000))
        self._over = Draining()
        self.lag()

    def expel(self, error: RivuletError) -> None:
        """See Sink.expel: a client that does not take the words is cut without."""
        self._over = Expelled(error)
        self.lag()
        asyncio.get_running_loop().call_later(PARTING, self.transport.abort)

    async def end(self, data: bytes) -> None:
        """Ends the body with these bytes, in one write. Raises as `drained`."""
        data, self._opening = self._opening + data, b""
        held = self.transport.get_write_buffer_size() + len(data)
        if held < self.delivery.config.high_water:
            await self.response.write_eof(data)  # does not wait
        else:
            await self.taken(self.response.write_eof(data))
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


async def open_stream(
    delivery: Delivery,
    request: web.Request,
    encoder: Encoder,
    cursor: Place,
    headers: Mapping[str, str],
) -> ResponseSink:
    """Sends status and headers of a streaming answer. Raises ConnectionError."""
    response: web.StreamResponse
    if encoder.framing.comments:
        # For its headers; what is sent goes past it.
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
    # Past aiohttp-sse's own `prepare`: that starts a ping task, which takes 1.2 KB of each stream
    # even when it is cancelled, and heartbeats here come from one timer for all.
    await web.StreamResponse.prepare(response, request)
    response.headers.clear()  # they are sent
    assert request.transport is not None
    if request.version < HttpVersion11:
        _reset_on_close(request.transport, True)
    return ResponseSink(delivery, request, response, encoder, cursor)


def _reset_on_close(transport: asyncio.Transport, on: bool) -> None:
    """HTTP/1.0 ends a body by closing. Until a body has ended, closing is therefore a reset,
    whoever closes (a stop, a timeout, the kernel after a crash): no cut answer looks whole.
    """
    raw = transport.get_extra_info("socket")
    if raw is not None:
        with contextlib.suppress(OSError):  # it is closed already
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", on, 0))
