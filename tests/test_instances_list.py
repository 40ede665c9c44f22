"""`GET /api/v1/rooms` says which rooms live, on whichever instance."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from tests.bridged import Instances, here, tells
from tests.people import joined, new_room, publish, request
from tests.redis_server import RedisServer


async def listed(url: str) -> tuple[dict[str, Any], bool]:
    """What this instance says of each shared room, by name, and whether that is all."""
    status, told = await request(url, "GET", "/api/v1/rooms")
    assert status == 200
    names = [room["room"] for room in told["rooms"]]
    assert len(names) == len(set(names))
    shared = [room for room in told["rooms"] if not room["room"].startswith("user:")]
    return {room["room"]: room for room in shared}, "incomplete" not in told


async def test_every_instance_lists_all_rooms(trio: Instances) -> None:
    """Each once, with everybody who is in it and its position, also where two hold it."""
    first, second, both = new_room(), new_room(), new_room()
    async with (
        joined(trio.a, first, "ann"),
        joined(trio.b, second, "bob"),
        joined(trio.a, both, "ann"),
        joined(trio.b, both, "bob"),
    ):
        await here(trio.a, both, "ann", "bob")
        await here(trio.b, both, "ann", "bob")
        _, told = await publish(trio.b, second, {"content": "hello"})
        for url in trio.urls:
            found, whole = await listed(url)
            assert whole
            assert [found[room]["members"] for room in (first, second, both)] == [1, 1, 2]
            assert found[second]["position"] == told["id"]
    await request(trio.c, "DELETE", f"/api/v1/rooms/{second}")
    for url in trio.urls:
        assert second not in (await listed(url))[0]


async def test_what_is_not_known_is_not_hidden(
    redis_server: Callable[..., RedisServer], instances: Callable[..., Any]
) -> None:
    """Where an instance is frozen, or Redis away, the list has what is known, and says so."""
    redis, mine, theirs = redis_server(), new_room(), new_room()
    pair: Instances = await instances(redis.url, 2)
    async with joined(pair.a, mine, "ann"), joined(pair.b, theirs, "bob"):
        found = await listed(pair.a)
        assert (set(found[0]), found[1]) == ({mine, theirs}, True)
        pair.servers[1].child.send_signal(signal.SIGSTOP)
        try:
            found = await listed(pair.a)
        finally:
            pair.servers[1].child.send_signal(signal.SIGCONT)
        assert (set(found[0]), found[1]) == ({mine}, False)
        await tells(True, *pair.urls)
        redis.stop()
        await tells(False, *pair.urls)
        found = await listed(pair.a)
        assert (set(found[0]), found[1]) == ({mine}, False)
        redis.start()
        await tells(True, *pair.urls)
        found = await listed(pair.a)
        assert (set(found[0]), found[1]) == ({mine, theirs}, True)
    assert pair.broke() == []
