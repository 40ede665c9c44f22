"""Where Redis is: at a socket of the machine's own, or where Sentinels say that it is now."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streaming.redis_node import Call, connect, unavailable
from tests.bridged import Day, tells
from tests.clients import Kind, asked, attach, named, see
from tests.people import joined, new_room, publish
from tests.processes import until
from tests.redis_server import RedisServer, Sentinel

CHAT = Kind("chat")
StartRedis = Callable[..., RedisServer]
StartInstances = Callable[..., Any]
StartWire = Callable[[RedisServer], Any]


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[Callable[[RedisServer], Sentinel]]:
    """Starts a Sentinel of this master."""
    started: list[Sentinel] = []

    def start(master: RedisServer) -> Sentinel:
        started.append(Sentinel(tmp_path / "sentinel", master))
        return started[-1]

    yield start
    for each in started:
        each.stop()


async def test_an_answer_may_be_nobodys() -> None:
    """What fails while nobody waits for it is no fault to be logged."""
    said: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: said.append(context))
    Call("", None, ()).answer.set_exception(unavailable())
    await asyncio.sleep(0)
    gc.collect()
    assert not said


async def test_a_unix_socket(
    redis_server: StartRedis, instances: StartInstances, tmp_path: Path
) -> None:
    """One instance comes by it, another over TCP."""
    path = tmp_path / "s"
    redis = redis_server(unixsocket=str(path))
    two = await instances(f"unix://{path}", 1)
    await two.add(url=redis.url)
    room = new_room()
    async with joined(two.a, room, "ann") as ann:
        _, told = await publish(two.b, room, {"content": "hello"})
        assert (await ann.hear("message"))["id"] == told["id"]


async def test_a_database_of_its_own(redis_server: StartRedis, instances: StartInstances) -> None:
    """What others keep in the same Redis is left alone, and under another prefix one is alone."""
    redis = redis_server()
    two = await instances(redis.url, 1)
    other = {"url": redis.url, "prefix": "other:"}
    await two.add(redis=other)
    room = new_room()
    for url in two.urls:
        assert (await publish(url, room, {"content": url}))[0] == 201
        async with joined(url, room) as ann:
            assert (await ann.call("history"))["messages"][0]["content"] == url
    assert {name.partition(":")[0] for name in redis.names()} == {"rivulet", "other"}


async def test_what_sentinels_do_not_know() -> None:
    """The password of the servers, and more, are read as in any other address."""
    url = "rediss+sentinel://ann:p%40ss@here:1,there:2/m/3?ssl_ca_certs=/ca.pem"
    told = connect(url).connection_pool.connection_kwargs
    wanted = {"username": "ann", "password": "p@ss", "db": 3, "ssl_ca_certs": "/ca.pem"}
    assert wanted.items() <= told.items()


async def test_a_failover_to_a_replica_that_lags(
    redis_server: StartRedis,
    instances: StartInstances,
    wire: StartWire,
    sentinel: Callable[[RedisServer], Sentinel],
) -> None:
    """The master dies with what it had not told its replica, which the Sentinel then makes the
    master: all are told of a gap, an answer that runs is whole, and nobody restarts anything.
    """
    master = redis_server()
    between = await wire(master)
    port = between.url.rpartition(":")[2]
    replica = redis_server(replicaof=f"127.0.0.1 {port}")
    await until(lambda: replica.call("INFO", "replication")["master_link_status"] == "up")
    watch = sentinel(master)
    three = await instances(watch.url, 3)
    model = named("tokens=600,rate=50")
    async with Day(three.urls) as day, asked(three.a, CHAT, model) as answer:
        stream_id = answer.headers["x-stream-id"]
        reading = asyncio.create_task(attach(three.b, stream_id, CHAT))
        here = asyncio.create_task(see(CHAT, answer))
        await day.passes(20)
        between.cut()
        await day.passes(30)
        master.kill()
        await tells(False, *three.urls)
        await tells(True, *three.urls)
        seen, told = await asyncio.gather(here, reading)
        assert (seen.ending, seen.text) == (told.ending, told.text)
        assert seen.ending == "finished"
        await day.ends(gaps=True)
    assert three.broke() == []
