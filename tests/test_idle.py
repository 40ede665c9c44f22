"""Many connections that say nothing: what they hold while they are there is small, and when they
are gone nothing of them is left.
"""

from __future__ import annotations

import asyncio
import gc
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import build
from handlers.keys import DELIVERY, PRESENCE, ROOMS
from streaming.config import Config, Rooms
from streaming.delivery import Sink
from tests.conftest import SOAK
from tests.inside import in_process
from tests.processes import Server, until
from tests.raw_socket import RawSocket, dial
from tests.readers import Connection

COUNT = 10_000 if SOAK else 500
AT_ONCE = 200  # that connect at the same time
HELD = 14 * 1024  # bytes that an idle connection may take; bench/ says how many it does
CYCLE = 2048  # of a transport, its socket and what hangs on them
GARBAGE = 24 * 2**20  # of such at most, until the collector looks
MB = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server in which who leaves has left at once, and nobody needs to answer pings; this process
    may open as many files as it.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    process = Server(
        tmp_path_factory.mktemp("idle"), {"rooms": {"grace": 0.0}, "delivery": {"heartbeat": 600.0}}
    )
    yield process
    process.stop()


async def listen(url: str, number: int) -> Connection | RawSocket:
    """One idle connection, by turns a WebSocket and an SSE stream; ten people share a room."""
    room, user = f"room-{number // 10}", f"user_id=user-{number}"
    if number % 2:
        socket = await dial(url, f"/ws/{room}?{user}", receive_buffer=4096)
        await socket.hear("joined")
        return socket
    connection = Connection(url)
    await connection.open(receive_buffer=4096)
    answer = await connection.request("GET", f"/api/v1/rooms/{room}/events?{user}")
    assert answer.status == 200
    await connection.reader.readuntil(b"event: joined")
    return connection


async def crowd(url: str, count: int) -> list[Connection | RawSocket]:
    """So many of them."""
    found: list[Connection | RawSocket] = []
    for start in range(0, count, AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, count))
        found += await asyncio.gather(*(listen(url, number) for number in numbers))
    return found


def test_the_server_may_open_as_many_files_as_the_system_lets_it(server: Server) -> None:
    """A connection is an open file, and the usual limit of 1024 is soon reached."""
    for line in Path(f"/proc/{server.pid}/limits").read_text().splitlines():
        if line.startswith("Max open files"):
            soft, hard = line.split()[3:5]
            assert soft == hard


@pytest.mark.timeout(300)
async def test_idle_connections_leave_nothing_behind(server: Server) -> None:
    """Held at once, then all gone, again and again: files are closed, and memory does not grow from
    crowd to crowd. It does not fall to where it was before the first: the allocator keeps for the
    next one what lies between things that stay, and the collector takes asyncio's transports, which
    are cycles, only now and then.
    """
    files, start = server.files(), server.rss()
    gone: list[int] = []
    for _ in range(5):
        connections = await crowd(server.url, COUNT)
        assert server.files() >= files + COUNT
        assert server.rss() < start + COUNT * HELD + 8 * MB
        for connection in connections:
            connection.cut()
        await until(lambda: server.files() <= files)
        gone.append(server.rss())
    left = min(3 * COUNT * CYCLE, GARBAGE)
    assert gone[4] < gone[1] + left + 2 * MB, [level / MB for level in gone]


async def test_idle_connections_leave_no_task_and_no_object() -> None:
    """Seen from inside: tasks, sinks, feeds, timers, members."""
    app = build(Config(rooms=Rooms(grace=0.0)))
    async with in_process(app) as url:
        delivery = app[DELIVERY]
        gc.collect()
        tasks, sinks = len(asyncio.all_tasks()), sinks_alive()
        connections = await crowd(url, 200)
        assert len(delivery._sinks) == 200 and len(delivery._feeds) == 20 + 100
        # A WebSocket has none; a stream has a coroutine of ours, in a task of aiohttp's beside its
        # own for the connection.
        assert len(asyncio.all_tasks()) <= tasks + 2 * 100
        for connection in connections:
            connection.cut()
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        del connections
        gc.collect()
        assert not delivery._sinks and not delivery._feeds
        assert not delivery.pings._touched and not delivery.silence._touched
        await until(lambda: not app[PRESENCE]._leaving)
        for room in app[ROOMS]:
            assert not room.people and not room.log.listeners
        assert sinks_alive() == sinks


def sinks_alive() -> int:
    """Sinks that something still refers to."""
    return sum(isinstance(each, Sink) for each in gc.get_objects())


async def test_people_who_come_and_go_leave_nothing_behind(server: Server) -> None:
    """Twice as many as are held at once, a few at a time."""
    count = COUNT * 2
    for each in await crowd(server.url, 100):
        each.cut()
    files, before = server.files(), server.rss()
    for start in range(0, count, AT_ONCE):
        for each in await crowd(server.url, AT_ONCE):
            each.cut(rst=start % 400 == 0)
    await until(lambda: server.files() <= files)
    assert server.rss() < before + count * CYCLE + 8 * MB
