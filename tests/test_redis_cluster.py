"""Instances on a Redis Cluster: each room is on one node, and slots move, and nodes die."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streaming.publisher import Publisher
from tests.bridged import Day, Instances, here, messages, ready, tells
from tests.clients import PROMPT, Kind, asked, attach, named, see, start, stop
from tests.people import joined, new_room, publish
from tests.redis_cluster import RedisCluster
from tests.redis_server import RedisServer
from tests.test_channels import publish as tell
from tests.test_channels import reading
from tests.test_publisher import heard
from tests.upstream import expected

CHAT, CONTENT = Kind("chat"), Kind("content")
StartCluster = Callable[..., RedisCluster]
StartInstances = Callable[..., Any]


@pytest.fixture
def redis_cluster(tmp_path: Path) -> Iterator[StartCluster]:
    """Starts a cluster for one test: `redis_cluster(replicas=3)`."""
    started: list[RedisCluster] = []

    def start(**options: Any) -> RedisCluster:
        started.append(RedisCluster(tmp_path / "cluster", **options))
        return started[-1]

    yield start
    for each in started:
        each.stop()


def key(room: str) -> str:
    """The name of a key of this room."""
    return f"rivulet:room:{{{room}}}:meta"


def room_on(cluster: RedisCluster, master: RedisServer) -> str:
    """The name of a room that is there."""
    return next(room for _ in range(1000) if cluster.owner(key(room := new_room())) is master)


async def works(instances: Instances, *rooms: str) -> None:
    """People on any instance hear what any other publishes, and no instance has broken."""
    for room in rooms:
        for url in instances.urls:  # whoever joins before it has looked again is cut, to come back
            assert (await publish(url, room, {"content": "again"}))[0] == 201
        async with contextlib.AsyncExitStack() as stack:
            people = [await stack.enter_async_context(joined(url, room)) for url in instances.urls]
            for url in instances.urls:
                status, told = await publish(url, room, {"content": url})
                assert status == 201, told
                for each in people:
                    assert (await each.hear("message", content=url))["id"] == told["id"]
    assert instances.broke() == []


async def test_rooms_answers_and_people(
    redis_cluster: StartCluster, instances: StartInstances
) -> None:
    """One room on each node, with two writers on different instances: one order for all. Answers
    are read and stopped anywhere, and every instance knows who is here.
    """
    cluster = redis_cluster()
    # One of its nodes is enough to find the others.
    three = await instances(cluster.address(cluster.masters[1]), 3)
    rooms = [room_on(cluster, master) for master in cluster.masters]

    async def write(url: str, room: str, name: str) -> None:
        for number in range(20):
            status, _ = await publish(url, room, {"content": f"{name} {number}"})
            assert status == 201

    for room in rooms:
        async with joined(three.a, room, "ann") as ann, joined(three.b, room, "bob", "sse") as bob:
            await asyncio.gather(*(here(url, room, "ann", "bob") for url in three.urls))
            await asyncio.gather(write(three.a, room, "a"), write(three.c, room, "c"))
            await publish(three.b, room, {"content": "last"})
            told = [await each.until("message", content="last") for each in (ann, bob)]
            said = [[f["id"] for f in frames if f["type"] == "message"] for frames in told]
            assert said[0] == said[1] and len(said[0]) == 41
            answer = await ann.call("generate", message="go", model=named("tokens=5000,rate=50"))
            await bob.hear("stream_chunk")
            assert (await stop(three.c, answer["stream_id"])).status == 200
            ends = [await each.hear("stream_cancelled") for each in (ann, bob)]
            assert ends[0] == ends[1]
        await here(three.c, room)
    for _ in range(6):  # wherever its slot is
        model = named("tokens=5000,rate=50")
        async with asked(three.a, CHAT, model) as answer:
            stream_id = answer.headers["x-stream-id"]
            there = asyncio.create_task(attach(three.b, stream_id, CHAT))
            assert (await stop(three.c, stream_id)).status == 200
            assert (await see(CHAT, answer)).ending == (await there).ending == "cancelled"
    assert all(server.names() for server in cluster.masters)
    assert three.broke() == []


async def test_channels(redis_cluster: StartCluster, instances: StartInstances) -> None:
    """Any process publishes, by `PUBLISH` at any node; instances count who listens."""
    cluster = redis_cluster()
    two = await instances(cluster.url, 2)
    for user in ("ann", "bob{x}", "cyd"):
        async with reading(two.a, user) as one, reading(two.b, user) as other:
            for number, server in enumerate(cluster.masters):
                said = json.dumps({"event": "x", "data": {"n": number}})
                server.call("PUBLISH", f"sse:work:{user}", said)
                for stream in (one, other):
                    assert await heard(stream, 1) == [("x", {"n": number})]
            assert await tell(two.b, user, "x", {}) == 2
            async with Publisher(cluster.url) as publisher:
                assert await publisher.publish(user, "work", "x", {}) == 2
            for stream in (one, other):
                assert await heard(stream, 2) == [("x", {}), ("x", {})]


async def test_a_slot_moves(redis_cluster: StartCluster, instances: StartInstances) -> None:
    """While people talk in its room: all that they said is there, and they are told of a gap:
    the node that has it now cannot know that nothing was lost.
    """
    cluster = redis_cluster()
    three = await instances(cluster.url, 3)
    async with Day(three.urls) as day:
        source = cluster.owner(key(day.room))
        target = next(server for server in cluster.masters if server is not source)
        with cluster.moving(key(day.room), target):
            await asyncio.sleep(0.3)
        assert cluster.owner(key(day.room)) is target
        await day.ends(gaps=True)
    assert day.acked.keys() <= set(await messages(three.a, day.room))
    assert await ready(three.a)
    await works(three, day.room, room_on(cluster, source))


@pytest.mark.parametrize("what", ["the room", "the leases"])
async def test_a_master_is_lost(
    redis_cluster: StartCluster, instances: StartInstances, what: str
) -> None:
    """Its replica takes over: `/ready` says so meanwhile, answers are whole, nobody is taken for
    lost, and who is in its rooms is told of a gap.
    """
    cluster = redis_cluster(replicas=3)
    three = await instances(cluster.url, 3)
    leases = cluster.owner("rivulet:{instance}:x")
    async with Day(three.urls) as day:
        lost = cluster.owner(key(day.room)) if what == "the room" else leases
        model = named("tokens=300,rate=50")
        async with asked(three.a, CHAT, model) as answer:
            there = asyncio.create_task(attach(three.b, answer.headers["x-stream-id"], CHAT))
            await day.passes(20)
            lost.kill()
            await tells(False, *three.urls)
            await tells(True, *three.urls)
            seen = await see(CHAT, answer)
            assert (seen.ending, seen.text) == ("finished", expected(model, PROMPT))
            assert (await there).text == seen.text
        gone = cluster.masters.index(lost)
        await day.ends(gaps=cluster.owner(key(day.room)) is cluster.servers[3 + gone])
    await works(three, day.room, new_room())


async def test_a_node_is_away(redis_cluster: StartCluster, instances: StartInstances) -> None:
    """Without a replica, where the cluster serves the rest: its rooms are refused, others go on,
    `/ready` tells, and when it is back so are they.
    """
    cluster = redis_cluster(**{"cluster-require-full-coverage": "no"})
    two = await instances(cluster.url, 2)
    leases = cluster.owner("rivulet:{instance}:x")
    first, second = (server for server in cluster.masters if server is not leases)
    away, room = room_on(cluster, first), room_on(cluster, second)
    async with joined(two.b, away) as ann, joined(two.b, room) as bob:
        assert (await publish(two.a, away, {"content": "before"}))[0] == 201
        await ann.hear("message")
        first.stop()
        await tells(False, *two.urls)
        status, told = await publish(two.a, away, {"content": "x"})
        assert (status, told["error"]["code"]) == (503, "bridge_unavailable")
        assert (await publish(two.a, room, {"content": "y"}))[0] == 201
        assert (await bob.hear("message"))["content"] == "y"
        assert (await start(two.b, CONTENT, named("tokens=5"))).ending == "finished"
        first.start()
        await tells(True, *two.urls)
    await works(two, away, room)
