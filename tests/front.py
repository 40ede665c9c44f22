"""A TCP front before a server that cuts connections, and remembers what clients asked for.

Clients that reconnect by themselves (`EventSource`, fetch-event-source) cannot cut their own
connection; this does it for them. It is also the origin that a browser's page comes from: the page
and the server then are one origin, as behind nginx.
"""

from __future__ import annotations

import asyncio
import contextlib
import urllib.parse
from dataclasses import dataclass, field

from tests.sockets import rst

PAGE = "/page-of-the-test"
HEARD = PAGE + "?heard="


@dataclass(slots=True)
class Asked:
    """One request that came through. response: what it got, head included."""

    method: str
    target: str
    headers: dict[str, str]
    response: bytes = b""
    cut: bool = False


@dataclass(slots=True)
class Cut:
    """The next request whose path starts with `path` is cut after so many bytes of response (its
    head included), or right after these bytes. heard: not before the page has said that it heard
    all whole messages up to there. A browser that sees a connection fail drops what it has
    received and not yet given to the page."""

    path: str
    after: int | bytes
    rst: bool = False
    heard: bool = False

    def end(self, response: bytes) -> int:
        """How much of the response so far goes through; -1: all of it."""
        if isinstance(self.after, int):
            return self.after if self.after <= len(response) else -1
        at = response.find(self.after)
        return at + len(self.after) if at >= 0 else -1


@dataclass(slots=True)
class Front:
    """Passes bytes between clients and the server at `target`. url: where clients connect."""

    target: str
    url: str = ""
    page: str = ""
    cuts: list[Cut] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    _heard: set[bytes] = field(default_factory=set)
    _more: asyncio.Condition = field(default_factory=asyncio.Condition)
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        if self._server:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self, path: str, *after: int | bytes, rst: bool = False, heard: bool = False) -> None:
        """Plans cuts of the next requests to `path`, one after the other."""
        self.cuts += [Cut(path, each, rst, heard) for each in after]

    def to(self, path: str) -> list[Asked]:
        """The requests whose path starts so."""
        return [asked for asked in self.asked if asked.target.startswith(path)]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._connection(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        pairs = (line.partition(":") for line in lines if line)
        asked = Asked(method, target, {k.strip().lower(): v.strip() for k, _, v in pairs})
        if target.startswith(PAGE):
            body = self.page.encode()
            if target.startswith(HEARD):
                body = b""
                async with self._more:
                    self._heard.add(urllib.parse.unquote_to_bytes(target.removeprefix(HEARD)))
                    self._more.notify_all()
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n"
                b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            await writer.drain()
            return
        self.asked.append(asked)
        cut = next((cut for cut in self.cuts if target.startswith(cut.path)), None)
        if cut:
            self.cuts.remove(cut)
        at = urllib.parse.urlsplit(self.target)
        inner, outer = await asyncio.open_connection(at.hostname, at.port)
        # One request a connection, so that each is seen here.
        outer.write(_one_request(head))
        pump = asyncio.ensure_future(self._pump(reader, outer))
        try:
            while data := await inner.read(65536):
                end = cut.end(asked.response + data) if cut else -1
                asked.cut = end >= 0
                data = data[: end - len(asked.response)] if asked.cut else data
                asked.response += data
                writer.write(data)
                await writer.drain()
                if cut and asked.cut:
                    if cut.heard:
                        await self._hear(_last_id(asked.response))
                    if cut.rst:
                        rst(writer)
                    return
        except OSError:
            writer.transport.abort()
        finally:
            pump.cancel()
            outer.transport.abort()

    async def _hear(self, said: bytes) -> None:
        """Until the page has said that it heard this id."""
        async with self._more:
            await self._more.wait_for(lambda: not said or said in self._heard)

    async def _pump(self, reader: asyncio.StreamReader, outer: asyncio.StreamWriter) -> None:
        """The request's body, and the client's going."""
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                outer.write(data)
                await outer.drain()
        outer.transport.abort()


def _last_id(response: bytes) -> bytes:
    """The id that a client has which heard the last whole message of an SSE response."""
    latest = said = b""
    data = False
    for line in response.split(b"\n"):
        name, _, value = line.strip().partition(b":")
        if name == b"id":
            latest = value.strip()
        elif name == b"data":
            data = True
        elif not line and data:
            said, data = latest, False
    return said


def _one_request(head: bytes) -> bytes:
    lines = head.split(b"\r\n")
    kept = [line for line in lines[:-2] if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([*kept, b"Connection: close", b"", b""])
