"""Writing to a WebSocket past its transport, which a feed does while nothing waits in that."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from app import build
from handlers.keys import ROOMS
from streaming.config import Config
from tests.inside import in_process
from tests.raw_socket import TEXT, RawSocket, dial, dialled, frame

SMALL = 4096  # bytes that the kernel holds for a connection, about
CROWD = 40


@asynccontextmanager
async def narrow() -> AsyncIterator[tuple[web.Application, str]]:
    """A server whose kernel takes little at once, and its URL."""
    application = build(Config())
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)  # its connections inherit it
    async with in_process(application, listener) as url:
        yield application, url


async def turns() -> None:
    """Some turns of the loop, in which what was said is written."""
    for _ in range(3):
        await asyncio.sleep(0)


async def heard(reader: RawSocket, wanted: Counter[str]) -> list[dict[str, Any]]:
    """All frames until so many of each of these types have come."""
    told: list[dict[str, Any]] = []
    while +wanted:
        found = await reader.receive()
        assert found is not None and found.opcode == TEXT
        told.append(found.json())
        wanted[told[-1]["type"]] -= 1
    return told


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("asked, answer", [("ping", "pong"), ("history", "history")])
@pytest.mark.parametrize("size", [100, 3000, 20_000])
async def test_what_the_kernel_takes_in_part_stays_in_order(
    size: int, asked: str, answer: str, early: bool
) -> None:
    """On one socket that reads two rooms and is answered meanwhile: every frame is whole, and in
    each room's order, whether all of a write was taken, a part, or nothing.
    """
    async with narrow() as (application, url), dialled(url, "/ws", receive_buffer=2048) as reader:
        rooms = [application[ROOMS].get(name) for name in ("a", "b")]
        for room in rooms:
            await reader.say(type="join", room=room.name)
            await reader.hear("joined")
        numbers: dict[str, list[int]] = {"a": [], "b": []}
        said = 0
        for burst in (1, 2, 3, 5, 8, 2, 30, 1, 1, 12):  # some wait in the transport, some lag
            if early:
                await reader.say(type=asked, room="a", limit=10)  # answered while they are told
            for _ in range(burst):
                for room in rooms:
                    room.append("message", {"user_id": "u", "content": f"{said} {'x' * size}"})
                    await turns()
                said += 1
            if not early:
                await reader.say(type=asked, room="a", limit=10)
            for told in await heard(reader, Counter({"message": 2 * burst, answer: 1})):
                if told["type"] == "message":
                    numbers[told["room"]].append(int(told["content"].split()[0]))
        assert numbers == {"a": [*range(said)], "b": [*range(said)]}


async def test_a_new_connection_gets_nothing_of_one_that_is_gone() -> None:
    """Though it has its number: a socket that closes has left the room before."""
    async with narrow() as (application, url):
        room = application[ROOMS].get("busy")
        readers = [await dial(url, "/ws/busy") for _ in range(CROWD)]
        others: list[RawSocket] = []
        for reader in readers:
            reader.cut(rst=True)
            opening = asyncio.create_task(dial(url, "/echo"))
            while not opening.done():
                room.append("message", {"user_id": "u", "content": "for the room alone"})
                await asyncio.sleep(0)
            others.append(await opening)
        for number, other in enumerate(others):
            await other.send(frame(TEXT, b"%d" % number))
            found = await other.receive()
            assert found is not None and found.payload == b"%d" % number
            other.cut()
