"""A feed: the live sinks of one log, written to together."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import pytest
from aiohttp.base_protocol import BaseProtocol

from streaming import delivery
from streaming.config import Delivery as Config
from streaming.config import Rooms
from streaming.delivery import Delivery, Sink
from streaming.dialects import NATIVE
from streaming.encoders import NDJSON, WEBSOCKET, encoder
from streaming.frames import ROOMS
from streaming.log import Cursor, Log
from streaming.room import Room
from streaming.sockets import SocketProtocol, SocketSink
from tests.processes import until


class Slow(asyncio.Transport):
    """A transport whose writes take a while, as those to a thousand readers do together."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.writes: list[bytes] = []

    def write(self, data: Any) -> None:
        time.sleep(self.seconds)
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


class Protocol:
    writing_paused = False


def live(log: Log, transport: Slow, shared: Delivery | None = None) -> Sink:
    """A sink that is live on this log."""
    protocol = cast(BaseProtocol, Protocol())
    shared = shared or Delivery(Config())
    sink = Sink(shared, transport, protocol, encoder(NATIVE, NDJSON), False)
    sink.cursors[log] = Cursor(log, log.top)
    sink.join()
    return sink


async def say(log: Log, times: int) -> None:
    """So many events, each in a turn of the loop of its own."""
    for _ in range(times):
        log.append("message", {})
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def written(transport: Slow, count: int) -> list[int]:
    """How many events each write had, once there are so many of them."""
    await until(lambda: sum(data.count(b"\n") for data in transport.writes) >= count)
    return [data.count(b"\n") for data in transport.writes]


async def test_what_comes_in_one_turn_goes_out_in_one_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what comes in the next in another."""
    monkeypatch.setattr(delivery, "REST_AFTER", 60.0)  # no write takes long, on a busy machine too
    log, transport = Log({"stream_id": "g"}), Slow(0)
    sink = live(log, transport)
    log.append("message", {})
    log.append("message", {})
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await say(log, 2)
    assert await written(transport, 4) == [2, 1, 1]
    sink.leave()


async def test_a_room_that_takes_long_to_write_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It rests as long as the last write took, and what comes meanwhile goes out together: a busy
    room of thousands leaves time to others, and writes less often.
    """
    monkeypatch.setattr(delivery, "REST_MOST", 60.0)
    monkeypatch.setattr(delivery, "REST_AFTER", 0.2)
    log, transport = Log({"stream_id": "g"}), Slow(0.3)
    sink = live(log, transport)
    await say(log, 1)
    begun = time.monotonic()
    transport.seconds = 0
    await say(log, 5)
    assert await written(transport, 6) == [1, 5]
    assert time.monotonic() - begun > 0.2
    await say(log, 2)
    assert await written(transport, 8) == [1, 5, 1, 1]  # that write was quick
    sink.leave()


async def test_the_rest_is_bounded() -> None:
    """However long a write took, what comes after it waits for a moment only."""
    log, transport = Log({"stream_id": "g"}), Slow(delivery.REST_MOST * 20)
    sink = live(log, transport)
    await say(log, 1)
    begun = time.monotonic()
    transport.seconds = 0
    await say(log, 1)
    await written(transport, 2)
    assert time.monotonic() - begun < delivery.REST_MOST * 15
    sink.leave()


class Taking(Slow):
    """A transport whose client takes what was written when it is told to."""

    protocol: SocketProtocol

    def __init__(self) -> None:
        super().__init__(0)
        self.held = 0

    def write(self, data: Any) -> None:
        super().write(data)
        self.held += len(data)
        if self.held > Config().high_water and not self.protocol.writing_paused:
            self.protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return self.held

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return name == "sslcontext" or None  # so that it is not written past

    async def take(self) -> None:
        self.held = 0
        if self.protocol.writing_paused:
            self.protocol.resume_writing()
        for _ in range(5):
            await asyncio.sleep(0)


async def test_a_crowd_larger_than_the_high_water_mark_is_told_once() -> None:
    """To a slow reader who has caught up: its socket is full with that, and it is live."""
    room, transport = Room("r", Rooms(), messages=1), Taking()
    protocol = transport.protocol = SocketProtocol(asyncio.get_running_loop(), 1000, False)
    sink = SocketSink(Delivery(Config()), transport, protocol, encoder(ROOMS, WEBSOCKET))
    sink.follow(room.join(None)[0])
    room.people |= {f"{number:0128}": 1 for number in range(1000)}
    room.append("message", {"user_id": "u", "content": "x" * Config().high_water})
    await until(lambda: protocol.writing_paused)
    for _ in range(5):
        await transport.take()
    room.append("message", {"user_id": "u", "content": "new"})
    await until(lambda: b'"new"' in transport.writes[-1])
    assert sum(b'"type":"presence"' in data for data in transport.writes) == 1
    sink.gone()
