"""SIGTERM with people in rooms: everybody is told to come back, and not all at once."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time

import aiohttp
import pytest
from aiohttp import ClientSession, WSMsgType

from tests.conftest import SOAK, StartServer
from tests.processes import Server, until
from tests.raw_socket import CLOSE, RawSocket, dialled
from tests.readers import Answer, Sse, ask

COUNT = 500 if SOAK else 60
WINDOW = 3.0
RESTART = 1012


def terminate(server: Server) -> float:
    """Sends SIGTERM; when."""
    server.child.send_signal(signal.SIGTERM)
    return time.monotonic()


async def closing(socket: aiohttp.ClientWebSocketResponse) -> tuple[float, int | None]:
    """When the server closes, and with which code."""
    while (received := await socket.receive()).type is WSMsgType.TEXT:
        pass
    assert received.type is WSMsgType.CLOSE
    return time.monotonic(), socket.close_code


async def exit_of(server: Server) -> float:
    """When the server is gone."""
    assert await until(lambda: server.child.poll() is not None) is True
    assert server.child.returncode == 0
    return time.monotonic()


async def test_sockets_are_closed_over_the_window(server: StartServer, http: ClientSession) -> None:
    """Each with 1012; so that they do not all come back at once, at times that fill the window."""
    process = server(server={"drain": WINDOW})
    paths = ("/ws/room", "/echo")
    urls = [f"{process.url}{paths[i % 10 == 9]}?user_id=u{i}" for i in range(COUNT)]
    sockets = await asyncio.gather(*(http.ws_connect(url) for url in urls))
    closed = [asyncio.create_task(closing(socket)) for socket in sockets]
    start = terminate(process)
    found = await asyncio.gather(*closed)
    assert {code for _, code in found} == {RESTART}
    times = sorted(when - start for when, _ in found)
    assert times[-1] < WINDOW + 1.5
    quarters = [sum(i <= 4 * when / WINDOW < i + 1 for when in times) for i in range(4)]
    assert all(count > COUNT / 12 for count in quarters), quarters
    assert await exit_of(process) < start + WINDOW + 3


async def test_without_sockets_nothing_is_waited_for(server: StartServer) -> None:
    """The window is for those who are there; one that leaves early is not waited for either."""
    process = server(server={"drain": 60.0})
    async with dialled(process.url, "/ws/room") as socket:
        await socket.hear("joined")
    await until(lambda: process.log_lines("request"))
    start = terminate(process)
    assert await exit_of(process) < start + 5


async def test_a_socket_that_leaves_by_itself_ends_the_wait(
    server: StartServer, http: ClientSession
) -> None:
    """The server goes when the last one has gone."""
    process = server(server={"drain": 600.0})
    socket = await http.ws_connect(f"{process.url}/ws/room")
    start = terminate(process)
    await until(lambda: process.log_lines("draining"))
    await socket.close()
    assert await exit_of(process) < start + 5


async def test_a_socket_is_served_until_its_close(server: StartServer, http: ClientSession) -> None:
    """Until it is closed it is in its rooms: what it says in the window is taken and told."""
    process = server(server={"drain": WINDOW})
    urls = [f"{process.url}/ws/room?user_id=u{i}" for i in range(10)]
    sockets = [await http.ws_connect(url) for url in urls]
    for socket in sockets:
        assert (await socket.receive_json())["type"] == "joined"
    terminate(process)
    await until(lambda: process.log_lines("draining"))
    said: list[str] = []
    heard: list[list[str]] = [[] for _ in sockets]

    async def talk() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                said.append(f"word {len(said)}")
                await sockets[0].send_json({"content": said[-1]})
                await asyncio.sleep(0.01)

    async def listen(socket: aiohttp.ClientWebSocketResponse, words: list[str]) -> int | None:
        async for received in socket:
            told = received.json()
            words += [told["content"]] if told["type"] == "message" else []
        return socket.close_code

    talking = asyncio.create_task(talk())
    codes = await asyncio.gather(*map(listen, sockets, heard))
    await talking
    assert set(codes) == {RESTART}
    assert all(words == said[: len(words)] for words in heard)
    assert max(map(len, heard)) > 10


async def test_a_socket_that_reads_nothing_holds_nobody_up(server: StartServer) -> None:
    """It is cut at the end of the window, whatever is still on its way to it."""
    process = server(server={"drain": 1.0}, rooms={"bytes": 2**30})
    async with dialled(process.url, "/ws/room", receive_buffer=2048) as socket:
        path = f"{process.url}/api/v1/rooms/room/messages"
        words = [{"content": "x" * 1000} for _ in range(100)]
        for _ in range(20):
            async with ask("POST", path, json_body=words) as answer:
                assert answer.status == 201
        start = terminate(process)
        assert await exit_of(process) < start + 10
        assert socket.writer is not None


async def someone_in(server: Server) -> None:
    """Waits until the room has somebody in it."""
    members: list[str] = []
    while not members:
        async with ask("GET", f"{server.url}/api/v1/rooms/room/presence") as answer:
            members = (await answer.json())["members"]


async def room_stream(server: Server, accept: str) -> tuple[Answer, bytes, float]:
    """Follows a room until the stream ends: its body, and when."""
    path = f"{server.url}/api/v1/rooms/room/events"
    async with ask("GET", path, headers={"Accept": accept}, keep_alive=True) as answer:
        body = await answer.body()
        return answer, body, time.monotonic()


async def test_room_streams_are_told_when_to_come_back(server: StartServer) -> None:
    """An SSE stream gets a `retry:` of its own, up to the window, and is cut: it must not look as
    if the room had ended.
    """
    process = server(server={"drain": WINDOW})
    streams = [asyncio.create_task(room_stream(process, "text/event-stream")) for _ in range(COUNT)]
    await until(lambda: process.files() > COUNT)
    await someone_in(process)
    await asyncio.sleep(0.5)  # and everybody else
    start = terminate(process)
    waits: list[int] = []
    for stream in streams:
        answer, body, ended = await stream
        assert answer.ended == "cut"
        assert ended < start + WINDOW + 3
        parser = Sse()
        assert next(message.event for message in parser.feed(body)) == "joined"
        assert parser.retry is not None and body.endswith(b"\n\n")
        waits.append(parser.retry)
    assert len(set(waits)) > COUNT * 0.9
    assert min(waits) < WINDOW * 250 and WINDOW * 750 < max(waits) <= WINDOW * 1000
    await exit_of(process)


@pytest.mark.parametrize("accept", ["application/x-ndjson"])
async def test_a_room_stream_without_retry_is_cut_too(server: StartServer, accept: str) -> None:
    """NDJSON has no word for it: whole lines, and no end that looks like one."""
    process = server(server={"drain": 0.5})
    stream = asyncio.create_task(room_stream(process, accept))
    await someone_in(process)
    terminate(process)
    answer, body, _ = await stream
    assert answer.ended == "cut"
    assert body.startswith(b'{"type":"joined"') and body.endswith(b"}\n")
    await exit_of(process)


async def test_the_close_frame_says_why(server: StartServer) -> None:
    """For people who look at it."""
    process = server(server={"drain": 0.2})
    async with dialled(process.url, "/ws/room") as socket:
        await socket.hear("joined")
        terminate(process)
        found = await last(socket)
    assert found == "restarting: come back"
    await exit_of(process)


async def last(socket: RawSocket) -> str:
    """The reason in the close frame."""
    while (found := await socket.receive()) is not None:
        if found.opcode == CLOSE:
            assert found.code == RESTART
            return found.payload[2:].decode()
    raise EOFError("no close frame")
