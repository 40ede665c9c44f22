"""A feed: the live sinks of one log, written to together."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import pytest
from aiohttp.base_protocol import BaseProtocol

from streaming import delivery
from streaming.config import Delivery as Config
from streaming.delivery import Delivery, Sink
from streaming.dialects import NATIVE
from streaming.encoders import NDJSON, encoder
from streaming.log import Cursor, Log
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


async def test_what_comes_in_one_turn_goes_out_in_one_write() -> None:
    """And what comes in the next in another."""
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
