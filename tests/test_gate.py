"""The gate, and bodies: what does not come, does not end, is too large, or is one too many."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from app import build
from handlers import reading
from handlers.gate import FIELDS, HEAD_BYTES, Gate
from streaming.config import Config, Limits
from tests.conftest import SOAK, StartServer
from tests.people import Follower, joined, publish, request
from tests.processes import Server, until
from tests.readers import Answer, Connection, Sse, ask, connect
from tests.scrape import moved, scrape

FEW = 40  # connections that there may be
MB = 2**20
HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
EVENTS = "/api/v1/rooms/crowded/events"


def limits(connections: int) -> dict[str, Any]:
    """The configuration of a server that soon has enough."""
    return {
        "server": {"header_timeout": 1.0, "body_timeout": 5.0 if SOAK else 1.0},
        "limits": {"connections": connections, "body_bytes": MB},
        "rooms": {"grace": 0.0},
    }


@pytest.fixture
def guarded(server: StartServer) -> Server:
    """Such a server."""
    return server(**limits(FEW))


@asynccontextmanager
async def gated(
    config: Config | None = None, room: int = 0, **options: Any
) -> AsyncIterator[tuple[str, Gate]]:
    """The application in this process, behind its gate. room: of the lobby."""
    app = build(config or Config())
    options = {"handler_cancellation": True, "shutdown_timeout": 1, "lingering_time": 0.1} | options
    runner = web.AppRunner(app, **options)
    await runner.setup()
    assert runner.server is not None
    gate, listener = Gate(app, runner.server), socket.create_server(("127.0.0.1", 0))
    gate.room = room or gate.room
    gate.open(listener)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", gate
    finally:
        gate.close()
        await runner.cleanup()


@asynccontextmanager
async def sent(url: str, data: bytes) -> AsyncIterator[Connection]:
    """A connection on which these bytes have been sent."""
    async with connect(url) as connection:
        connection.writer.write(data)
        await connection.writer.drain()
        yield connection


async def seen(url: str, data: bytes) -> bytes:
    """All that comes back until the other side closes."""
    async with sent(url, data) as connection:
        with suppress(ConnectionError):
            return await connection.leftover()
        return b"reset"


async def lasts(connection: Connection, data: bytes, told: list[bytes] | None = None) -> float:
    """How many seconds the other side listens to this, a byte at a time. told: what it says."""

    async def dribble() -> None:
        for byte in data:
            connection.writer.write(bytes((byte,)))
            await asyncio.sleep(0.05)

    began, saying = time.monotonic(), asyncio.create_task(dribble())
    try:
        with suppress(ConnectionError):
            while piece := await connection.reader.read(65536):
                if told is not None:
                    told.append(piece)
    finally:
        saying.cancel()
    return time.monotonic() - began


# --- heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [b"", b"\r\n", b"\r\n\r\n", b"\n"])
async def test_a_head_in_any_pieces(lead: bytes) -> None:
    """Byte by byte, with empty lines before it, or together with what comes after it."""
    data = lead + HEAD + b"\r\n" + HEAD + b"Connection: close\r\n\r\n"
    async with gated() as (url, _):
        for chop in (1, 2, 3, 7, len(lead + HEAD), len(data)):
            async with connect(url) as connection:
                for start in range(0, len(data), chop):
                    connection.writer.write(data[start : start + chop])
                    await connection.writer.drain()
                    await asyncio.sleep(0)
                assert (await connection.leftover()).count(b'{"status":"healthy"}') == 2


async def test_a_head_that_does_not_come(guarded: Server) -> None:
    """Whoever says nothing, or not all of it, is cut after `header_timeout`, and not before."""
    before = await scrape(guarded.url)
    began = time.monotonic()
    told = await asyncio.gather(*(seen(guarded.url, d) for d in (b"", b"GET", HEAD, b"\r\n\r\n")))
    assert set(told) <= {b"", b"reset"}
    assert 0.9 < time.monotonic() - began < 10
    await moved(guarded.url, before, {'rivulet_refused_total{code="header_timeout"}': 4})


async def test_a_later_head_that_does_not_come() -> None:
    """On a connection that is kept alive aiohttp cuts it as one that is idle, however often a byte
    comes.
    """
    async with (
        gated(keepalive_timeout=1.0) as (url, _),
        sent(url, HEAD + b"\r\n") as connection,
    ):
        await connection.reader.readuntil(b"healthy")
        assert 0.5 < await lasts(connection, HEAD * 100) < 10


async def test_requests_behind_a_stream() -> None:
    """Their heads are not read ahead: few wait, and the rest in the client's own buffers. When the
    stream is over they get their answers.
    """
    head = HEAD + b"".join(b"X-%d: %b\r\n" % (n, b"x" * 8000) for n in range(90)) + b"\r\n"
    async with (
        gated(max_headers=FIELDS) as (url, _),
        sent(
            url, b"GET /api/stream?interval=0.2 HTTP/1.1\r\nHost: localhost\r\n\r\n"
        ) as connection,
    ):
        count = 0
        connection.writer.write(head * 30)
        await asyncio.sleep(1)
        assert connection.writer.transport.get_write_buffer_size() > 15 * len(head)
        while count < 30:
            count += (await connection.reader.readuntil(b"}")).count(b"healthy")


async def test_no_http_is_told_so_at_once(guarded: Server) -> None:
    for data in (b"\x16\x03\x01\x02\x00\x01", b"GET /health HTTP/1.0\n\n", b"get / x\r\n\r\n"):
        began = time.monotonic()
        assert b" 400 " in await seen(guarded.url, data)
        assert time.monotonic() - began < 0.9


async def test_a_head_that_is_too_large(guarded: Server) -> None:
    """431 for too many headers and for too many bytes, in the one error body; one less is taken."""
    for count in (FIELDS - 2, FIELDS - 1):
        fields = b"".join(b"X-%d: %d\r\n" % (n, n) for n in range(count))
        told = await seen(guarded.url, HEAD + fields + b"Connection: close\r\n\r\n")
        assert told.startswith(b"HTTP/1.1 %d " % (200 if count == FIELDS - 2 else 431))
    for fields in (b"X: %b\r\n\r\n", b"X: %b"):
        async with sent(guarded.url, HEAD + fields % (b"x" * HEAD_BYTES)) as connection:
            top = await connection.reader.readuntil(b"\r\n\r\n")
            assert top.startswith(b"HTTP/1.1 431 ")
            error = json.loads(await connection.leftover())["error"]
            assert error["code"] == "header_too_large" and error["request_id"].encode() in top


async def test_the_lobby_has_room_for_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has all to say gets in, and one who has waited for long makes room for one who comes."""
    async with gated(room=3) as (url, gate), AsyncExitStack() as stack:
        silent = [await stack.enter_async_context(sent(url, b"GET ")) for _ in range(3)]
        await until(lambda: len(gate.lobby) == 3)
        assert b" 200 " in await seen(url, HEAD + b"Connection: close\r\n\r\n")
        assert len(gate.lobby) == 3  # who knows what is on its way?
        monkeypatch.setattr("handlers.gate.GRACE", 0.0)
        monkeypatch.setattr("handlers.gate.TURNS", 0)
        assert b" 200 " in await seen(url, HEAD + b"Connection: close\r\n\r\n")
        assert await silent[0].leftover() == b"" and len(gate.lobby) == 2
        for each in silent[1:]:
            each.writer.write(HEAD[4:] + b"Connection: close\r\n\r\n")
            assert b" 200 " in await each.leftover()
        assert not len(gate.lobby)


async def test_so_many_may_send_a_part_of_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is kept. Who says nothing takes no such place."""
    monkeypatch.setattr("handlers.gate.BEGUN", 2)
    async with gated() as (url, gate), AsyncExitStack() as stack:
        parts = b"GET ", b"GET ", b"", b"GET "
        waiting = [await stack.enter_async_context(sent(url, part)) for part in parts]
        assert await waiting[0].leftover() == b"" and len(gate.lobby) == 3


def test_a_crowd_connects_and_then_asks(server: StartServer) -> None:
    """As load generators do: nobody is cut for what they did not say yet, or was not read yet."""
    at = urlsplit(server().url)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as stack:
        crowd = [
            stack.enter_context(socket.create_connection((at.hostname, at.port or 0)))
            for _ in range(2000)
        ]
        for each in crowd:
            each.sendall(HEAD + b"\r\n")
        for each in crowd:
            assert each.recv(65536).startswith(b"HTTP/1.1 200 ")


async def test_a_gate_that_is_closed() -> None:
    """Who waits is cut, and nobody comes."""
    async with gated() as (url, gate), sent(url, b"GET ") as waits:
        await until(lambda: len(gate.lobby))
        gate.close()
        with suppress(ConnectionResetError):
            assert await waits.leftover() == b""
        with pytest.raises(ConnectionRefusedError):
            await connect(url).__aenter__()


async def test_there_are_never_more_connections_than_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without a file left could not even refuse."""
    async with gated() as (_, gate):
        assert gate.most == Config().limits.connections or gate.most < 50_000
    for files, most in ((100, 76), (4096, 3072), (20_000, 15_000)):
        monkeypatch.setattr("resource.getrlimit", lambda kind, files=files: (files, files))
        async with gated(Config(limits=Limits(connections=0))) as (_, gate):
            assert gate.most == most and gate.most + gate.room <= files


# --- bodies -------------------------------------------------------------------------------------


async def test_a_body_that_does_not_come(guarded: Server) -> None:
    """408 after `body_timeout`, and the connection is closed; also where it comes byte by byte."""
    start = b"POST /stream HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9001\r\n\r\n"

    async def send(data: bytes) -> None:
        told: list[bytes] = []
        async with sent(guarded.url, start) as connection:
            assert 0.9 < await lasts(connection, data, told) < 20
        assert told[0].startswith(b"HTTP/1.1 408 ") and b"Connection: close" in told[0]
        assert b'"code":"body_timeout"' in b"".join(told)

    await asyncio.gather(send(b""), send(b"x" * 9000))


async def test_a_body_without_an_end(guarded: Server) -> None:
    """413 as soon as it is too large, and the connection is closed."""
    async with sent(
        guarded.url,
        b"POST /stream HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
    ) as connection:
        with suppress(ConnectionError):
            for _ in range(100):
                connection.writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                await connection.writer.drain()
        assert (await connection.reader.readuntil(b"\r\n")).split()[1] == b"413"


async def test_all_bodies_share_a_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is too much for it is told 503; what was given up, or is there whole, counts no more."""
    monkeypatch.setattr(reading, "BODIES", 10_000)
    config = Config(limits=Limits(body_bytes=8000))
    start = b"POST /api/v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 7000\r\n\r\n"
    async with gated(config) as (url, _):
        async with sent(url, start + b" " * 6000), sent(url, start + b" " * 6000) as second:
            async with asyncio.timeout(10):
                answer = await second.reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1" in answer
        for _ in range(3):
            async with sent(url, start + b" " * 7000) as whole:
                assert b" 400 " in await whole.reader.readuntil(b"\r\n")  # it is no JSON


# --- more connections than there may be ---------------------------------------------------------


@asynccontextmanager
async def full(server: Server) -> AsyncIterator[list[Follower]]:
    """Every connection is taken, by WebSockets and streams."""
    async with AsyncExitStack() as stack:
        kinds = [("ws", "sse", "ndjson")[n % 3] for n in range(FEW)]
        room = [joined(server.url, "crowded", f"p{n}", kind) for n, kind in enumerate(kinds)]
        yield [await stack.enter_async_context(each) for each in room]


async def refused(answer: Answer) -> str:
    """The code of a refusal, which says when to come back."""
    assert answer.status == 503 and int(answer.headers["retry-after"]) > 0
    assert answer.headers["cache-control"] == "no-store"
    error = (await answer.json())["error"]
    assert error["request_id"] == answer.headers["x-request-id"]
    return str(error["code"])


async def test_one_too_many(guarded: Server) -> None:
    """503 at once, whoever asks and for what, in OpenAI's words under `/v1/`; those who are in hear
    on, and one who goes makes room.
    """
    url = guarded.url
    async with full(guarded) as people:
        for path in (EVENTS, "/nowhere"):
            async with ask("GET", url + path, headers={"X-Request-Id": "mine"}) as answer:
                assert await refused(answer) == "overloaded"
                assert answer.headers["x-request-id"] == "mine"
        async with ask("POST", url + "/stream", json_body={"prompt": "x" * (MB // 2)}) as answer:
            assert await refused(answer) == "overloaded"  # and not reset
        async with ask("POST", url + "/v1/chat/completions", json_body={}) as answer:
            said = await answer.json()
            assert (said["error"]["type"], said["error"]["code"]) == ("server_error", "overloaded")
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade"}
        async with ask("GET", f"{url}/ws/crowded", headers=upgrade) as answer:
            assert await refused(answer) == "overloaded"
        origin = {"Origin": "http://localhost:3000"}
        async with ask("GET", url + EVENTS, headers=origin) as answer:
            assert answer.headers["access-control-allow-origin"] == origin["Origin"]
        async with ask("GET", url + EVENTS, headers={"Origin": "http://other"}) as answer:
            assert "access-control-allow-origin" not in answer.headers
        people[0].cut()
        await until_served(url)
        said = []
        async with asyncio.timeout(30):
            while not said or said[-1][0] != 201:
                said.append(await publish(url, "crowded", {"content": "still there?"}))
        await asyncio.gather(*(each.hear("message") for each in people[1:]))


async def until_served(url: str) -> None:
    """Returns once a request is answered."""
    async with asyncio.timeout(30):
        while (await request(url, "GET", "/api/heartbeat"))[0] != 200:
            pass


async def test_an_event_source_is_told_to_come_back(guarded: Server) -> None:
    """It would stop for good at a 503. Not one that comes for the first time."""
    async with full(guarded):
        accept = {"Accept": "text/event-stream"}
        for path, headers in (
            (EVENTS, {"Last-Event-ID": "x-1"}),
            (f"{EVENTS}?a=b&last_event_id=x-1", {}),
        ):
            waits = set()
            for _ in range(5):
                async with ask("GET", guarded.url + path, headers=accept | headers) as answer:
                    parser = Sse()
                    assert (answer.status, await answer.read(parser)) == (200, [])
                    assert (answer.ended, answer.headers["content-type"]) == (
                        "end",
                        "text/event-stream",
                    )
                    assert parser.retry is not None and 5000 <= parser.retry <= 10_000
                    waits.add(parser.retry)
            assert len(waits) > 1
        async with ask("GET", guarded.url + EVENTS, headers=accept) as answer:
            assert await refused(answer) == "overloaded"


async def test_a_full_server_says_how_it_is(guarded: Server) -> None:
    """Again and again; who asks that may not stay."""
    async with full(guarded):
        for _ in range(20):
            for path in ("/health", "/ready", "/metrics"):
                async with ask("GET", guarded.url + path, keep_alive=True) as answer:
                    assert answer.status == 200
                    await answer.body()
                    assert await answer.connection.leftover() == b""
        assert (await scrape(guarded.url))['rivulet_connections{transport="websocket"}'] > 0
