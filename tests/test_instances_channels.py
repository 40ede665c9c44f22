"""A person's channels are the same on every instance, and any process with Redis can publish there
(wire.md, section 4).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from streaming.publisher import Publisher, PublishError
from tests.bridged import Instances
from tests.people import new_room, request
from tests.processes import until
from tests.redis_server import RedisServer, free_port
from tests.test_channels import publish, reading
from tests.test_publisher import heard


async def test_what_is_published_on_one_is_heard_on_all(trio: Instances) -> None:
    """Once by each stream, in order, also by one beside the publisher; and by nobody else."""
    user = new_room()
    async with (
        reading(trio.a, user) as here,
        reading(trio.b, user) as there,
        reading(trio.b, new_room()) as other,
        reading(trio.b, user, "play") as elsewhere,
    ):
        for number in range(20):
            assert await publish(trio.urls[number % 3], user, "task.progress", {"n": number}) == 2
        wanted = [("task.progress", {"n": number}) for number in range(20)]
        assert await heard(here, 20) == await heard(there, 20) == wanted
        await publish(trio.c, user, "error", {}, "play")
        assert await heard(elsewhere, 1) == [("failed", {})]
        await publish(trio.c, other.answer.headers.get("x", user), "x", {})
        assert await heard(here, 1) == [("x", {})]


async def test_any_process_publishes_by_redis(
    redis_server: Callable[..., RedisServer], instances: Callable[..., Any]
) -> None:
    """`{"event", "data", "timestamp"?}` on `sse:{channel}:{user_id}`; what is no such thing is
    dropped, and the stream goes on.
    """
    redis = redis_server()
    servers = await instances(redis.url, 1)
    address = "sse:work:ann:b"
    async with reading(servers.a, "ann:b") as ann:
        for wrong in ("garbage", "[]", "1", "{}", '{"event": 1}', '{"event": "a\\nb"}'):
            assert redis.call("PUBLISH", address, wrong) == 1
        said = {"event": "world.sync", "data": [1], "timestamp": "2026-01-01T00:00:00Z"}
        redis.call("PUBLISH", address, json.dumps(said))
        told = await ann.next()
        assert (told.event, told.json()) == (
            "world.sync",
            {"timestamp": "2026-01-01T00:00:00Z", "data": [1]},
        )
    await until(lambda: redis.call("PUBLISH", address, "{}") == 0)  # nobody listens any more


@pytest.mark.parametrize("variable", ["", "RIVULET_REDIS__URL", "REDIS_URL"])
async def test_the_publisher_by_redis(
    redis_server: Callable[..., RedisServer],
    instances: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    """Given the URL, or with one in the environment, it publishes there."""
    redis = redis_server()
    servers = await instances(redis.url, 1)
    for name in ("RIVULET_REDIS__URL", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, redis.url)
    publisher = Publisher("" if variable else redis.url)
    async with publisher, reading(servers.a, "ann") as ann:
        async with publisher.task("ann", "work") as task:
            await task.progress(percent=50)
        events = ["generation.start", "generation.progress", "generation.complete"]
        assert [name for name, _ in await heard(ann, 3)] == events
        with pytest.raises(PublishError, match="`:`"):
            await publisher.publish("ann", "a:b", "x", {})


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
async def test_the_publisher_without_redis(scheme: str) -> None:
    """Says so; nothing is tried again."""
    async with Publisher(f"{scheme}://127.0.0.1:{free_port()}", timeout=5) as publisher:
        with pytest.raises(PublishError):
            await publisher.publish("ann", "work", "x", {})


async def test_a_stream_outlives_redis(
    redis_server: Callable[..., RedisServer], instances: Callable[..., Any]
) -> None:
    """One that is open hears again when Redis is back, and so does one that was opened meanwhile;
    publishing is refused until then.
    """
    redis = redis_server()
    servers = await instances(redis.url, 1)
    async with reading(servers.a, "ann") as before:
        redis.kill()
        body = {"user_id": "ann", "channel": "work", "event": "x", "data": {}}
        status, told = await request(servers.a, "POST", "/api/v1/sse/publish", body)
        assert (status, told["error"]["code"]) == (503, "bridge_unavailable")
        async with reading(servers.a, "ann") as during:
            redis.start()
            await until(lambda: redis.call("PUBSUB", "NUMSUB", "sse:work:ann")[1] == 1)
            assert await publish(servers.a, "ann", "back", {"n": 1}) == 1
            assert await heard(before, 1) == await heard(during, 1) == [("back", {"n": 1})]
