"""People in rooms: whoever follows one, over WebSocket, SSE or NDJSON, sees the same frames."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

from tests.clients import MEDIA
from tests.endpoints import url_of
from tests.raw_socket import CLOSE, PING, PONG, TEXT, RawSocket, dial, frame
from tests.readers import Answer, Message, Ndjson, Parser, Refused, Sse, ask

JSON = dict[str, Any]
TRANSPORTS = ("ws", "sse", "ndjson")
WAIT = 30.0  # seconds in which any frame must have come
_numbers = itertools.count()


def new_room() -> str:
    """The name of a room that nobody else uses."""
    return f"room{next(_numbers)}"


class Follower(ABC):
    """Reads a room's frames. `last_id`: of the last frame that had one, to come back with."""

    last_id = ""

    async def next(self) -> JSON:
        """The next frame. Raises EOFError at the end."""
        async with asyncio.timeout(WAIT):
            told = await self._next()
        self.last_id = told.get("id", self.last_id)
        return told

    async def hear(self, type: str, **fields: Any) -> JSON:
        """The next frame of this type with these fields; others are passed over."""
        return (await self.until(type, **fields))[-1]

    async def until(self, type: str, **fields: Any) -> list[JSON]:
        """All frames up to the next one of this type with these fields."""
        heard: list[JSON] = []
        wanted = {"type": type, **fields}
        while True:
            heard.append(await self.next())
            if wanted.items() <= heard[-1].items():
                return heard

    async def rest(self) -> list[JSON]:
        """All frames up to the end."""
        heard: list[JSON] = []
        try:
            while True:
                heard.append(await self.next())
        except EOFError:
            return heard

    @abstractmethod
    async def _next(self) -> JSON: ...

    @abstractmethod
    def cut(self, rst: bool = False) -> None:
        """Goes away without a word."""


class Socket(Follower):
    """A WebSocket client as a browser is: it answers pings. code: of the server's close frame."""

    def __init__(self, raw: RawSocket) -> None:
        self.raw = raw
        self.code = 1006

    async def _next(self) -> JSON:
        while (found := await self.raw.receive()) is not None:
            if found.opcode == TEXT:
                told: JSON = found.json()
                return told
            if found.opcode == CLOSE:
                self.code = found.code
                with contextlib.suppress(ConnectionError):
                    await self.raw.send(frame(CLOSE, found.payload))
            elif found.opcode == PING:
                await self.raw.send(frame(PONG, found.payload))
        raise EOFError(f"closed: {self.code}")

    async def say(self, type: str | None = None, **fields: Any) -> None:
        """Sends a frame."""
        await self.send_text(json.dumps(({"type": type} if type else {}) | fields))

    async def send_text(self, text: str) -> None:
        await self.raw.send(frame(TEXT, text.encode()))

    async def call(self, type: str | None = None, **fields: Any) -> JSON:
        """Sends a frame with a `ref`: the reply that has it; what comes before is passed over."""
        ref = f"ref{next(_numbers)}"
        await self.say(type, ref=ref, **fields)
        while (told := await self.next()).get("ref") != ref:
            pass
        return told

    async def so_far(self) -> list[JSON]:
        """All that was told up to now."""
        ref = f"ref{next(_numbers)}"
        await self.say("ping", ref=ref)
        return (await self.until("pong", ref=ref))[:-1]

    def cut(self, rst: bool = False) -> None:
        self.raw.cut(rst)


class Stream(Follower):
    """An SSE or NDJSON client. In SSE `event` and `id` of each block must be its frame's own."""

    def __init__(self, answer: Answer, parser: Parser[Any], **cut: Any) -> None:
        self.answer, self.parser = answer, parser
        self._items = answer.items(parser, **cut)

    async def _next(self) -> JSON:
        try:
            item = await anext(self._items)
        except StopAsyncIteration:
            raise EOFError(self.answer.ended) from None
        if not isinstance(item, Message):
            return dict(item)
        told: JSON = item.json()
        assert item.event == told["type"], item
        assert "id" not in told or item.id == told["id"], item
        return told

    def cut(self, rst: bool = False) -> None:
        self.answer.connection.cut(rst)


@asynccontextmanager
async def on_socket(url: str, path: str = "/ws", **query: Any) -> AsyncIterator[Socket]:
    """An open WebSocket, cut on leaving."""
    raw = await dial(url, url_of("", path, **query))
    try:
        yield Socket(raw)
    finally:
        raw.cut()


@asynccontextmanager
async def following(
    url: str,
    room: str,
    transport: str = "ws",
    user: str | None = None,
    after: str | None = None,
    **cut: Any,
) -> AsyncIterator[Follower]:
    """Somebody in a room, cut on leaving. The first frame is still to be read. after: the position
    to come back with. cut: see `Answer.pieces`; not on WebSocket. Raises Refused.
    """
    if transport == "ws":
        path = f"/ws/{quote(room, safe='')}"
        async with on_socket(url, path, user_id=user, last_event_id=after) as socket:
            yield socket
        return
    headers = {"Accept": MEDIA[transport], **({"Last-Event-ID": after} if after else {})}
    target = url_of(url, f"/api/v1/rooms/{quote(room, safe='')}/events", user_id=user)
    async with ask("GET", target, headers=headers) as answer:
        if answer.status != 200:
            raise Refused(answer)
        yield Stream(answer, Sse() if transport == "sse" else Ndjson(), **cut)


@asynccontextmanager
async def joined(
    url: str, room: str, user: str | None = None, transport: str = "ws", **more: Any
) -> AsyncIterator[Any]:
    """As `following`, and `joined` has been read."""
    async with following(url, room, transport, user, **more) as follower:
        await follower.hear("joined")
        yield follower


async def request(
    url: str,
    method: str,
    path: str,
    body: Any = None,
    user: str | None = None,
    headers: Mapping[str, str] | None = None,
    **query: Any,
) -> tuple[int, Any]:
    """A request about rooms: the status and the JSON of its answer."""
    target = url_of(url, path, user_id=user, **query)
    async with ask(method, target, headers=headers, json_body=body) as answer:
        return answer.status, await answer.json()


async def publish(
    url: str, room: str, body: Any, user: str | None = None, key: str | None = None
) -> tuple[int, Any]:
    """Publishes by REST: the status and the JSON of the answer."""
    headers = {"Idempotency-Key": key} if key else {}
    path = f"/api/v1/rooms/{quote(room, safe='')}/messages"
    return await request(url, "POST", path, body, user, headers)


async def members(url: str, room: str) -> list[str]:
    """Who is there, as REST says."""
    _, told = await request(url, "GET", f"/api/v1/rooms/{quote(room, safe='')}/presence")
    there: list[str] = told["members"]
    return there


async def empty(url: str, room: str) -> None:
    """Returns as soon as nobody is there any more."""
    async with asyncio.timeout(WAIT):
        while await members(url, room):  # noqa: ASYNC110 - it is another process
            await asyncio.sleep(0.01)
