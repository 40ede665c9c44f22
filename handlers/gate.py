"""The gate: who has just connected waits in a lobby until the head of its first request is whole.

So a flood meets little of us. Whoever says nothing, or a head byte by byte, costs a transport and
what it has said, and no parser, task or timer; it is cut when `header_timeout` is over, or where
the lobby is full, the longest there first: a client that means it sends its head right behind its
connection. Only then is there a connection of aiohttp's, as long as there are less than
`limits.connections`, or an answer at once that says when to come back. Those that are in stay.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import resource
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, cast

import orjson
from aiohttp import web

from handlers.keys import CONFIG, DELIVERY, METRICS
from handlers.middleware import come_back, request_id
from handlers.origin import headers_for
from streaming.clock import Wheel
from streaming.config import Cors
from streaming.dialects import openai_error
from streaming.errors import RivuletError, Unavailable
from streaming.limits import RETRY

LINE_BYTES = 65536  # of a request's first line: a GET's prompt is there, up to 12 bytes a character
HEAD_BYTES = LINE_BYTES + 32768  # of a whole head; nginx takes 32 KB of headers
FIELDS = 100  # headers of a request
AHEAD = 2  # requests that may wait on a connection; with 1 each request would stop its reading
LOBBY = 16384  # that wait in it: thousands may come in one long turn of the loop
BEGUN = 1024  # of them who have sent a part of a head
BACKLOG = 4096  # connections waiting to be accepted: a reconnect storm comes at once
AT_ONCE = 32  # accepted, and let in, in a turn of the loop: whoever reads a room waits meanwhile
SHARE = 1 / 4  # of a long turn, in which it is more: else thousands that ask keep others out
EACH = 0.0001  # seconds that one takes
LONG = 0.25  # seconds that a turn counts at most: the loop may have been at rest
GRACE, TURNS = 2.0, 4  # seconds, and turns of the loop, that they have where the lobby is full
FULL = 0.05  # seconds until it is looked at again, where all in it are new
PAUSE = 1.0  # the same where there are no files left
RARELY = 20  # times as long as it took to count what is open, until it is counted again
SPARE = 16  # beyond the limit, for those who ask how it is
PROBES = b"GET /health ", b"GET /ready ", b"GET /metrics "

logger = logging.getLogger("rivulet.gate")


class Gate:
    """Lets connections in to an application that a server of aiohttp's runs."""

    def __init__(self, app: web.Application, server: web.Server) -> None:
        config = app[CONFIG]
        self.cors = config.cors
        self.refused = app[METRICS].refused
        self.lobby = Wheel(config.server.header_timeout)
        # A connection is an open file. Where there are none left nobody is even refused.
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.room = min(LOBBY, files // 8)
        self.most = min(config.limits.connections or files, files - 2 * self.room)
        self._delivery = app[DELIVERY]
        self._server = server
        self._inside = 0  # those counted last, and all that were let in since
        self._recount = 0.0  # not before then, as time.monotonic() has it
        self._begun: OrderedDict[Visitor, None] = OrderedDict()
        self._arrived: deque[Visitor] = deque()
        self._accepting, self._admitting = _Share(), _Share()
        self._coming: set[asyncio.Task[Any]] = set()
        self.turns = 0  # of the loop, in which some were accepted

    def open(self, listener: socket.socket) -> None:
        """Takes the connections of this socket."""
        self._listener = listener
        listener.setblocking(False)
        listener.listen(BACKLOG)
        self._listen()

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _pause(self, seconds: float) -> None:
        asyncio.get_running_loop().remove_reader(self._listener)
        asyncio.get_running_loop().call_later(seconds, self._listen)

    def _accept(self) -> None:
        """As asyncio's servers do; but they accept a fixed number in a turn of the loop, and a turn
        is long where thousands ask.
        """
        loop = asyncio.get_running_loop()
        self.turns += 1
        for _ in self._accepting.pieces():
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                logger.error("cannot accept", extra={"error": str(error)})
                self._pause(PAUSE)
                return
            connection.setblocking(False)
            coming = loop.connect_accepted_socket(lambda: Visitor(self), connection)
            self._coming.add(task := loop.create_task(coming))
            task.add_done_callback(self._coming.discard)
            if len(self.lobby) + len(self._coming) > self.room:
                oldest = cast(Visitor, self.lobby.oldest()) if len(self.lobby) else None
                if oldest is None or not oldest.overdue():
                    self._pause(FULL)
                    return
                oldest.beat()

    def close(self) -> None:
        """Takes no more, and cuts those in the lobby."""
        if self._listener.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        self.room = 0
        while len(self.lobby):
            self.lobby.oldest().beat()
        self.lobby.stop()

    def wait(self, visitor: Visitor) -> None:
        """Somebody comes, or is to go on their own."""
        self.lobby.touch(visitor)
        if not self.room:
            visitor.beat()

    def begin(self, visitor: Visitor) -> None:
        """Somebody who waits has sent a part of a head."""
        self._begun[visitor] = None
        if len(self._begun) > BEGUN:
            next(iter(self._begun)).beat()

    def drop(self, visitor: Visitor) -> None:
        """Somebody does not wait any more."""
        self.lobby.drop(visitor)
        self._begun.pop(visitor, None)

    def arrive(self, visitor: Visitor) -> None:
        """Somebody is to be let in, when it is their turn."""
        self._arrived.append(visitor)
        if len(self._arrived) == 1:
            asyncio.get_running_loop().call_soon(self._admit)

    def _admit(self) -> None:
        try:
            for _ in self._admitting.pieces():
                if not self._arrived:
                    return
                self._arrived.popleft().enter()
        finally:  # whatever happens to one
            if self._arrived:
                asyncio.get_running_loop().call_soon(self._admit)

    def take(self, head: bytes, transport: asyncio.Transport) -> bool:
        """Hands a connection over to aiohttp; whether there was a place for it."""
        spare = SPARE if head.startswith(PROBES) else 0
        began = time.monotonic()
        if self._inside >= self.most and began >= self._recount:
            self._inside = len(self._server.connections) + self._delivery.sockets
            now = time.monotonic()
            self._recount = now + RARELY * (now - began)
        if self._inside >= self.most + spare:
            return False
        self._inside += 1
        handler = self._server()
        # Private: aiohttp lets 32 requests wait behind one that is answered, with heads of up to
        # 1 MB each: 60 MB of memory. (tests/test_gate.py holds it.)
        handler._max_msg_queue_size = AHEAD
        transport.set_protocol(handler)
        handler.connection_made(transport)
        handler.data_received(head)
        if self._inside > self.most:
            handler.close()  # once that is answered
        return True


class _Share:
    """A share of the loop's time, for what goes on turn by turn."""

    def __init__(self) -> None:
        self._ended = math.inf  # when it was over in the turn before, while more waited

    def pieces(self) -> Iterator[None]:
        """One for each connection that there is time for; the caller leaves when no more wait."""
        turn, self._ended = time.monotonic() - self._ended, math.inf
        share = min(max(turn, 0.0), LONG) * SHARE
        for _ in range(max(AT_ONCE, int(share / EACH))):
            yield
        self._ended = time.monotonic()


class Visitor(asyncio.Protocol):
    """A connection in the lobby."""

    __slots__ = ("_arrived", "_came", "_gate", "_head", "_large", "_refused", "_transport")

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._head = bytearray()
        self._arrived = self._large = self._refused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)
        self._came = time.monotonic(), self._gate.turns
        self._gate.wait(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """See asyncio.Protocol."""
        self._gate.drop(self)

    def overdue(self) -> bool:
        """Whether its head would have been read by now, if it had been sent."""
        came, turn = self._came
        return time.monotonic() - came > GRACE and self._gate.turns - turn > TURNS

    def beat(self) -> None:
        """It has no more time."""
        self._gate.drop(self)
        if not self._refused:
            self._gate.refused["header_timeout"] += 1
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._refused:
            return  # its body: a connection that is closed with bytes unread is reset
        head, seen = self._head, len(self._head)
        head += data if head else data.lstrip(b"\r\n")  # as RFC 9112, section 2.2, has it
        if self._arrived:
            self._transport.pause_reading()
            return
        start = max(0, seen - 2)
        end = head.find(b"\n\r\n", start) + 3
        whole = end > 2 or head.find(b"\n\n", start) >= 0  # the latter for aiohttp to refuse
        end = end if end > 2 else len(head)
        self._large = end > HEAD_BYTES or head.count(b"\n", 0, end) > FIELDS + 2
        # What is no HTTP, as TLS, has no head; aiohttp says so.
        if self._large:
            self._transport.pause_reading()  # for good: it would go on
            del head[FIELDS * 80 :]
        if whole or self._large or (head and not head[:1].isalpha()):
            self._arrived = True
            self._gate.drop(self)
            self._gate.arrive(self)
        elif head:
            self._gate.begin(self)

    def enter(self) -> None:
        """It is its turn."""
        if self._transport.is_closing():
            return
        if self._large:
            message = "the headers are too large"
            self._refuse(RivuletError(message, status=431, code="header_too_large"))
            return
        if not self._transport.is_reading():
            self._transport.resume_reading()
        if not self._gate.take(bytes(self._head), self._transport):
            message = "the server has as many connections as it may"
            self._refuse(Unavailable(message, code="overloaded", retry_after=RETRY))

    def _refuse(self, error: RivuletError) -> None:
        head, self._head, self._refused = bytes(self._head), bytearray(), True
        self._gate.refused[error.code] += 1
        self._transport.write(refusal(head, error, self._gate.cors))
        if head.startswith(b"GET ") and error.status != 431:
            self._transport.close()
        else:
            self._transport.write_eof()
            self._gate.wait(self)


def refusal(head: bytes, error: RivuletError, cors: Cors) -> bytes:
    """The whole answer that an error means to whoever sent this head; see handlers/middleware.py,
    which answers those that are in.
    """
    first, *lines = head.decode("latin-1").split("\n", FIELDS)
    pairs = (line.partition(":") for line in lines)
    fields = {name.lower(): value.strip() for name, _, value in pairs}
    target = "".join(first.split(" ")[1:2])
    name = request_id(fields.get("x-request-id", ""))
    back = fields.get("last-event-id") or re.search("[?&]last_event_id=[^&]", target)
    headers = {**headers_for(fields.get("origin"), cors), "X-Request-Id": name}
    if back and error.retry_after and "text/event-stream" in fields.get("accept", ""):
        status, kind, body = 200, "text/event-stream", come_back(error)
    else:
        status, kind = error.status, "application/json"
        said = error.body(name)
        if target.startswith("/v1/"):
            said = openai_error(said, status)
        body = orjson.dumps({"error": said})
        if error.retry_after:
            headers["Retry-After"] = str(round(error.retry_after))
    headers |= {"Cache-Control": "no-store", "Connection": "close"}
    headers |= {"Content-Type": kind, "Content-Length": str(len(body))}
    top = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    top += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*top, "", ""]).encode() + body
