"""What instances have told Redis is lost, or they never learn that it was heard: no answer is left
without an end, for nobody.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from streaming.redis_scripts import CLAIM, END, PUBLISH
from tests.bridged import kill, messages, tells
from tests.clients import PROMPT, Kind, attach, named, start
from tests.people import following, joined, new_room, publish
from tests.processes import until
from tests.redis_server import RedisServer
from tests.upstream import expected

CHAT = Kind("chat")
StartRedis = Callable[..., RedisServer]
StartInstances = Callable[..., Any]
StartWire = Callable[[RedisServer], Any]


@pytest.mark.parametrize("count", [1, 3])
async def test_the_end_of_an_answer_is_lost(
    redis_server: StartRedis, instances: StartInstances, count: int
) -> None:
    """Redis comes back as it was while the answer ran. Its end is told again, to who follows the
    room, to who comes to it, and to who reads the answer, on any instance.
    """
    redis = redis_server()
    each = await instances(redis.url, count)
    first, other, last = each.urls[0], each.urls[count // 2], each.urls[-1]
    room, model = new_room(), named("tokens=60,rate=50")
    async with joined(other, room, "bob") as bob:
        async with joined(first, room, "ann") as ann:
            stream_id = (await ann.call("generate", message="go", model=model))["stream_id"]
            await bob.hear("stream_chunk")
            redis.call("SAVE")
            await ann.hear("stream_end", stream_id=stream_id)
            await bob.hear("stream_end", stream_id=stream_id)
        redis.kill()
        await tells(False, *each.urls)
        redis.start()
        await tells(True, *each.urls)
    seen = await asyncio.wait_for(attach(last, stream_id, CHAT), 20)
    assert (seen.ending, seen.text) == ("finished", expected(model, "go"))
    for url in each.urls:
        async with asyncio.timeout(20), following(url, room) as follower:
            if (await follower.next())["active"]:
                assert (await follower.hear("stream_end"))["content"] == seen.text
        assert await messages(url, room) == ["go", seen.text]


async def test_a_start_of_which_nobody_knows_whether_it_was_told(
    redis_server: StartRedis, instances: StartInstances, wire: StartWire
) -> None:
    """Its instance says 503 and ends it; a room that was told of its start is told of its end."""
    redis = redis_server()
    link = await wire(redis)
    two = await instances(redis.url, 0, redis={"url": redis.url, "lease": 60.0})
    await two.add()
    await two.add(url=link.url)
    room = new_room()
    async with joined(two.b, room, "ann") as ann:
        # Redis is to know the script.
        assert (await publish(two.b, room, {"content": "hello"}))[0] == 201
        link.lost = PUBLISH.sha.encode()
        assert (await start(two.b, CHAT, named("tokens=5"), room=room)).status == 503
        link.lost = b""
        stream_id = (await ann.hear("stream_start"))["stream_id"]
        assert (await ann.hear("stream_error", stream_id=stream_id))["content"] == ""
    await tells(True, *two.urls)
    for url in two.urls:
        async with following(url, room) as follower:
            assert (await follower.next())["active"] == []


async def test_a_key_of_which_nobody_knows_whether_it_was_taken(
    redis_server: StartRedis, instances: StartInstances, wire: StartWire
) -> None:
    """Who comes again with it does not wait for what never began: that fails, and frees the key."""
    redis = redis_server()
    link = await wire(redis)
    two = await instances(redis.url, 1)
    await two.add(url=link.url)
    model, keyed, room = named("tokens=5"), {"Idempotency-Key": "k"}, new_room()
    # Redis is to know the script.
    seen = await start(two.b, CHAT, named("tokens=1"), headers={"Idempotency-Key": "x"})
    assert seen.ending == "finished"
    link.lost = CLAIM.sha.encode()
    assert (await start(two.b, CHAT, model, headers=keyed, room=room)).status == 503
    link.lost = b""
    await tells(True, *two.urls)
    async with asyncio.timeout(20):
        seen = await start(two.a, CHAT, model, headers=keyed, room=room)
    assert (seen.ending, seen.code) == ("failed", "owner_lost")
    for url in two.urls:
        seen = await start(url, CHAT, model, headers=keyed, room=room)
        assert (seen.ending, seen.text) == ("finished", expected(model, PROMPT))


async def test_an_end_that_another_has_decided(
    redis_server: StartRedis, instances: StartInstances, wire: StartWire
) -> None:
    """While its instance was cut off it ended there; elsewhere it was taken for lost, by one that
    died before it could say so. The room is told of that end, and of no other.
    """
    redis = redis_server()
    link = await wire(redis)
    one = await instances(link.url, 1)
    room = new_room()
    async with joined(one.a, room, "ann") as ann:
        model = named("tokens=40,rate=50")
        stream_id = (await ann.call("generate", message="go", model=model))["stream_id"]
        await ann.hear("stream_chunk")
        link.cut()
        assert (await attach(one.a, stream_id, CHAT)).ending == "finished"
        data = {"error": {"code": "owner_lost", "message": "lost"}, "usage": {}}
        told = json.dumps(["m", [["failed", data, 0]]])
        keys = [f"rivulet:stream:{{{stream_id}}}:{kind}" for kind in ("meta", "log", "events")]
        redis.call("EVAL", END.source, 2, *keys, "another", 10**9, told)
        link.mend()
        ends = await ann.until("stream_error")
        assert ends[-1]["error"] == data["error"]
        assert "stream_end" not in {frame["type"] for frame in ends}


async def test_nothing_is_kept_for_ever(
    redis_server: StartRedis, instances: StartInstances
) -> None:
    """Of an instance that was killed, with people and an answer, nothing stays that has no end."""
    redis = redis_server()
    one = await instances(redis.url, 1)
    async with joined(one.a, new_room(), "ann") as ann:
        await ann.call("generate", message="go", model=named("tokens=5000,rate=50"))
        await ann.hear("stream_chunk")
        kill(one.servers[0])
    assert [name for name in redis.names() if redis.call("PTTL", name) < 0] == []


async def test_what_is_acknowledged_is_there(
    redis_server: StartRedis, instances: StartInstances, wire: StartWire
) -> None:
    """Also on an instance that hears of nothing, and looks for what it has missed while it is told
    the next: whoever got an id finds that message there at once.
    """
    redis = redis_server()
    link = await wire(redis)
    two = await instances(redis.url, 1)
    await two.add(url=link.url)
    room = new_room()

    async def say(content: str, after: float = 0) -> None:
        await asyncio.sleep(after)
        status, told = await publish(two.b, room, {"content": content})
        assert status == 201, told
        assert content in await messages(two.b, room)

    async with joined(two.b, room, "ann"):
        await say("first")
        link.deaf, link.delay = True, 0.02
        for turn in range(8):
            assert (await publish(two.a, room, {"content": "elsewhere"}))[0] == 201
            await asyncio.gather(*(say(f"{turn} {i}", i / 100) for i in range(20)))


async def test_somebody_comes_while_redis_takes_nothing(
    redis_server: StartRedis, instances: StartInstances
) -> None:
    """An instance that looks at the room later knows of them all the same."""
    redis = redis_server()
    two = await instances(redis.url, 2)
    room = new_room()
    people = f"rivulet:room:{{{room}}}:people"
    async with joined(two.a, room, "bob"):
        await until(lambda: redis.call("HLEN", people) == 1)
        redis.call("CONFIG", "SET", "maxmemory", "1")
        async with joined(two.a, room, "ann", "sse"):
            assert redis.call("HLEN", people) == 1
            redis.call("CONFIG", "SET", "maxmemory", "0")
            async with asyncio.timeout(20), following(two.b, room, user="eve") as eve:
                members = (await eve.hear("joined"))["members"]
                if "ann" not in members:
                    await eve.hear("user_joined", userId="ann")
