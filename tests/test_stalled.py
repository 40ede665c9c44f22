"""Readers of a busy room that stall, and readers that are only slow, on WebSocket and SSE.

One that stalls holds a bounded share of memory, adds nothing to the others, is cut, and comes back
with its last id to exactly what it missed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import chain
from typing import Any

import pytest

from tests.conftest import SOAK
from tests.processes import Server
from tests.raw_socket import CLOSE, PING, PONG, TEXT, RawSocket, dial, dialled, frame
from tests.readers import Answer, Connection, Sse, connect
from tests.scrape import scrape

STALLED = 1000 if SOAK else 60
HEALTHY = 20
WRITE_TIMEOUT = 2.0
HIGH_WATER = 32 * 1024
READ = 256 * 1024  # what the server reads at once for one that catches up
MB = 2**20
WORD = "x" * 4000
TOO_SLOW = 4408
CUTS = "rivulet_lag_cuts_total"


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits for a stalled reader for a short time, and keeps all that is said."""
    config = {
        "delivery": {"write_timeout": WRITE_TIMEOUT, "high_water": HIGH_WATER},
        "rooms": {"events": 10**6, "bytes": 2**30, "grace": 0.0},
        "history": {"messages": 1},
    }
    process = Server(tmp_path_factory.mktemp("busy"), config)
    yield process
    process.stop()


@asynccontextmanager
async def follower(
    server: Server, kind: str, room: str, after: str = ""
) -> AsyncIterator[RawSocket | Answer]:
    """A reader with a small receive buffer, which has read `joined` and reads nothing more."""
    if kind == "ws":
        path = f"/ws/{room}" + (f"?last_event_id={after}" if after else "")
        async with dialled(server.url, path, receive_buffer=2048) as socket:
            await socket.hear("joined")
            yield socket
    else:
        async with connect(server.url, receive_buffer=2048) as connection:
            yield await followed(connection, room, after)


async def followed(connection: Connection, room: str, after: str = "") -> Answer:
    query = f"?last_event_id={after}" if after else ""
    return await connection.request("GET", f"/api/v1/rooms/{room}/events{query}")


class Talk:
    """Numbered messages in a room, `rate` a second; `said` is how many."""

    def __init__(self, server: Server, room: str, rate: float) -> None:
        self.said = 0
        self._server, self._room, self._rate = server, room, rate

    async def __aenter__(self) -> Talk:
        self._task = asyncio.create_task(self._run())
        return self

    async def _run(self) -> None:
        start = time.monotonic()
        async with connect(self._server.url) as connection:
            while True:
                body = {"content": f"{self.said} {WORD}"}
                path = f"/api/v1/rooms/{self._room}/messages"
                answer = await connection.request("POST", path, json_body=body)
                assert answer.status == 201
                await answer.body()
                self.said += 1
                await asyncio.sleep(start + self.said / self._rate - time.monotonic())

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()


def number(told: dict[str, Any]) -> int:
    return int(told["content"].split()[0])


class Heard:
    """What a reader has had of a talk: the numbers, and the last id."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.id = ""

    def take(self, told: dict[str, Any]) -> None:
        if told["type"] == "message":
            self.numbers.append(number(told))
        self.id = told.get("id") or self.id


async def finish(reader: RawSocket | Answer, heard: Heard) -> int:
    """Reads to the end: the close code, 1006 where there is none."""
    if isinstance(reader, Answer):
        async for message in reader.items(Sse()):
            heard.take(message.json())
        return 1006
    while (found := await reader.receive()) is not None:
        if found.opcode == TEXT:
            heard.take(found.json())
        elif found.opcode == CLOSE:
            return found.code
    return 1006


async def resume(server: Server, kind: str, room: str, heard: Heard, upto: int) -> None:
    """Comes back after the last id and reads until it has had message `upto`."""
    other = "sse" if kind == "ws" else "ws"  # on the other transport, for good measure
    if other == "ws":
        async with dialled(server.url, f"/ws/{room}?last_event_id={heard.id}") as socket:
            assert (await socket.hear("joined"))["recovered"] is True
            while not heard.numbers or heard.numbers[-1] < upto:
                heard.take(await socket.hear("message"))
        return
    async with connect(server.url) as connection:
        answer = await followed(connection, room, heard.id)
        messages = answer.items(Sse())
        assert (await anext(messages)).json()["recovered"] is True
        while not heard.numbers or heard.numbers[-1] < upto:
            heard.take((await anext(messages)).json())


# --- one that never reads -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ws", "sse"])
async def test_one_that_stalls_is_cut_and_resumes_exactly(busy: Server, kind: str) -> None:
    """A WebSocket is told so with 4408, an SSE stream is cut; what it has had and what it gets
    after its last id are all that was said, each once, in order.
    """
    room, heard = f"cut-{kind}", Heard()
    async with follower(busy, kind, room) as reader:
        async with Talk(busy, room, 200) as talk:
            await asyncio.sleep(1.5)
        # It is cut once it took nothing for one to two times `write_timeout`; and what says so
        # waits for it for a while.
        await asyncio.sleep(2 * WRITE_TIMEOUT + 0.5)
        code = await finish(reader, heard)
    assert code == (TOO_SLOW if kind == "ws" else 1006)
    assert len(heard.numbers) < talk.said
    await resume(busy, kind, room, heard, talk.said - 1)
    assert heard.numbers == list(range(talk.said))


async def gaps(server: Server, room: str, seconds: float) -> list[float]:
    """The times between the messages that a healthy reader gets, which must be all."""
    found, numbers, last = [], [], 0.0
    end = time.monotonic() + seconds
    async with dialled(server.url, f"/ws/{room}") as socket:
        while time.monotonic() < end:
            numbers.append(number(await socket.hear("message")))
            now = time.monotonic()
            found.append(now - (last or now))
            last = now
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return found


async def test_a_crowd_that_stalls(busy: Server) -> None:
    """Half on WebSocket, half on SSE, from the start of a busy time to their cut: they hold no more
    than their bound, healthy readers' gaps hardly grow, and each resumes exactly.
    """
    healthy: list[list[float]] = []
    room, before = "crowd", busy.rss()
    cuts = (await scrape(busy.url))[CUTS]
    readers: list[tuple[str, RawSocket | Answer]] = []
    for crowded in (False, True):
        for index in range(STALLED if crowded else 0):
            if index % 2:
                socket = await dial(busy.url, f"/ws/{room}", receive_buffer=2048)
                readers.append(("ws", socket))
            else:
                connection = Connection(busy.url)
                await connection.open(receive_buffer=2048)
                readers.append(("sse", await followed(connection, room)))
        async with Talk(busy, room, 100) as talk:
            times = await asyncio.gather(*(gaps(busy, room, 4.0) for _ in range(HEALTHY)))
            healthy.append(sorted(chain.from_iterable(times)))
        if not crowded:
            before = max(before, busy.rss())
    held = busy.rss() - before
    assert held < STALLED * (HIGH_WATER + READ) + 16 * MB, f"{held / STALLED:.0f} bytes each"
    # All are cut by then: each at most twice `write_timeout` after it took something, which was
    # soon after the beginning. What tells a WebSocket so waits some seconds for it.
    await asyncio.sleep(WRITE_TIMEOUT / 2)
    heard = [Heard() for _ in readers]
    ends = zip(readers, heard, strict=True)
    codes = await asyncio.gather(*(finish(reader, each) for (_, reader), each in ends))
    # The server gives up saying so after some seconds, in which a thousand are not read here.
    for (kind, _), code in zip(readers, codes, strict=True):
        assert code == 1006 or (kind, code) == ("ws", TOO_SLOW)
    assert (await scrape(busy.url))[CUTS] - cuts == STALLED
    for share in (0.5, 0.99):
        was, now = (times[int(share * len(times))] for times in healthy)
        assert now < 2 * was + 0.05, f"gap at {share}: {was:.4f} s without, {now:.4f} s beside"
    assert all(len(each.numbers) < talk.said for each in heard)
    # An odd step takes of both kinds.
    for (kind, _), each in list(zip(readers, heard, strict=True))[:: STALLED // 40 | 1]:
        await resume(busy, kind, room, each, talk.said - 1)
        assert each.numbers == list(range(talk.said))
    for _, reader in readers:
        (reader if isinstance(reader, RawSocket) else reader.connection).cut()


# --- one that is slow ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ws", "sse"])
async def test_a_slow_reader_is_not_cut(busy: Server, kind: str) -> None:
    """One that always reads something within `write_timeout`, slower than what is said, for several
    times that long: it has everything, in order, from one connection.
    """
    room, heard = f"slow-{kind}", Heard()
    sse, pieces = Sse(), None
    async with follower(busy, kind, room) as reader:
        async with Talk(busy, room, 50) as talk:
            end = time.monotonic() + 4 * WRITE_TIMEOUT
            while time.monotonic() < end:
                if isinstance(reader, Answer):
                    pieces = pieces or reader.pieces()
                    for message in sse.feed(await anext(pieces)):
                        heard.take(message.json())
                    await asyncio.sleep(0.05)  # a piece is the buffer's 2 KB: 40 KB/s
                else:
                    found = await reader.receive()
                    assert found is not None and found.opcode != CLOSE, "it was cut"
                    if found.opcode == TEXT:
                        heard.take(found.json())
                    await asyncio.sleep(0.1)  # a frame is 4 KB
        assert talk.said > len(heard.numbers) + 50, "it was not slow"
        while not heard.numbers or heard.numbers[-1] < talk.said - 1:
            if pieces is not None:
                for message in sse.feed(await anext(pieces)):
                    heard.take(message.json())
            elif isinstance(reader, RawSocket):
                heard.take(await reader.hear("message"))
    assert heard.numbers == list(range(talk.said))


async def test_a_slow_reader_is_told_who_is_here_when_it_has_caught_up(busy: Server) -> None:
    """Comings and goings of meanwhile were not told."""
    async with follower(busy, "ws", "meanwhile") as reader:
        assert isinstance(reader, RawSocket)
        async with Talk(busy, "meanwhile", 400):
            await asyncio.sleep(1.0)
            async with dialled(busy.url, "/ws/meanwhile?user_id=passer") as passer:
                await passer.hear("joined")
        told = await reader.hear("presence")
    assert "anonymous" in told["members"]


@pytest.mark.parametrize("kind", ["ws", "sse"])
async def test_so_is_one_that_comes_back_from_long_ago(busy: Server, kind: str) -> None:
    """It has never been live, and `joined` said who was here then."""
    room, told = f"back-{kind}", {"type": "joined"}
    async with dialled(busy.url, f"/ws/{room}") as writer:
        first = (await writer.hear("joined"))["id"]
        for _ in range(1500):
            await writer.say(content=WORD)
            await writer.hear("ack")
    async with (
        follower(busy, kind, room, first) as reader,
        dialled(busy.url, f"/ws/{room}?user_id=passer") as passer,
    ):
        await passer.hear("joined")
        if isinstance(reader, RawSocket):
            told = await reader.hear("presence")
        else:
            items = reader.items(Sse())
            while told["type"] != "presence":
                told = (await anext(items)).json()
    assert "passer" in told["members"]


# --- replies that cannot be written -------------------------------------------------------------


async def test_no_frame_is_read_while_replies_cannot_be_written(busy: Server) -> None:
    """A client that asks and asks and reads nothing fills its own socket, not the server's memory;
    it is cut as any that stalls.
    """
    body = b'{"type":"history","limit":1000,"room":"asked"}'
    async with dialled(busy.url, "/ws/asked") as writer:
        for _ in range(100):
            await writer.say(content=WORD)
        for _ in range(100):
            await writer.hear("ack")
    before, answers = busy.rss(), 400_000  # bytes in each
    async with dialled(busy.url, "/ws/asked", receive_buffer=2048) as socket:
        sending = asyncio.create_task(socket.send(*[frame(TEXT, body)] * 20_000))
        await asyncio.sleep(WRITE_TIMEOUT / 2)
        assert busy.rss() < before + 10 * answers + 8 * MB
        await asyncio.sleep(2 * WRITE_TIMEOUT)
        # What it sent and nobody read makes closing a reset, in which the code may be lost.
        assert await socket.ended() in (TOO_SLOW, 1006)
        sending.cancel()


async def test_pings_of_one_that_reads_nothing_are_not_gathered(busy: Server) -> None:
    """Their answers are replies too."""
    before = busy.rss()
    async with dialled(busy.url, "/ws/pinger", receive_buffer=2048) as socket:
        burst = frame(PING, b"x" * 125) * 1000

        async def send() -> None:
            for _ in range(200):
                await socket.send(burst)

        sending = asyncio.create_task(send())
        await asyncio.sleep(1.0)
        assert busy.rss() < before + 8 * MB
        sending.cancel()
        found = await socket.receive()
        while found is not None and found.opcode != PONG:
            found = await socket.receive()
