"""A WebSocket client that sends what it is told to, right or wrong, frame by frame (RFC 6455)."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tests.readers import Connection, Refused

CONTINUE, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


class Frame(NamedTuple):
    """One frame of the server's. rsv: its three reserved bits, 4 is the first."""

    opcode: int
    payload: bytes
    fin: bool = True
    rsv: int = 0

    def json(self) -> Any:
        assert self.opcode == TEXT, self
        return json.loads(self.payload)

    @property
    def code(self) -> int:
        """The code of a close frame; 1005 where it has none."""
        assert self.opcode == CLOSE, self
        return int.from_bytes(self.payload[:2]) if self.payload else 1005


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0) -> bytes:
    """One masked frame."""
    size = len(payload)
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 65536:
        length = b"\xfe" + struct.pack(">H", size)
    else:
        length = b"\xff" + struct.pack(">Q", size)
    key = os.urandom(4)
    mask = int.from_bytes((key * (size // 4 + 1))[:size])
    masked = (int.from_bytes(payload) ^ mask).to_bytes(size)
    return bytes([fin << 7 | rsv << 4 | opcode]) + length + key + masked


def closing(code: int, reason: bytes = b"") -> bytes:
    """A close frame with a code, which need not be a legal one."""
    return frame(CLOSE, struct.pack(">H", code) + reason)


class RawSocket:
    """An open WebSocket. It answers no ping, and reads only when it is told to."""

    def __init__(self, connection: Connection, headers: dict[str, str]) -> None:
        self.reader, self.writer = connection.reader, connection.writer
        self.headers = headers  # of the answer to its handshake
        self._cut = connection.cut

    async def send(self, *frames: bytes, chop: int = 0) -> None:
        """Sends these bytes; chop: so many at a time, each in a segment of its own."""
        data = b"".join(frames)
        for start in range(0, len(data), chop) if chop else (0,):
            self.writer.write(data[start : start + chop] if chop else data)
            await self.writer.drain()
            if chop:
                await asyncio.sleep(0)

    async def say(self, **fields: Any) -> None:
        """Sends one JSON object."""
        await self.send(frame(TEXT, json.dumps(fields).encode()))

    async def receive(self) -> Frame | None:
        """The next frame; None where the connection has ended, cleanly or not."""
        try:
            head = await self.reader.readexactly(2)
            size = head[1] & 0x7F
            assert not head[1] & 0x80, "a server's frames are not masked"
            if size >= 126:
                size = int.from_bytes(await self.reader.readexactly(2 if size == 126 else 8))
            payload = await self.reader.readexactly(size)
        except (OSError, EOFError):
            return None
        return Frame(head[0] & 0xF, payload, bool(head[0] & 0x80), head[0] >> 4 & 7)

    async def hear(self, type: str) -> Any:
        """The next JSON object of this type; others are passed over, pings too."""
        while (found := await self.receive()) is not None:
            if found.opcode == TEXT and (told := found.json())["type"] == type:
                return told
            assert found.opcode != CLOSE, found
        raise EOFError(f"no {type} before the end")

    async def ended(self) -> int:
        """Reads to the end: the code of the server's close frame; 1006 where none came."""
        code = 1006
        while (found := await self.receive()) is not None:
            if found.opcode == CLOSE:
                code = found.code
        return code

    def cut(self, rst: bool = False) -> None:
        """Goes away without a word."""
        self._cut(rst)


async def dial(
    url: str, path: str, headers: dict[str, str] | None = None, receive_buffer: int = 0
) -> RawSocket:
    """Opens a WebSocket, below the path of the URL. receive_buffer as in `Connection.open`. Raises
    Refused.
    """
    connection = Connection(url)
    await connection.open(receive_buffer)
    asked = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        **(headers or {}),
    }
    try:
        answer = await connection.request("GET", urlsplit(url).path + path, headers=asked)
        if answer.status != 101:
            raise Refused(answer)
    except BaseException:
        connection.cut()
        raise
    return RawSocket(connection, answer.headers)


@asynccontextmanager
async def dialled(url: str, path: str, **options: Any) -> AsyncIterator[RawSocket]:
    """An open WebSocket, cut on leaving."""
    socket = await dial(url, path, **options)
    try:
        yield socket
    finally:
        socket.cut()
