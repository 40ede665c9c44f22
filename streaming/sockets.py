"""Rooms over WebSocket: any number of cursors on one socket.

While it is live a socket has one coroutine, which waits for frames of its client. Only where its
client reads too slowly has it another for a time, which catches up.
"""

from __future__ import annotations

import asyncio
import random
import zlib
from collections.abc import Hashable

import orjson
from aiohttp import WSCloseCode, web
from aiohttp.abc import AbstractStreamWriter

from streaming.delivery import Delivery, Place, Sink, TooSlow
from streaming.encoders import DEFLATED, WEBSOCKET, encoder, text_frame
from streaming.events import JSON
from streaming.frames import ROOMS
from streaming.log import FellBehind

TOO_SLOW = 4408
CLOSE_WAIT = 5.0  # seconds for a client that is cut to hear of it and to say goodbye
PING = b"\x89\x00"


class SocketSink(Sink):
    """One WebSocket and its cursors, one a room.

    Frames are written past the response, which only says whether compression was agreed on: one
    prebuilt frame serves every connection. What goes to one alone is not compressed.
    """

    def __init__(
        self,
        delivery: Delivery,
        request: web.Request,
        response: web.WebSocketResponse,
        writer: AbstractStreamWriter,
    ) -> None:
        assert request.transport is not None
        # A client that wants a smaller window than ours may be sent plain frames as well.
        deflated = response.compress == zlib.MAX_WBITS
        encoding = encoder(ROOMS, DEFLATED if deflated else WEBSOCKET)
        super().__init__(delivery, request.transport, request.protocol, writer, encoding, False)
        self._response = response
        self._catching_up: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._silent = 0  # half heartbeats in which nothing came of it
        self._left = 0  # bytes that it had not taken at the last of them
        delivery.enter(self)
        delivery.pings.touch(self)

    def send(self, frame: JSON) -> None:
        """Sends one frame to this client alone."""
        self.write(text_frame(orjson.dumps(frame)))

    def follow(self, cursor: Place) -> None:
        """Reads what this cursor reads, too, from now on."""
        self.leave()
        self.cursors[cursor.source] = cursor
        self._advance()

    def unfollow(self, source: Hashable) -> None:
        """Stops reading this source."""
        self.leave()
        self.cursors.pop(source, None)
        self._advance()

    def _advance(self) -> None:
        """Goes live where it can at once; else catches up in a task."""
        if self._catching_up is not None:
            return
        for source, cursor in list(self.cursors.items()):
            if cursor.ended:
                del self.cursors[source]
        if not self.behind and not self.protocol.writing_paused:
            self.join()
        else:
            self._catching_up = asyncio.create_task(self._catch_up())

    async def _catch_up(self) -> None:
        lagged = self.protocol.writing_paused
        try:
            while True:
                await self.drained()
                if not self.behind:
                    break
                self.write(self.read())
            if lagged:
                for cursor in self.cursors.values():
                    self.write(self.encoder.encode(cursor.rejoined()))
        except (TooSlow, FellBehind):
            await self.close(TOO_SLOW, "too slow: come back and resume")
            return
        except ConnectionError:
            return  # its own coroutine is told
        finally:
            self._catching_up = None
        self._advance()

    def lag(self) -> None:
        """See Sink.lag."""
        self._advance()

    def heard(self) -> None:
        """Its client has said something, a pong perhaps: it is alive."""
        self._silent = 0
        self.delivery.pings.touch(self)

    def beat(self) -> None:
        """Pings a client that has been silent for a heartbeat; cuts one that is not heard of half a
        heartbeat later, but for one that is slow: the ping waits behind what it is taking.
        """
        self._silent += 1
        if self._silent < 2:
            return
        before, self._left = self._left, self._untaken()
        if self._silent == 2:
            self.write(PING)
        elif self._catching_up is None and not 0 < self._left < before:
            self.transport.abort()

    def leaving(self, window: float) -> asyncio.Task[None]:
        """See Sink.leaving: what runs in its rooms is there for it when it is back."""
        self._leaving = asyncio.create_task(self._leave(random.uniform(0, window)))
        return self._leaving

    def drain(self, spread: float) -> None:
        """See Sink.drain: at once, where it is still there."""
        if self._leaving is None:
            self.leaving(0)

    async def _leave(self, wait: float) -> None:
        await asyncio.sleep(wait)
        await self.close(WSCloseCode.SERVICE_RESTART, "restarting: come back")

    async def close(self, code: int, reason: str) -> None:
        """Closes with a code, best effort: a client that does not answer is cut."""
        self.leave()
        self.transport.set_write_buffer_limits(high=0)  # what is written before goes out before
        try:
            async with asyncio.timeout(CLOSE_WAIT):
                await self._response.close(code=code, message=reason.encode())
        except (TimeoutError, ConnectionError):
            pass
        self.transport.abort()

    def gone(self) -> None:
        """The connection is over: nothing is written to it any more."""
        self.leave()
        self.cursors.clear()
        self.delivery.pings.drop(self)
        self.delivery.leave(self)
        if self.transport.get_write_buffer_size():  # nobody else waits for that
            asyncio.get_running_loop().call_later(CLOSE_WAIT, self.transport.abort)
        for task in (self._catching_up, self._leaving):
            if task is not None:
                task.cancel()
