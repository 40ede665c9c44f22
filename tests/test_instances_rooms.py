"""A room is one room, whichever instance its people have come to."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.bridged import Instances, here, kill, messages, tells
from tests.clients import named
from tests.nginx import Way
from tests.people import (
    TRANSPORTS,
    following,
    joined,
    members,
    new_room,
    on_socket,
    publish,
    request,
)
from tests.processes import UpstreamProcess
from tests.test_recovery import content, exact, offset_of, random_cuts

PAIRS = list(itertools.product(TRANSPORTS, TRANSPORTS))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_what_is_published_is_heard_everywhere(trio: Instances, transport: str) -> None:
    """With the same frame, the sender's own included, and once."""
    room = new_room()
    async with (
        joined(trio.a, room, "ann", transport) as ann,
        joined(trio.b, room, "bob", transport) as bob,
    ):
        _, told = await publish(trio.c, room, {"content": "hello", "data": {"n": 1}}, "cyd")
        heard = await ann.hear("message")
        assert (heard["id"], heard["userId"], heard["data"]) == (told["id"], "cyd", {"n": 1})
        assert await bob.hear("message") == heard
        await publish(trio.a, room, {"content": "next"})
        assert (await bob.hear("message"))["content"] == "next"
        assert (await ann.hear("message"))["content"] == "next"


async def test_an_ack_is_of_what_the_sender_holds(trio: Instances) -> None:
    """Who has the `ack` has been told, or is told right then, and sees it in history."""
    room = new_room()
    async with joined(trio.a, room, "ann") as ann:
        for number in range(20):
            told = await ann.call("message", content=str(number))
            assert told["type"] == "ack", told
            page = await ann.call("history")
            assert page["messages"][-1]["id"] == told["id"]


async def test_writers_everywhere_have_one_order(trio: Instances) -> None:
    """Two write on each instance, singly and in batches: everybody has the same order, whole, each
    writer's own kept, and so has who comes later.
    """
    room, count = new_room(), 60

    async def write(url: str, name: str) -> None:
        async with joined(url, room, name) as socket:
            for number in range(0, count, 3):
                await socket.call("message", **content(name, number))
                await publish(url, room, [content(name, number + n) for n in (1, 2)], name)

    async def read(url: str, transport: str) -> list[Any]:
        async with joined(url, room, transport=transport) as follower:
            coming.release()
            heard = await follower.until("message", content="last")
            return [frame for frame in heard if frame["type"] == "message"]

    coming = asyncio.Semaphore(0)
    places = list(itertools.product(trio.urls, TRANSPORTS))
    reading = [asyncio.create_task(read(*place)) for place in places]
    for _ in places:
        await coming.acquire()
    names = [f"{name}{n}" for n, name in itertools.product(range(3), ("ann", "bob"))]
    await asyncio.gather(*(write(trio.urls[int(name[3])], name) for name in names))
    await publish(trio.a, room, {"content": "last"})
    first, *others = await asyncio.gather(*reading)
    assert len(first) == count * len(names) + 1
    assert all(other == first for other in others)
    assert [offset_of(frame["id"]) for frame in first] == list(range(1, len(first) + 1))
    for name in names:
        own = [frame["content"] for frame in first if frame["userId"] == name]
        assert own == [content(name, n)["content"] for n in range(count)]


@pytest.mark.parametrize(("before", "after"), PAIRS)
async def test_a_reader_moves_between_instances(trio: Instances, before: str, after: str) -> None:
    """With its position: `recovered`, what it missed, once, and what comes, on any transport; also
    to an instance that has not heard of the room.
    """
    room = new_room()
    async with joined(trio.a, room, transport=before) as ann:
        await publish(trio.a, room, [{"content": str(n)} for n in range(3)])
        await ann.hear("message", content="1")
    await publish(trio.b, room, {"content": "missed"})
    async with following(trio.c, room, after, after=ann.last_id) as ann:
        told = await ann.next()
        assert (told["type"], told["recovered"]) == ("joined", True)
        assert [message["content"] for message in told["messages"]] == ["0", "1"]
        await publish(trio.b, room, {"content": "new"})
        heard = await ann.until("message", content="new")
    said = [frame["content"] for frame in heard if frame["type"] == "message"]
    assert said == ["2", "missed", "new"]


async def test_a_position_that_is_news_to_an_instance(trio: Instances) -> None:
    """Who comes with the id of an event as soon as it was acknowledged elsewhere is no stranger."""
    room = new_room()
    async with joined(trio.b, room):  # it holds the room, and may hear of it a moment later
        for number in range(100):
            _, told = await publish(trio.a, room, {"content": str(number)})
            async with following(trio.b, room, "ndjson", after=told["id"]) as ann:
                frame = await ann.next()
                assert (frame["type"], frame.get("recovered")) == ("joined", True), number


@pytest.mark.timeout(1200)
async def test_random_cuts(trio: Instances) -> None:
    """Ten readers cut again and again, anywhere, coming back on any instance and any transport,
    while several write on all: each has every event once, in order, the same as one that was never
    cut. `SEED=...`, which a failure names, repeats it as far as the network lets it.
    """
    exact(*await random_cuts(trio.urls, pause=0.2, writing=0.005))


@pytest.mark.timeout(1200)
async def test_random_cuts_behind_nginx(trio: Instances, tmp_path: Path) -> None:
    """The same on whichever instance nginx picks, while two of them are written to."""
    second = "server rivulet-2:8080 max_fails=1 fail_timeout=2s;"
    third = f"{second}\n        {second.replace('2:', '3:')}"
    way = Way(tmp_path, trio.urls, two=False, changes={second: third})
    try:
        exact(*await random_cuts([way.url], pause=0.2, writing=0.005, to=trio.urls[:2]))
        asked = Counter(line["instance"] for line in way.nginxes[0].lines())
    finally:
        way.stop()
    assert asked.keys() == {url.removeprefix("http://") for url in trio.urls}
    assert min(asked.values()) > sum(asked.values()) / 10


# --- people -------------------------------------------------------------------------------------


async def test_people_come_and_go_once(trio: Instances) -> None:
    """However many connections a person has, and wherever: others are told once of the first and
    once of the last, and each instance says the same of who is here.
    """
    room = new_room()
    async with joined(trio.a, room, "ann") as ann:
        async with joined(trio.b, room, "bob"), joined(trio.c, room, "bob"):
            await asyncio.gather(*(here(url, room, "ann", "bob") for url in trio.urls))
            async with joined(trio.a, room, "bob"):
                pass
        await ann.hear("user_left", userId="bob")
        await asyncio.gather(*(here(url, room, "ann") for url in trio.urls))
        async with joined(trio.b, room, "cyd") as cyd:
            await ann.until("user_joined", userId="cyd")
            assert await cyd.so_far() == []
        heard = await ann.until("user_left", userId="cyd")
        assert [frame["type"] for frame in heard] == ["user_left"]
    await here(trio.b, room)


async def test_comings_are_told_once(trio: Instances) -> None:
    """One `user_joined` and one `user_left` for each person who comes, on each instance, also who
    comes to several at the same time.
    """
    room, names = new_room(), [f"cyd{number}" for number in range(5)]

    async def visit(name: str) -> None:
        async with (
            joined(trio.c, room, name),
            joined(trio.b, room, name),
            joined(trio.a, room, name),
        ):
            await here(trio.a, room, "ann", "bob", *names)

    async with joined(trio.a, room, "ann") as ann, joined(trio.b, room, "bob") as bob:
        await here(trio.a, room, "ann", "bob")
        await ann.so_far(), await bob.so_far()
        await asyncio.gather(*map(visit, names))
        await asyncio.gather(*(here(url, room, "ann", "bob") for url in trio.urls))
        for follower in (ann, bob):
            heard = [(told["type"], told["userId"]) for told in await follower.so_far()]
            for type in ("user_joined", "user_left"):
                assert sorted(user for said, user in heard if said == type) == names


async def test_joined_says_who_is_elsewhere(trio: Instances) -> None:
    room = new_room()
    async with joined(trio.a, room, "ann"), joined(trio.b, room, "bob"):
        await here(trio.c, room, "ann", "bob")
        async with following(trio.c, room, user="cyd") as cyd:
            assert (await cyd.next())["members"] == ["ann", "bob", "cyd"]


async def test_typing_is_seen_elsewhere(trio: Instances) -> None:
    """Typing is told to everybody who is here, once, and is kept by nobody."""
    room = new_room()
    async with (
        joined(trio.a, room, "ann") as ann,
        joined(trio.b, room, "bob", "sse") as bob,
        joined(trio.a, room, "cyd", "ndjson") as cyd,
    ):
        await ann.say("typing", typing=True)
        for follower in (ann, bob, cyd):
            told = await follower.hear("user_typing")
            assert (told["userId"], told["typing"]) == ("ann", True)
            assert "id" not in told
        await publish(trio.c, room, {"content": "x"})
        for follower in (ann, bob, cyd):
            assert "user_typing" not in [f["type"] for f in await follower.until("message")]


async def test_an_instance_that_dies_takes_its_people_with_it(trio: Instances) -> None:
    """Killed, it says nothing more: its people are gone once its lease is over, told once each, and
    those who are elsewhere too are still there.
    """
    (doomed,) = await trio.add()
    room = new_room()
    try:
        async with (
            joined(trio.a, room, "ann") as ann,
            joined(doomed.url, room, "bob"),
            joined(doomed.url, room, "cyd"),
            joined(trio.b, room, "cyd"),
        ):
            await here(trio.a, room, "ann", "bob", "cyd")
            kill(doomed)
            heard = await ann.until("user_left")
            assert heard[-1]["userId"] == "bob"
            for url in trio.urls[:3]:
                await here(url, room, "ann", "cyd")
    finally:
        trio.servers.remove(doomed)
        doomed.stop()


# --- history, deletion, keys --------------------------------------------------------------------


async def test_history_is_the_same_everywhere(trio: Instances) -> None:
    """Pages of it too, begun on one instance and continued on another."""
    room = new_room()
    for url, number in zip(itertools.cycle(trio.urls), range(30), strict=False):
        await publish(url, room, {"content": str(number)})
    path, before = f"/api/v1/rooms/{room}/messages", None
    said: list[str] = []
    for url in itertools.cycle(trio.urls[::-1]):  # others may hear of the last a moment later
        _, page = await request(url, "GET", path, before=before, limit=7)
        said = [message["content"] for message in page["messages"]] + said
        before = page["next"]
        if before is None:
            break
    assert said == [str(number) for number in range(30)]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_deletion_is_everywhere(trio: Instances, transport: str) -> None:
    """Whoever is in the room is told `left`, wherever; it begins anew, with nothing of before, and
    an old position is a gap.
    """
    room = new_room()
    await publish(trio.a, room, {"content": "old"}, key="k")
    async with (
        joined(trio.a, room, transport=transport) as ann,
        joined(trio.b, room, transport=transport) as bob,
    ):
        told = await request(trio.c, "DELETE", f"/api/v1/rooms/{room}")
        assert told == (200, {"deleted": True})
        await asyncio.gather(ann.hear("left"), bob.hear("left"))
    for url in trio.urls:
        assert await messages(url, room) == []
    status, told = await publish(trio.b, room, {"content": "new"}, key="k")
    assert (status, offset_of(told["id"])) == (201, 1)
    async with following(trio.a, room, transport, after=ann.last_id) as ann:
        assert (await ann.next())["type"] == "gap"
        assert [m["content"] for m in (await ann.next())["messages"]] == ["new"]


async def test_deletion_ends_what_runs_elsewhere(
    trio: Instances, upstream: UpstreamProcess
) -> None:
    """And the model is not asked on; nothing of it comes into the room's next life."""
    room, model = new_room(), named("stall=3,tokens=10")
    async with joined(trio.a, room, "ann") as ann, joined(trio.b, room, "bob") as bob:
        await ann.call("generate", message="go", model=model)
        await bob.hear("stream_chunk")
        await request(trio.b, "DELETE", f"/api/v1/rooms/{room}", user="bob")
        await asyncio.gather(ann.hear("left"), bob.hear("left"))
    (record,) = await upstream.requests(model, closed=True)
    assert record["closed_by"] == "client"
    await publish(trio.c, room, {"content": "new"})
    async with joined(trio.a, room):
        pass
    for url in trio.urls:
        assert await messages(url, room) == ["new"]


async def test_publishing_twice_with_one_key(trio: Instances) -> None:
    """On any instance, at the same time or later: it is there once, and the first id is the answer;
    with another body it is refused.
    """
    room = new_room()
    async with joined(trio.a, room) as ann:
        told = await asyncio.gather(
            *(publish(url, room, {"content": "once"}, "ann", "k") for url in trio.urls * 3)
        )
        assert {status for status, _ in told} == {201}
        assert len({answer["id"] for _, answer in told}) == 1
        status, answer = await publish(trio.b, room, {"content": "other"}, "ann", "k")
        assert (status, answer["error"]["param"]) == (422, "Idempotency-Key")
        # Somebody else's key is another one.
        assert (await publish(trio.b, room, {"content": "bob's"}, "bob", "k"))[0] == 201
        heard = await ann.until("message", content="bob's")
        assert [frame["content"] for frame in heard if "content" in frame] == ["once", "bob's"]
    assert len({str(await messages(url, room)) for url in trio.urls}) == 1


async def test_a_key_is_kept_among_many_messages(trio: Instances) -> None:
    """A room remembers the last thousand keys of its clients, whatever comes without one."""
    room = new_room()
    status, first = await publish(trio.a, room, {"content": "once"}, "ann", "k")
    assert status == 201
    async with joined(trio.b, room, "bob") as bob:
        for _ in range(11):
            for number in range(100):
                await bob.say("message", content=str(number))
            await bob.so_far()
    assert await publish(trio.c, room, {"content": "once"}, "ann", "k") == (201, first)


async def test_a_personal_room_is_everywhere(trio: Instances) -> None:
    """What is said to a person reaches their connections on every instance."""
    user = new_room()
    async with (
        on_socket(trio.a, user_id=user) as first,
        on_socket(trio.b, user_id=user) as second,
    ):
        await asyncio.gather(first.call("ping"), second.call("ping"))
        status, told = await publish(trio.c, f"user:{user}", {"content": "you"}, user)
        assert status == 201, told
        for socket in (first, second):
            assert (await socket.hear("message"))["id"] == told["id"]


async def test_nothing_of_this_broke(trio: Instances) -> None:
    """No instance has logged an error of its own, and all are ready."""
    assert trio.broke() == []
    await tells(True, *trio.urls)
    assert await members(trio.a, new_room()) == []
