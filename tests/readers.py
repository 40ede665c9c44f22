"""Clients of the kind that people write, to see what such a client sees.

A `Connection` speaks HTTP over a socket of its own and gives an `Answer`, whose body comes as it
comes and which says how it ended. A parser turns body bytes into items, whatever pieces they come
in; what is not whole when the body ends is dropped:

    Sse        Message(id, event, data)   by the W3C's rules, as `EventSource` does
    DataLines  str                        takes each line that starts with `data: `
    DataBlocks str                        splits at blank lines; a block is one bare `data: ` line
    Ndjson     dict                       one JSON object a line
    Braces     dict                       whatever stands before a `}` is one JSON object
    Text       str

The naive ones raise `Broken` where such a client would throw.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import re
import socket
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

from tests import sockets

T = TypeVar("T")


class Broken(AssertionError):
    """A client that reads like this would have failed."""


class Refused(AssertionError):
    """A stream was asked for, and this came instead."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.status, self.headers = answer.status, answer.headers


# --- HTTP ---------------------------------------------------------------------------------------


class Answer:
    """One response. `ended` is "" while the body runs, then

    end    as HTTP says a whole body ends: its last chunk, its length, or (with neither) FIN
    cut    the connection ended before that, or with RST, or this reader cut it
    """

    def __init__(self, connection: Connection, status: int, headers: dict[str, str]) -> None:
        self.connection, self.status, self.headers = connection, status, headers
        self.ended = ""

    async def pieces(self, cut_after: int | None = None, rst: bool = False) -> AsyncIterator[bytes]:
        """The body. `cut_after`: exactly so many bytes of it, then the connection is cut."""
        left = cut_after
        try:
            async for piece in self._body():
                if left is not None and len(piece) >= left:
                    self.connection.cut(rst)
                    self.ended = "cut"
                    yield piece[:left]
                    return
                if left is not None:
                    left -= len(piece)
                yield piece
            self.ended = "end"
        except (OSError, EOFError):
            self.ended = "cut"

    async def body(self) -> bytes:
        """All of the body; how it ended is in `ended`."""
        return b"".join([piece async for piece in self.pieces()])

    async def json(self) -> Any:
        return json.loads(await self.body())

    async def read(self, parser: Parser[T], **cut: Any) -> list[T]:
        """All items of the body."""
        return [item async for item in self.items(parser, **cut)]

    async def items(self, parser: Parser[T], **cut: Any) -> AsyncIterator[T]:
        """The items of the body, each as it comes."""
        async for piece in self.pieces(**cut):
            for item in parser.feed(piece):
                yield item

    async def _body(self) -> AsyncIterator[bytes]:
        reader = self.connection.reader
        if self.status in (204, 304):
            return
        if self.headers.get("transfer-encoding") == "chunked":
            if self.connection.http == "1.0":
                raise Broken("chunks in an answer to an HTTP/1.0 request")
            while size := _size(await reader.readuntil(b"\r\n")):
                async for piece in self._exactly(size):
                    yield piece
                if await reader.readexactly(2) != b"\r\n":
                    raise Broken("a chunk is longer than it says")
            if await reader.readuntil(b"\r\n") != b"\r\n":
                raise Broken("bytes between the last chunk and the end")
        elif "content-length" in self.headers:
            async for piece in self._exactly(int(self.headers["content-length"])):
                yield piece
        else:
            while piece := await reader.read(65536):
                yield piece

    async def _exactly(self, left: int) -> AsyncIterator[bytes]:
        """So many bytes, as they come: also those before a cut."""
        while left:
            piece = await self.connection.reader.read(min(left, 65536))
            if not piece:
                raise EOFError
            left -= len(piece)
            yield piece


def _size(line: bytes) -> int:
    try:
        return int(line.split(b";")[0], 16)
    except ValueError:
        raise Broken(f"no chunk size: {line[:60]!r}") from None


class Connection:
    """A socket that speaks HTTP, one request after the other."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def __init__(self, url: str, http: str = "1.1") -> None:
        """url: the server's; a path in it is ignored. http: "1.0" or "1.1"."""
        at = urllib.parse.urlsplit(url)
        self.host, self.port, self.http = at.hostname or "", at.port or 80, http

    async def open(self, receive_buffer: int = 0) -> None:
        """`receive_buffer`: bytes that are taken for us; a reader that stops reading then shows
        soon on the other side. The segments are a network's then: with loopback's of 64 KB the
        other side's kernel would hold megabytes."""
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (self.host, self.port))
        except OSError:
            sock.close()
            raise
        limit = receive_buffer or 1 << 16
        self.reader, self.writer = await asyncio.open_connection(sock=sock, limit=limit)

    async def request(
        self,
        method: str,
        target: str,
        *,
        headers: Mapping[str, str] | None = None,
        json_body: Any = None,
        body: bytes = b"",
    ) -> Answer:
        """Sends a request and reads the head of its answer. Raises EOFError when there is none."""
        fields = {"Host": f"{self.host}:{self.port}", **(headers or {})}
        if json_body is not None:
            body = json.dumps(json_body).encode()
            fields.setdefault("Content-Type", "application/json")
        if body or method in ("POST", "PUT"):
            fields.setdefault("Content-Length", str(len(body)))
        lines = [f"{method} {target} HTTP/{self.http}", *(f"{k}: {v}" for k, v in fields.items())]
        head = "\r\n".join([*lines, "\r\n"])
        self.writer.write(head.encode(errors="surrogateescape") + body)
        await self.writer.drain()
        status, *told = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in told if line)
        names = {name.strip().lower(): value.strip() for name, _, value in pairs}
        return Answer(self, int(status.split(" ")[1]), names)

    def cut(self, rst: bool = False) -> None:
        """Goes away at once, with FIN or with RST."""
        if rst:
            sockets.rst(self.writer)
        self.writer.transport.abort()

    async def leftover(self) -> bytes:
        """What comes after the answer until the other side closes. Should be nothing."""
        return await self.reader.read(-1)


@asynccontextmanager
async def connect(url: str, http: str = "1.1", **options: Any) -> AsyncIterator[Connection]:
    """An open connection, closed on leaving."""
    connection = Connection(url, http)
    await connection.open(**options)
    try:
        yield connection
    finally:
        connection.writer.close()


@asynccontextmanager
async def ask(
    method: str, url: str, *, http: str = "1.1", keep_alive: bool = False, **request: Any
) -> AsyncIterator[Answer]:
    """One request on a connection of its own, closed on leaving. `request` as in `request`."""
    at = urllib.parse.urlsplit(url)
    target = (at.path or "/") + (f"?{at.query}" if at.query else "")
    if not keep_alive:
        request["headers"] = {"Connection": "close", **(request.get("headers") or {})}
    async with connect(url, http) as connection:
        yield await connection.request(method, target, **request)


PROMPT = "what is a river?"


def question(model: str, prompt: str = PROMPT, **more: Any) -> dict[str, Any]:
    """The body of a request for a chat completion, streamed unless it says otherwise."""
    messages = [{"role": "user", "content": prompt}]
    return {"model": model, "messages": messages, "stream": True, **more}


@asynccontextmanager
async def ask_model(url: str, model: str, **more: Any) -> AsyncIterator[Answer]:
    """Asks an OpenAI-compatible server (ours, or the upstream itself) for a chat completion."""
    async with ask(
        "POST", f"{url}/v1/chat/completions", json_body=question(model, **more)
    ) as answer:
        yield answer


# --- parsers ------------------------------------------------------------------------------------


class Parser(Protocol[T]):
    def feed(self, data: bytes) -> list[T]:
        """What became whole with these bytes."""
        ...


class Message(NamedTuple):
    id: str
    event: str
    data: str

    def json(self) -> Any:
        return json.loads(self.data)


class Sse:
    """The event stream parser of the HTML standard. `last_event_id` is what `EventSource` would
    send on reconnecting: that of the last whole block. `retry`: milliseconds, `comments`: all.
    """

    def __init__(self) -> None:
        self.last_event_id = ""
        self.retry: int | None = None
        self.comments: list[str] = []
        self._rest = b""
        self._first = True
        self._id = self._event = ""
        self._data: list[str] = []

    def feed(self, data: bytes) -> list[Message]:
        self._rest += data
        if self._first and len(self._rest) >= 3:
            self._rest = self._rest.removeprefix(codecs.BOM_UTF8)
            self._first = False
        half = b"\r" if self._rest.endswith(b"\r") else b""  # perhaps of a CR LF
        *lines, rest = re.split(rb"\r\n|\n|\r", self._rest.removesuffix(half))
        self._rest = rest + half
        messages = (self._take(line.decode("utf-8", "replace")) for line in lines)
        return [message for message in messages if message]

    def _take(self, line: str) -> Message | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not name:
            self.comments.append(value)
        elif name == "event":
            self._event = value
        elif name == "data":
            self._data.append(value)
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            self.retry = int(value)
        return None

    def _dispatch(self) -> Message | None:
        self.last_event_id = self._id
        message = Message(self._id, self._event or "message", "\n".join(self._data))
        empty = not self._data
        self._event, self._data = "", []
        return None if empty else message


class _Split:
    """Gathers bytes and splits them at `end`."""

    end = b"\n"

    def __init__(self) -> None:
        self._rest = b""

    def _whole(self, data: bytes) -> list[str]:
        *whole, self._rest = (self._rest + data).split(self.end)
        return [part.decode() for part in whole]


class DataLines(_Split):
    """`for line in response: if line.startswith("data: ")`: sees nothing but such lines."""

    def feed(self, data: bytes) -> list[str]:
        lines = (line.removesuffix("\r") for line in self._whole(data))
        return [line[6:] for line in lines if line.startswith("data: ")]


class DataBlocks(_Split):
    """`for block in text.split("\\n\\n"): if block.startswith("data: "): parse(block.slice(6))`."""

    end = b"\n\n"

    def feed(self, data: bytes) -> list[str]:
        return [data for block in self._whole(data) for data in self._block(block)]

    def _block(self, block: str) -> list[str]:
        if block.startswith("data: ") and "\n" not in block:
            return [block[6:]]
        if any(line.startswith("data:") for line in block.split("\n")):
            raise Broken(f"not one bare data line: {block!r}")
        return []


class Ndjson(_Split):
    """`for line in response: json.loads(line)`: a blank line breaks it, and so does half a line."""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        return [self._object(line) for line in self._whole(data)]

    def _object(self, line: str) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except ValueError:
            raise Broken(f"no JSON line: {line!r}") from None
        if not isinstance(value, dict):
            raise Broken(f"no object: {line!r}")
        return value


class Braces(_Split):
    """Reads up to each `}` and takes that for one JSON object, as small devices' clients do."""

    end = b"}"

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        return [self._object(part + "}") for part in self._whole(data)]

    def _object(self, text: str) -> dict[str, Any]:
        try:
            value: dict[str, Any] = json.loads(text)
        except ValueError:
            raise Broken(f"no JSON object up to its brace: {text!r}") from None
        return value


class Text:
    """The text, decoded as it comes; a character cut in two waits for its rest."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def feed(self, data: bytes) -> list[str]:
        text = self._decoder.decode(data)
        return [text] if text else []
