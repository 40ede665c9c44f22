"""Redis has a bad day: what was acknowledged is delivered or a `gap` says so, answers go on,
`/ready` tells the truth within 10 s, and when it is over, it is over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.bridged import Day, Instances, messages, ready, tells
from tests.clients import PROMPT, Kind, Seen, asked, attach, named, see, start, stop
from tests.conftest import SOAK
from tests.people import following, joined, members, new_room, publish
from tests.processes import until
from tests.redis_server import RedisServer
from tests.upstream import expected

CHAT, CONTENT, NATIVE = Kind("chat"), Kind("content"), Kind("native", "ndjson")
AWAY = 10.0 if SOAK else 3.0  # seconds that Redis is away
StartRedis = Callable[..., RedisServer]
StartInstances = Callable[..., Any]
StartWire = Callable[[RedisServer], Any]


class Answering:
    """An answer that runs through the bad day on the first instance. slowest: seconds between two
    pieces of it, as somebody saw who read it there.
    """

    def __init__(self, instances: Instances, seconds: float) -> None:
        self.instances, self.slowest = instances, 0.0
        self.model = named(f"tokens={int(50 * seconds)},rate=50")
        self.stream_id = ""

    async def read_here(self) -> str:
        parts, last = [], time.monotonic()
        async with asked(self.instances.a, NATIVE, self.model) as answer:
            self.stream_id = answer.headers["x-stream-id"]
            async for piece in answer.pieces():
                self.slowest = max(self.slowest, time.monotonic() - last)
                last = time.monotonic()
                parts.append(piece)
        lines = b"".join(parts).decode().splitlines()
        assert '"type":"finished"' in lines[-1], lines[-1]
        return str((await attach(self.instances.a, self.stream_id, CHAT)).text)

    async def read_elsewhere(self) -> Seen:
        await until(lambda: self.stream_id)
        return await attach(self.instances.b, self.stream_id, CHAT)


@asynccontextmanager
async def answering(instances: Instances, seconds: float) -> AsyncIterator[Answering]:
    """An answer that takes so long, and after the bad day is whole, for those who read it where it
    is made, without a pause, and for those who read it elsewhere, and has one end.
    """
    answer = Answering(instances, seconds)
    here = asyncio.create_task(answer.read_here())
    there = asyncio.create_task(answer.read_elsewhere())
    try:
        await until(lambda: answer.stream_id)
        await asyncio.sleep(0.3)
        yield answer
        text, seen = await asyncio.gather(here, there)
    finally:
        here.cancel(), there.cancel()
    assert text == expected(answer.model, PROMPT)
    assert (seen.ending, seen.text) == ("finished", text)
    assert answer.slowest < 1.5
    again = await attach(instances.b, answer.stream_id, CHAT)
    assert (again.ending, again.text) == ("finished", text)


async def works(instances: Instances) -> None:
    """All is well again: people on any instance hear and stop what happens on any other."""
    await tells(True, *instances.urls)
    room = new_room()
    for url in instances.urls:
        async with joined(url, room, "ann") as ann:
            for other in instances.urls:
                status, told = await publish(other, room, {"content": other})
                assert status == 201, told
                assert (await ann.hear("message", content=other))["id"] == told["id"]
                model = named("tokens=5000,rate=50")
                async with asked(other, CHAT, model) as answer:
                    assert (await stop(url, answer.headers["x-stream-id"])).status == 200
                    assert (await see(CHAT, answer)).ending == "cancelled"
    assert instances.broke() == []


async def test_every_connection_is_killed(
    redis_server: StartRedis, instances: StartInstances
) -> None:
    """`CLIENT KILL`, again and again: nobody misses anything, and no gap is needed."""
    redis = redis_server()
    three = await instances(redis.url, 3)
    async with Day(three.urls) as day:
        async with answering(three, 4):
            for _ in range(5):
                redis.cut_all()
                await asyncio.sleep(0.4)
        await tells(True, *three.urls)
        await day.ends(gaps=False)
    await works(three)


@pytest.mark.parametrize("data", ["kept", "lost"])
async def test_redis_is_stopped_and_started(
    redis_server: StartRedis, instances: StartInstances, data: str
) -> None:
    """With its data or without: it may have lost what it acknowledged, so all are told of a gap.
    Meanwhile who publishes is told 503, and what is known here is served: a room that is held, its
    history, who is in it.
    """
    redis = redis_server(appendonly="yes", appendfsync="always")
    three = await instances(redis.url, 3)
    async with Day(three.urls) as day:
        async with answering(three, AWAY + 5):
            redis.stop()
            await tells(False, *three.urls)
            await asyncio.sleep(AWAY)
            status, told = await publish(three.b, day.room, {"content": "x"})
            assert (status, told["error"]["code"]) == (503, "bridge_unavailable")
            async with following(three.b, day.room) as ann:
                known = (await ann.next())["messages"]
                assert known and await messages(three.b, day.room)
                assert "anonymous" in await members(three.b, day.room)
            # A new answer needs no Redis, unless it is in a room.
            assert (await start(three.c, CONTENT, named("tokens=5"))).ending == "finished"
            refused = await start(three.c, CHAT, named("tokens=5"), room=day.room)
            assert (refused.status, refused.code) == (503, "bridge_unavailable")
            if data == "lost":
                redis.forget()
            redis.start()
            await tells(True, *three.urls)
        await day.ends(gaps=True)
    assert day.refused
    await works(three)


@pytest.mark.parametrize("seconds", [2.5, 6.0])
async def test_redis_is_frozen(
    redis_server: StartRedis, instances: StartInstances, seconds: float
) -> None:
    """Its connections stand and nothing comes, for longer than a lease: no answer is taken for
    lost, and nobody misses anything.
    """
    redis = redis_server()
    three = await instances(redis.url, 3)
    async with Day(three.urls) as day:
        async with answering(three, seconds + 4):
            redis.freeze()
            await asyncio.sleep(seconds)
            if seconds > 5:
                await tells(False, *three.urls)
            redis.thaw()
            await tells(True, *three.urls)
        await day.ends(gaps=False)
    await works(three)


async def test_memory_is_full(redis_server: StartRedis, instances: StartInstances) -> None:
    """Publishes are refused with 503; answers go on; once there is room, all is as before."""
    redis = redis_server()
    three = await instances(redis.url, 3)
    async with Day(three.urls) as day:
        async with answering(three, AWAY + 4):
            redis.call("CONFIG", "SET", "maxmemory", "1")
            await asyncio.sleep(AWAY)
            status, told = await publish(three.b, day.room, {"content": "x"})
            assert (status, told["error"]["code"]) == (503, "bridge_unavailable")
            assert (await start(three.c, CONTENT, named("tokens=5"))).ending == "finished"
            await tells(False, *three.urls)
            redis.call("CONFIG", "SET", "maxmemory", "0")
        await day.ends(gaps=False)
    await works(three)


async def test_a_slow_link(
    redis_server: StartRedis, instances: StartInstances, wire: StartWire
) -> None:
    """One instance is far from Redis: it is later than others, and otherwise like them."""
    redis = redis_server()
    slow = await wire(redis)
    three = await instances(redis.url, 2)
    await three.add(url=slow.url)
    slow.delay = 0.1
    async with Day(three.urls) as day:
        async with answering(three, 3) as answer:
            seen = await attach(three.c, answer.stream_id, CHAT)
            assert (seen.ending, seen.text) == ("finished", expected(answer.model, PROMPT))
            await tells(True, three.c)  # its lease is so short that it is late now and then
        await day.ends(gaps=False)
    await works(three)


async def test_a_deaf_subscriber(
    redis_server: StartRedis, instances: StartInstances, wire: StartWire
) -> None:
    """Its subscription stands and nothing comes through it: `/ready` says so; when it hears again
    it has all that it missed.
    """
    redis = redis_server()
    deaf = await wire(redis)
    three = await instances(redis.url, 2)
    await three.add(url=deaf.url)
    async with Day(three.urls) as day:
        deaf.deaf = True
        took = await tells(False, three.c)
        print(f"deafness showed after {took:.1f} s")
        assert await ready(three.a)
        await day.passes(20)
        deaf.deaf = False
        await tells(True, three.c)
        await day.ends(gaps=False)
    await works(three)


async def test_scripts_are_flushed(redis_server: StartRedis, instances: StartInstances) -> None:
    """`SCRIPT FLUSH` is not noticed by anybody."""
    redis = redis_server()
    three = await instances(redis.url, 3)
    async with Day(three.urls) as day:
        async with answering(three, 2):
            for _ in range(10):
                redis.call("SCRIPT", "FLUSH")
                await asyncio.sleep(0.1)
        await day.ends(gaps=False)
    assert day.refused == []
    await works(three)


async def test_older_data_come_back(redis_server: StartRedis, instances: StartInstances) -> None:
    """As in a failover to a replica that lags: offsets go back, and are given again to others. All
    are told of a gap, and no position of before is taken for one of now. An answer that runs has
    one text and one end all the same.
    """
    redis = redis_server()
    three = await instances(redis.url, 3)
    async with Day(three.urls) as day:
        async with answering(three, 4):
            redis.call("SAVE")
            ended = await start(three.a, CHAT, named("tokens=5"))
            await day.passes(30)
            redis.kill()
            await tells(False, *three.urls)
            redis.start()
            await tells(True, *three.urls)
        # What has ended since is still had where it was made.
        seen = await attach(three.a, ended.stream_id, CHAT)
        assert (seen.ending, seen.text) == ("finished", ended.text)
        await day.ends(gaps=True)
    await works(three)
