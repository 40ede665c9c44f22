"""WebSocket pings with a deadline: whose peer is dead is gone in one and a half heartbeats."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import aiohttp
import pytest

from tests.processes import Server, until
from tests.raw_socket import PING, PONG, TEXT, RawSocket, dialled, frame

HEARTBEAT = 1.0
SLACK = 1.0  # seconds that a busy machine may be late


@pytest.fixture(scope="module")
def beating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with short heartbeats, which tells at once who has gone."""
    config = {
        "delivery": {"heartbeat": HEARTBEAT, "write_timeout": 3.0},
        "rooms": {"grace": 0.0},
    }
    process = Server(tmp_path_factory.mktemp("beating"), config)
    yield process
    process.stop()


async def life(socket: RawSocket) -> tuple[float, float]:
    """Seconds from now to the first ping, and to the end, of a peer that answers none."""
    start, pinged = time.monotonic(), 0.0
    while (found := await socket.receive()) is not None:
        if found.opcode == PING and not pinged:
            pinged = time.monotonic() - start
    return pinged, time.monotonic() - start


async def test_a_dead_peer_is_gone_in_one_and_a_half_heartbeats(beating: Server) -> None:
    """One that answers no ping is pinged after one heartbeat, and cut half of one later."""
    async with dialled(beating.url, "/ws/quiet") as socket:
        pinged, ended = await life(socket)
    assert HEARTBEAT - 0.1 < pinged < HEARTBEAT + SLACK
    assert 1.5 * HEARTBEAT - 0.1 < ended < 1.5 * HEARTBEAT + SLACK


async def test_the_deadline_counts_from_the_last_word(beating: Server) -> None:
    """Whenever a client falls silent, between two beats too."""
    async with dialled(beating.url, "/ws/talk") as socket:
        for _ in range(2):
            await asyncio.sleep(0.7 * HEARTBEAT)
            await socket.say(type="ping")
        pinged, ended = await life(socket)
    assert HEARTBEAT - 0.1 < pinged < HEARTBEAT + SLACK
    assert 1.5 * HEARTBEAT - 0.1 < ended < 1.5 * HEARTBEAT + SLACK


async def test_a_dead_peer_in_a_busy_room_is_gone_too(
    beating: Server, http: aiohttp.ClientSession
) -> None:
    """What is written to it, and taken by its kernel, is no sign of life."""

    async def publish() -> None:
        while True:
            url = f"{beating.url}/api/v1/rooms/busy/messages"
            await (await http.post(url, json={"content": "word"})).release()
            await asyncio.sleep(0.02)

    publishing = asyncio.create_task(publish())
    async with dialled(beating.url, "/ws/busy") as socket:
        _, ended = await life(socket)
    publishing.cancel()
    assert ended < 2 * HEARTBEAT + SLACK


async def test_others_are_told_that_a_dead_peer_left(
    beating: Server, http: aiohttp.ClientSession
) -> None:
    """Presence is exact after a client that crashed without a word."""
    async with (
        http.ws_connect(f"{beating.url}/ws/watched?user_id=ann") as ann,
        dialled(beating.url, "/ws/watched?user_id=bob"),
    ):
        told: list[str] = []
        while "user_left" not in told:
            frame = await ann.receive_json()
            told.append(frame["type"])
        assert frame["userId"] == "bob"
        async with http.get(f"{beating.url}/api/v1/rooms/watched/presence") as answer:
            assert (await answer.json())["members"] == ["ann"]


async def test_a_living_peer_stays(beating: Server, http: aiohttp.ClientSession) -> None:
    """One that answers pings and says nothing else, for many heartbeats."""
    async with http.ws_connect(f"{beating.url}/ws/living") as socket:
        assert (await socket.receive_json())["type"] == "joined"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3 * HEARTBEAT):
                await socket.receive()  # answers pings, and goes on
        await socket.send_json({"type": "ping"})
        assert (await socket.receive_json()) == {"type": "pong"}


async def test_a_clients_ping_is_answered(beating: Server) -> None:
    """With its payload, once each, in order, before, between and after fragments of a frame."""
    async with dialled(beating.url, "/ws/pinged") as socket:
        assert (await socket.hear("joined"))["room"] == "pinged"
        ping = b'{"type":"ping","ref":7}'
        await socket.send(frame(PING), frame(TEXT, ping[:9], fin=False), frame(PING, b"between"))
        await socket.send(frame(0, ping[9:]), frame(PING, b"\xff" * 125), frame(PONG, b"unasked"))
        for payload in (b"", b"between"):
            assert await socket.receive() == (PONG, payload, True, 0)
        assert await socket.hear("pong") == {"type": "pong", "ref": 7}
        assert await socket.receive() == (PONG, b"\xff" * 125, True, 0)


async def test_pings_of_the_client_are_signs_of_life(beating: Server) -> None:
    """It need not answer ours then."""
    async with dialled(beating.url, "/ws/pinging") as socket:
        heard = asyncio.create_task(life(socket))
        for _ in range(6):
            await asyncio.sleep(0.4 * HEARTBEAT)
            await socket.send(frame(PING))
        assert not heard.done()
        heard.cancel()


async def test_the_dead_leave_nothing_behind(beating: Server) -> None:
    """No file stays open for any of them."""
    before = beating.files()
    sockets = [dialled(beating.url, f"/ws/dead{i}") for i in range(50)]
    for socket in sockets:
        await socket.__aenter__()
    assert beating.files() > before
    await until(lambda: beating.files() <= before)
    for socket in sockets:
        await socket.__aexit__(None, None, None)
