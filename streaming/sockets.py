"""Rooms over WebSocket: any number of cursors on one socket.

After the handshake a connection is taken from aiohttp, whose two tasks, parser and request with all
its headers are two thirds of what an idle one takes. An idle socket has no coroutine: what its
client says wakes one, which hears it to the end; where the client reads too slowly another catches
up.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import zlib
from collections.abc import Hashable
from typing import Protocol

import orjson
from aiohttp import WebSocketError, WSCloseCode, WSMessage, WSMsgType, web

# Private, because aiohttp's reader of frames reads into nothing else; without it every test of a
# socket fails.
from aiohttp._websocket.reader import WebSocketDataQueue
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import WS_KEY, WebSocketReader, WSMessageTextBytes, ws_ext_gen, ws_ext_parse

from streaming.delivery import THROUGH, Delivery, Sink
from streaming.encoders import DEFLATED, WEBSOCKET, Encoder, encoder, text_frame
from streaming.errors import BadRequest, RivuletError
from streaming.events import JSON
from streaming.frames import ROOMS
from streaming.log import FellBehind
from streaming.places import Place, TooSlow

TOO_SLOW = 4408
CLOSE_WAIT = 5.0  # seconds for a client that is cut to hear of it and to say goodbye
LINGER = 1.0  # the same for one that has broken the protocol
UNHEARD = 65536  # bytes of frames after which no more is read before some are heard
BINARY, CLOSE, PING, PONG = b"\x82", b"\x88", b"\x89", b"\x8a"  # first bytes of frames


Said = WSMessage | WSMessageTextBytes


class Listener(Protocol):
    """Who hears what the client of a socket says."""

    async def take(self, said: str | bytes) -> None: ...
    def ended(self, source: Hashable) -> None: ...
    def gone(self, code: int, seconds: float) -> None: ...


class SocketSink(Sink):
    """One WebSocket and its cursors, one a room. Made by `open_socket`.

    One prebuilt frame serves every connection. What goes to one alone is not compressed.
    """

    endless = True  # what runs in its rooms is there for it when it is back

    def __init__(
        self,
        delivery: Delivery,
        transport: asyncio.Transport,
        protocol: SocketProtocol,
        encoder: Encoder,
    ) -> None:
        super().__init__(delivery, transport, protocol, encoder, chunked=False)
        self.listener: Listener | None = None
        self._code = 0  # that either side has closed it with, whichever was first
        self._inbox = protocol.inbox
        self._listening: asyncio.Task[None] | None = None
        self._catching_up: asyncio.Task[None] | None = None
        self._closing: asyncio.TimerHandle | None = None
        self._silent = 0  # half heartbeats in which nothing came of it
        self._left = 0  # bytes that it had not taken at the last of them
        delivery.enter(self)
        delivery.sockets += 1
        delivery.pings.touch(self)

    def send(self, frame: JSON) -> None:
        """Sends one frame to this client alone."""
        self.write(text_frame(orjson.dumps(frame)))

    def write(self, data: bytes) -> None:
        """See Sink.write; nothing comes after the close frame."""
        if self._closing is None:
            super().write(data)
            if self.transport.get_write_buffer_size():
                self.held()

    @property
    def direct(self) -> int:
        """See Sink.direct: `gone` is told before asyncio closes the socket. TLS, and loops that
        put off their writes, are not to be passed by.
        """
        raw = self.transport.get_extra_info("socket")
        plain = self.transport.get_extra_info("sslcontext") is None
        if not plain or not isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop):
            return THROUGH
        return THROUGH if self.transport.get_write_buffer_size() else int(raw.fileno())

    def held(self) -> None:
        """See Sink.held: so it is in each of its feeds."""
        if self.live:
            for cursor in self.cursors.values():
                self.delivery.feed(cursor).add(self)

    def follow(self, cursor: Place) -> None:
        """Reads what this cursor reads, too, from now on; the others, a thousand perhaps, stay live
        where its socket takes at once what this one is behind.
        """
        self.unfollow(cursor.source)
        while cursor.behind and not self.protocol.writing_paused:
            self.write(self.told(cursor))
        if cursor.behind or cursor.ended:
            self.leave()  # while all that it has are in their feeds
        self.cursors[cursor.source] = cursor
        if self.live:
            self.enter(cursor)
        else:
            self._advance()

    def unfollow(self, source: Hashable) -> None:
        """Stops reading this source."""
        cursor = self.cursors.pop(source, None)
        if cursor is not None and self.live:
            self.delivery.feed(cursor).remove(self)

    def _advance(self, missed: bool = False) -> None:
        """Reads on as far as its socket takes it, and goes live; where it takes no more, waits for
        it in a task. missed: comings and goings were told meanwhile.
        """
        if self._catching_up is not None or self._closing is not None:
            return
        try:
            while self.behind and not self.protocol.writing_paused:
                self.write(self.read())
        except FellBehind:
            self.close(TOO_SLOW, "too slow: come back and resume")
            return
        if self.protocol.writing_paused:
            self._catching_up = asyncio.create_task(self._catch_up())
            return
        for source, cursor in list(self.cursors.items()):
            if cursor.ended:
                del self.cursors[source]
                if self.listener is not None:
                    self.listener.ended(source)
            elif missed:
                self.write(self.encoder.encode(cursor.rejoined()))
        self.join()  # whether or not its socket takes the last of that at once

    async def _catch_up(self) -> None:
        try:
            await self.drained()
        except TooSlow:
            self.close(TOO_SLOW, "too slow: come back and resume")
        except ConnectionError:
            pass  # connection_lost is told
        else:
            self._catching_up = None
            self._advance(missed=True)

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
            self.write(PING + b"\x00")
        elif self._catching_up is None and not 0 < self._left < before:
            self.transport.abort()

    def expel(self, error: RivuletError) -> None:
        """See Sink.expel."""
        self.send({"type": "error", **error.body()})
        self.close(4000 + error.status, error.code)

    def drain(self, spread: float) -> None:
        """See Sink.drain: the code has no word for when."""
        self.close(WSCloseCode.SERVICE_RESTART, "restarting: come back")

    def wake(self) -> None:
        """Its client has said something that is to be heard."""
        if self._listening is None:
            self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        """Hears all that has been said, and no next frame while its answers cannot be written."""
        try:
            while self._inbox.unheard:
                await self._hear(await self._inbox.hear())
                await self.drained()
        except WebSocketError as error:
            self.close(error.code, wait=LINGER)
            # What it sends is read on, and passed over: a socket that is closed with bytes unread
            # is reset, and the close frame can be lost in that.
            if self.transport.can_write_eof():
                self.transport.write_eof()
        except TooSlow:
            self.close(TOO_SLOW, "too slow: come back and resume")
        except ConnectionError:
            pass  # connection_lost is told
        finally:
            self._listening = None

    async def _hear(self, said: Said) -> None:
        if said.type is WSMsgType.CLOSE:
            self._code = self._code or said.data or WSCloseCode.OK
            # 1006 must not be sent (RFC 6455, section 7.4.1), and aiohttp takes it.
            wrong = said.data == WSCloseCode.ABNORMAL_CLOSURE
            self.close(WSCloseCode.PROTOCOL_ERROR if wrong else WSCloseCode.OK)
            self.transport.close()
        elif self._closing is not None or self.listener is None:
            pass
        elif said.type is WSMsgType.PING:
            self.write(text_frame(said.data, PONG))
        elif said.type is not WSMsgType.PONG:
            await self.listener.take(said.data)

    def close(self, code: int, reason: str = "", wait: float = CLOSE_WAIT) -> None:
        """Says goodbye with a code; a client that has not answered in `wait` seconds is cut."""
        if self._closing is None:
            self._code = self._code or code
            if code == TOO_SLOW:
                self.delivery.metrics.too_slow += 1
            self.leave()
            self.write(text_frame(code.to_bytes(2) + reason.encode(), CLOSE))
            self._closing = asyncio.get_running_loop().call_later(wait, self.transport.abort)

    def gone(self) -> None:
        """The connection is over."""
        self.leave()
        self.cursors.clear()
        self.delivery.pings.drop(self)
        seconds = self.delivery.leave(self)
        self.delivery.sockets -= 1
        for each in (self._listening, self._catching_up, self._closing):
            if each is not None:
                each.cancel()
        if self.listener is not None:
            self.listener.gone(self._code or WSCloseCode.ABNORMAL_CLOSURE, seconds)
            self.listener = None  # not to be a cycle, for the collector to find


class Inbox(WebSocketDataQueue):
    """What a client has said and nobody has heard; where that is much, no more is read."""

    __slots__ = ("sink", "unheard")

    def __init__(self, protocol: BaseProtocol, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(protocol, UNHEARD, loop=loop)
        self.sink: SocketSink | None = None
        self.unheard = 0

    def feed_data(self, data: Said, size: int) -> None:
        """A frame, or all fragments of one."""
        super().feed_data(data, size)
        self._wake()

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        """What came next is against the protocol."""
        super().set_exception(exc, *cause)
        self._wake()

    def feed_eof(self) -> None:
        """aiohttp says so when it lets the connection go: it goes on."""

    async def hear(self) -> Said:
        """The next of `unheard`, at once. Raises WebSocketError."""
        self.unheard -= 1
        return await self.read()

    def _wake(self) -> None:
        self.unheard += 1
        if self.sink is not None:
            self.sink.wake()


class SocketProtocol(BaseProtocol):
    """A WebSocket's connection, after the handshake."""

    __slots__ = ("inbox", "reader")

    def __init__(self, loop: asyncio.AbstractEventLoop, most: int, compress: bool) -> None:
        super().__init__(loop)
        # Private: no parser of HTTP is to be paused with the socket. Without it pausing fails
        # (tests/test_bad_frames.py, a frame of the largest size).
        self._upgraded = True
        self.inbox = Inbox(self, loop)
        self.reader: WebSocketReader | None = WebSocketReader(self.inbox, most, compress, True)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self.reader is not None and self.inbox.sink is not None:
            self.inbox.sink.heard()
            self.reader.feed_data(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        """See asyncio.Protocol."""
        super().connection_lost(exc)
        sink, self.inbox.sink, self.reader = self.inbox.sink, None, None  # or they were cycles
        if sink is not None:
            sink.gone()


async def open_socket(
    delivery: Delivery, request: web.Request, most: int, compression: bool
) -> tuple[SocketSink, web.StreamResponse]:
    """Shakes hands and takes the connection from aiohttp: the response is only to be returned.
    most: bytes of a frame. Raises BadRequest.
    """
    if not web.WebSocketResponse().can_prepare(request):
        raise BadRequest("this is a WebSocket: ask for an upgrade to version 13")
    offered = request.headers.get("Sec-WebSocket-Extensions") if compression else None
    window, no_takeover = ws_ext_parse(offered, isserver=True)
    key = request.headers["Sec-WebSocket-Key"].encode()
    accept = base64.b64encode(hashlib.sha1(key + WS_KEY).digest()).decode()
    headers = {"Upgrade": "websocket", "Connection": "upgrade", "Sec-WebSocket-Accept": accept}
    if window:
        agreed = ws_ext_gen(window, isserver=True, server_notakeover=no_takeover)
        headers["Sec-WebSocket-Extensions"] = agreed
    response = web.StreamResponse(status=101, headers=headers)
    writer = await response.prepare(request)
    assert writer is not None
    await writer.drain()
    transport, served = request.transport, request.protocol
    if transport is None:
        raise ConnectionResetError
    protocol = SocketProtocol(asyncio.get_running_loop(), most, bool(window))
    # A client that wants a smaller window than ours may be sent plain frames as well.
    encoding = encoder(ROOMS, DEFLATED if window == zlib.MAX_WBITS else WEBSOCKET)
    sink = protocol.inbox.sink = SocketSink(delivery, transport, protocol, encoding)
    assert protocol.reader is not None
    served.set_parser(protocol.reader)  # hands over what has come already
    transport.set_protocol(protocol)
    protocol.connection_made(transport)
    # To aiohttp this is a connection that was lost, but for the transport, which it would close; as
    # soon as the handler is over, because it would be cancelled, and with it a middleware around.
    served.transport = None
    handling = asyncio.current_task()
    assert handling is not None
    handling.add_done_callback(lambda task: served.connection_lost(None))
    return sink, response
