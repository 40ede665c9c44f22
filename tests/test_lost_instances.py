"""An instance dies, or is cut off from Redis: its clients go on elsewhere, and what it was making
has one end for each who reads it.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.bridged import LEASE, Day, Instances, here, kill, messages, tells
from tests.clients import (
    PROMPT,
    Kind,
    asked,
    attach,
    attached,
    body_of,
    named,
    once,
    see,
    status,
    stop,
)
from tests.endpoints import url_of
from tests.people import following, joined, new_room, publish
from tests.processes import UpstreamProcess
from tests.readers import Ndjson, Sse, ask, connect
from tests.redis_server import RedisServer
from tests.scrape import moved, scrape
from tests.upstream import expected

CHAT, NATIVE, TEXT = Kind("chat"), Kind("native", "ndjson"), Kind("content", "text")
LONG = "tokens=5000,rate=50"
StartRedis = Callable[..., RedisServer]
StartInstances = Callable[..., Any]
StartWire = Callable[[RedisServer], Any]


async def native(url: str, stream_id: str, after: str) -> tuple[int, list[dict[str, Any]], str]:
    """Who comes back there with a position: the status, what it is told, how that ended."""
    path = f"/api/v1/streams/{stream_id}/events"
    headers = {"Last-Event-ID": after, "Accept": "application/x-ndjson"}
    async with ask("GET", f"{url}{path}", headers=headers) as answer:
        items = await answer.read(Ndjson())
        return answer.status, items, answer.ended


async def test_the_maker_of_an_answer_is_killed(
    redis_server: StartRedis, instances: StartInstances
) -> None:
    """Who reads it elsewhere is told `failed`, `owner_lost`, once, in any dialect; so is who comes
    later, and the room. Text is cut.
    """
    three = await instances(redis_server().url, 3)
    room = new_room()
    async with joined(three.b, room, "bob") as bob, joined(three.c, room, "cyd", "sse") as cyd:
        async with joined(three.a, room, "ann") as ann:
            told = await ann.call("generate", message="go", model=named(LONG))
            stream_id = told["stream_id"]
            reading = [
                asyncio.create_task(attach(url, stream_id, kind))
                for url, kind in ((three.b, CHAT), (three.c, NATIVE), (three.b, TEXT))
            ]
            for follower in (bob, cyd):
                await follower.hear("stream_chunk")
            kill(three.servers[0])
        begun = time.monotonic()
        chat, plain, text = await asyncio.gather(*reading)
        print(f"known to be lost after {time.monotonic() - begun:.1f} s, with a lease of {LEASE}")
        assert (chat.ending, chat.code) == (plain.ending, plain.code) == ("failed", "owner_lost")
        assert [item["type"] for item in plain.items].count("failed") == 1
        assert text.ended == "cut"
        assert chat.text == plain.text == text.text != ""
        ends = [await follower.hear("stream_error") for follower in (bob, cyd)]
        assert ends[0] == ends[1]
        assert ends[0]["error"]["code"] == "owner_lost"
        assert ends[0]["content"] == chat.text
        assert not await bob.so_far() or "stream_error" not in {
            frame["type"] for frame in await bob.so_far()
        }
    for url in (three.b, three.c):
        later = await attach(url, stream_id, NATIVE)
        assert later.items == plain.items
        async with following(url, room) as dan:
            assert (await dan.next())["active"] == []
        assert await messages(url, room) == ["go", chat.text]


async def test_who_asked_goes_while_redis_is_silent(
    redis_server: StartRedis, instances: StartInstances
) -> None:
    """Nobody ever reads what is started for them then: it is cancelled like anything else that
    nobody reads.
    """
    redis = redis_server()
    one = await instances(redis.url, 1, redis={"url": redis.url, "lease": 30.0})
    path = "/v1/chat/completions"
    before = await scrape(one.a)
    redis.freeze()
    try:
        async with connect(one.a) as connection:
            body = body_of(path, model=named(LONG), stream=True)
            asking = asyncio.create_task(connection.request("POST", path, json_body=body))
            await moved(one.a, before, {"rivulet_generations_running": 1.0})
            asking.cancel()
        gone = f'rivulet_requests_total{{route="{path}",status="499"}}'
        await moved(one.a, before, {gone: 1.0})
    finally:
        redis.thaw()
    await moved(one.a, before, {'rivulet_generations_total{ending="cancelled"}': 1.0})


async def test_nobody_else_read_what_a_killed_instance_made(
    redis_server: StartRedis, instances: StartInstances
) -> None:
    """Who comes first after its death, to the room or to the answer, finds it ended too."""
    two = await instances(redis_server().url, 2)
    rooms, ids = [new_room(), new_room()], []
    for room in rooms:
        async with joined(two.a, room, "ann") as ann:
            told = await ann.call("generate", message="go", model=named(LONG))
            ids.append(told["stream_id"])
            await ann.hear("stream_chunk")
    await asyncio.sleep(0.2)
    kill(two.servers[0])
    seen = await attach(two.b, ids[0], CHAT)
    assert (seen.ending, seen.code) == ("failed", "owner_lost")
    async with joined(two.b, rooms[1]) as bob:
        told = await bob.hear("stream_error", stream_id=ids[1])
        assert told["error"]["code"] == "owner_lost"
    assert (await once(two.b, ids[1], "state", "failed"))["error"]["code"] == "owner_lost"


async def test_a_key_of_a_killed_instance_is_free(
    redis_server: StartRedis, instances: StartInstances
) -> None:
    """Whoever comes again with it gets an answer, made anew."""
    two = await instances(redis_server().url, 2)
    headers, model = {"Idempotency-Key": "k"}, named("stall=3,tokens=10,then,tokens=10")
    async with asked(two.a, CHAT, model, headers=headers) as answer:
        await answer.read(Sse(), cut_after=400)
    kill(two.servers[0])
    first = await asyncio.gather(*(see_again(two.b, model, headers) for _ in range(2)))
    assert first[0].code == "owner_lost"
    again = await see_again(two.b, model, headers)
    assert (again.ending, again.text) == ("finished", expected(model, PROMPT))


async def see_again(url: str, model: str, headers: dict[str, str]) -> Any:
    async with asked(url, CHAT, model, headers=headers) as answer:
        return await see(CHAT, answer)


async def test_a_reader_who_is_ahead_of_the_mirror(
    redis_server: StartRedis, instances: StartInstances, wire: StartWire
) -> None:
    """Its instance was cut off, said more than it could tell others, and died. Elsewhere this
    reader waits, and is told of the gap and the end: never that there is nothing left.
    """
    redis = redis_server()
    link = await wire(redis)
    two = await instances(redis.url, 0)
    await two.add(url=link.url)
    await two.add()
    async with asked(two.a, NATIVE, named(LONG)) as answer:
        items, stream_id = answer.items(Ndjson()), answer.headers["x-stream-id"]
        for _ in range(20):
            await anext(items)
        before = (await status(two.b, stream_id))["position"]
        link.cut()
        last: Any = None
        for _ in range(30):
            last = await anext(items)
        kill(two.servers[0])
    assert int(last["id"].rpartition("-")[2]) > int(before.rpartition("-")[2])
    code, told, ended = await native(two.b, stream_id, last["id"])
    assert (code, ended) == (200, "end")
    assert [item["type"] for item in told] == ["gap", "failed"]
    assert told[0]["data"]["requested"] == last["id"]
    assert told[1]["data"]["error"]["code"] == "owner_lost"
    # Once it is known to be lost, nobody waits any more; and after the end there is nothing.
    begun = time.monotonic()
    code, again, ended = await native(two.b, stream_id, last["id"])
    assert (code, again[0]["data"], again[1], ended) == (200, told[0]["data"], told[1], "end")
    path = f"/api/v1/streams/{stream_id}/events"
    async with ask("GET", url_of(two.b, path, starting_after=last["id"])) as answer:
        assert [item.event for item in await answer.read(Sse())] == ["gap", "failed"]
    assert time.monotonic() - begun < 2
    assert await native(two.b, stream_id, told[1]["id"]) == (204, [], "end")
    # Another dialect has no word for a gap; it has the end.
    async with attached(two.b, stream_id, CHAT, after=last["id"]) as answer:
        seen = await see(CHAT, answer)
    assert (seen.ending, seen.code, seen.text) == ("failed", "owner_lost", "")


async def test_a_reader_who_is_ahead_for_a_moment(
    redis_server: StartRedis, instances: StartInstances, wire: StartWire
) -> None:
    """Where its instance lives and comes back to Redis, it misses nothing."""
    redis = redis_server()
    link = await wire(redis)
    two = await instances(redis.url, 0)
    await two.add(url=link.url)
    await two.add()
    model = named("tokens=120,rate=50")
    async with asked(two.a, NATIVE, model) as answer:
        items, stream_id = answer.items(Ndjson()), answer.headers["x-stream-id"]
        said = [await anext(items) for _ in range(10)]
        link.cut()
        said += [await anext(items) for _ in range(20)]
    coming = asyncio.create_task(native(two.b, stream_id, said[-1]["id"]))
    await asyncio.sleep(0.1)
    assert not coming.done()
    link.mend()
    code, told, ended = await coming
    assert (code, ended, told[-1]["type"]) == (200, "end", "finished")
    text = "".join(i["data"]["content"] for i in said + told if i["type"] == "delta")
    assert text == expected(model, PROMPT)


@pytest.mark.parametrize("model", [LONG, "stall=20,tokens=40"])
async def test_a_maker_is_cut_off_for_longer_than_its_lease(
    redis_server: StartRedis,
    instances: StartInstances,
    wire: StartWire,
    upstream: UpstreamProcess,
    model: str,
) -> None:
    """Elsewhere the answer is ended. When its maker is back it learns that, also where its model is
    silent: it ends it too, for its own readers, and stops the upstream. Nobody is told two ends.
    """
    redis = redis_server()
    link = await wire(redis)
    three = await instances(redis.url, 0)
    await three.add(url=link.url)
    await three.add(2)
    room, model = new_room(), named(model)
    async with joined(three.a, room, "ann") as ann, joined(three.b, room, "bob") as bob:
        told = await ann.call("generate", message="go", model=model)
        stream_id = told["stream_id"]
        await bob.hear("stream_chunk")
        local = asyncio.create_task(attach(three.a, stream_id, NATIVE))
        remote = asyncio.create_task(attach(three.b, stream_id, NATIVE))
        await asyncio.sleep(0.3)
        link.cut()
        await tells(False, three.a)
        there = await remote
        assert (there.ending, there.code) == ("failed", "owner_lost")
        assert not local.done()
        assert (await status(three.a, stream_id))["state"] == "running"
        lost = await bob.hear("stream_error")
        link.mend()
        seen = await local
        assert (seen.ending, seen.code) == ("failed", "owner_lost")
        (record,) = await upstream.requests(model, closed=True)
        assert record["closed_by"] == "client"
        await tells(True, *three.urls)
        # One end in the room, the same for all.
        status_, _ = await publish(three.c, room, {"content": "last"})
        assert status_ == 201
        for follower, known in ((ann, []), (bob, [lost])):
            frames = known + await follower.until("message", content="last")
            ends = [f for f in frames if f["type"] in ("stream_error", "stream_end")]
            assert ends == [lost]
    # And where they come back, there is no other.
    for who in (seen, there):
        for url in three.urls:
            assert await native(url, stream_id, who.items[-1]["id"]) == (204, [], "end")
    for url in three.urls:
        assert (await status(url, stream_id))["state"] == "failed"
    assert three.broke() == []


async def test_a_maker_is_frozen_for_longer_than_its_lease(
    redis_server: StartRedis, instances: StartInstances, upstream: UpstreamProcess
) -> None:
    """Its connections stood, and when it wakes nothing tells it that it was taken for lost but its
    lease: it ends what others have ended, and its people are there again.
    """
    two = await instances(redis_server().url, 2)
    room, model = new_room(), named("stall=3,tokens=10")
    async with joined(two.a, room, "ann") as ann, joined(two.b, room, "bob") as bob:
        told = await ann.call("generate", message="go", model=model)
        local = asyncio.create_task(attach(two.a, told["stream_id"], NATIVE))
        await bob.hear("stream_chunk")
        await asyncio.sleep(0.3)
        two.servers[0].child.send_signal(signal.SIGSTOP)
        try:
            lost = await bob.hear("stream_error")
            await here(two.b, room, "bob")
        finally:
            two.servers[0].child.send_signal(signal.SIGCONT)
        seen = await local
        assert (seen.ending, seen.code) == ("failed", "owner_lost")
        assert [item["type"] for item in seen.items].count("failed") == 1
        assert await ann.hear("stream_error") == lost
        for url in two.urls:
            await here(url, room, "ann", "bob")
    (record,) = await upstream.requests(model, closed=True)
    assert record["closed_by"] == "client"


async def test_a_maker_that_ends_while_it_is_cut_off(
    redis_server: StartRedis, instances: StartInstances, wire: StartWire
) -> None:
    """Before its lease is over: others have that end as soon as it is back, and no other."""
    redis = redis_server()
    link = await wire(redis)
    two = await instances(redis.url, 0, redis={"url": redis.url, "lease": 30.0})
    await two.add(url=link.url)
    await two.add()
    room, model = new_room(), named("tokens=60,rate=50")
    async with joined(two.b, room, "bob") as bob, joined(two.a, room, "ann") as ann:
        told = await ann.call("generate", message="go", model=model)
        stream_id = told["stream_id"]
        reading = asyncio.create_task(attach(two.b, stream_id, CHAT))
        await bob.hear("stream_chunk")
        link.cut()
        here = await attach(two.a, stream_id, CHAT)
        assert here.ending == "finished"
        assert not reading.done()
        link.mend()
        there = await reading
        assert (there.ending, there.text) == (here.ending, here.text)
        ends = [await follower.hear("stream_end") for follower in (ann, bob)]
        assert ends[0] == ends[1]
        assert ends[0]["content"] == here.text


async def test_an_instance_is_killed(redis_server: StartRedis, instances: StartInstances) -> None:
    """Its clients go on elsewhere, in rooms and in answers that others make, with all of it."""
    three: Instances = await instances(redis_server().url, 3)
    model = named("tokens=200,rate=50")
    async with Day(three.urls) as day, asked(three.b, NATIVE, model) as answer:
        stream_id = answer.headers["x-stream-id"]
        read: list[Any] = []
        async with attached(three.a, stream_id, NATIVE) as through:
            items = through.items(Ndjson())
            read += [await anext(items) for _ in range(20)]
            kill(three.servers[0])
            read += [item async for item in items]
            assert through.ended == "cut"
        _, told, _ = await native(three.c, stream_id, read[-1]["id"])
        text = "".join(i["data"]["content"] for i in read + told if i["type"] == "delta")
        assert text == expected(model, PROMPT)
        day.urls = three.urls[1:]
        await day.ends(gaps=False)


async def test_people_of_an_instance_that_was_cut_off(
    redis_server: StartRedis, instances: StartInstances, wire: StartWire
) -> None:
    """They are gone for others once its lease is over, and there again when it is back; who left
    meanwhile is not.
    """
    redis = redis_server()
    link = await wire(redis)
    two = await instances(redis.url, 0)
    await two.add(url=link.url)
    await two.add()
    room = new_room()
    async with joined(two.b, room, "bob"), joined(two.a, room, "ann"):
        async with joined(two.a, room, "cyd"):
            await here(two.b, room, "ann", "bob", "cyd")
            link.cut()
            await here(two.b, room, "bob")
        link.mend()
        await here(two.b, room, "ann", "bob")
        await here(two.a, room, "ann", "bob")
    async with joined(two.b, room, "bob"):
        async with joined(two.a, room, "cyd"):
            await here(two.b, room, "bob", "cyd")
            link.cut()
            await tells(False, two.a)
        link.mend()
        await here(two.b, room, "bob")


async def test_a_stop_that_cannot_be_told(
    redis_server: StartRedis, instances: StartInstances, wire: StartWire
) -> None:
    """An instance that is cut off cannot stop what another makes, and says so."""
    redis = redis_server()
    link = await wire(redis)
    two = await instances(redis.url, 1)
    await two.add(url=link.url)
    async with asked(two.a, CHAT, named(LONG)) as answer:
        stream_id = answer.headers["x-stream-id"]
        assert (await status(two.b, stream_id))["state"] == "running"
        link.cut()
        await tells(False, two.b)
        assert (await stop(two.b, stream_id)).status == 503
        assert (await status(two.a, stream_id))["state"] == "running"
        link.mend()
        await tells(True, two.b)
        assert (await stop(two.b, stream_id)).status == 200
        assert (await see(CHAT, answer)).ending == "cancelled"


async def test_an_orderly_end(redis_server: StartRedis, instances: StartInstances) -> None:
    """On SIGTERM what runs is ended and told to others, and nobody waits for a lease."""
    two = await instances(redis_server().url, 2)
    room = new_room()
    async with joined(two.b, room, "bob") as bob:
        async with joined(two.a, room, "ann") as ann:
            told = await ann.call("generate", message="go", model=named(LONG))
            await bob.hear("stream_chunk")
            stopping = asyncio.create_task(asyncio.to_thread(two.servers[0].stop))
            lost = await bob.hear("stream_error", stream_id=told["stream_id"])
            assert lost["error"]["code"] == "shutting_down"
            await stopping
        await here(two.b, room, "bob")
    seen = await attach(two.b, told["stream_id"], CHAT)
    assert (seen.ending, seen.code) == ("failed", "shutting_down")
    assert seen.text == lost["content"]
