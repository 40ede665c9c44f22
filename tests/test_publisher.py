"""The client with which other programs tell a person how their work goes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from streaming.publisher import Publisher, PublishError
from tests.inside import in_process
from tests.people import new_room
from tests.processes import Server
from tests.sockets import black_hole, closed_port
from tests.test_channels import Channel, reading


def taking(take: Callable[[web.Request], Awaitable[web.Response]]) -> web.Application:
    """A server that has nothing but the one call."""
    application = web.Application()
    application.router.add_post("/api/v1/sse/publish", take)
    return application


async def heard(stream: Channel, count: int) -> list[tuple[str, dict[str, object]]]:
    """The next events: name and data but the time."""
    found = []
    for _ in range(count):
        told = await stream.next()
        data = told.json()
        del data["timestamp"]
        found.append((told.event, data))
    return found


async def test_a_task_tells_its_start_progress_and_completion(demo_server: Server) -> None:
    """In order, all with the task's id; the start with what was given, the end with the result."""
    user = new_room()
    async with Publisher(demo_server.url) as publisher, reading(demo_server.url, user) as ann:
        async with publisher.task(user, "work", title="A river") as task:
            await task.progress(percent=50)
            await task.progress(percent=90)
            task.result = {"url": "/rivers/1"}
        assert await heard(ann, 4) == [
            ("generation.start", {"task_id": task.id, "title": "A river"}),
            ("generation.progress", {"task_id": task.id, "percent": 50}),
            ("generation.progress", {"task_id": task.id, "percent": 90}),
            ("generation.complete", {"task_id": task.id, "url": "/rivers/1"}),
        ]


async def test_a_task_may_have_another_name(demo_server: Server) -> None:
    """Its events go out by that name; two tasks have two ids."""
    user = new_room()
    async with Publisher(f"{demo_server.url}/") as publisher, reading(demo_server.url, user) as ann:
        async with (
            publisher.task(user, "work", "report") as one,
            publisher.task(user, "work", "report") as two,
        ):
            assert one.id != two.id
        assert [name for name, _ in await heard(ann, 4)] == [
            *("report.start", "report.start", "report.complete", "report.complete")
        ]


async def test_a_block_that_raises_tells_the_error(demo_server: Server) -> None:
    """And raises on; nothing is said to be complete."""
    user = new_room()
    async with Publisher(demo_server.url) as publisher, reading(demo_server.url, user) as ann:
        with pytest.raises(ZeroDivisionError):
            async with publisher.task(user, "work") as task:
                raise ZeroDivisionError("by nothing")
        error = {"code": "task_failed", "message": "by nothing"}
        _, told = await heard(ann, 2)
        assert told == ("generation.error", {"task_id": task.id, "error": error})
        await publisher.publish(user, "work", "last", {})
        assert (await ann.next()).event == "last"


async def test_a_block_that_is_cancelled_tells_it(demo_server: Server) -> None:
    """And is cancelled."""
    user = new_room()
    async with Publisher(demo_server.url) as publisher, reading(demo_server.url, user) as ann:

        async def work() -> None:
            async with publisher.task(user, "work"):
                await asyncio.Event().wait()

        working = asyncio.create_task(work())
        await ann.next()
        working.cancel()
        ((name, data),) = await heard(ann, 1)
        assert (name, data["error"]) == (
            "generation.error",
            {"code": "cancelled", "message": "CancelledError"},
        )
        with pytest.raises(asyncio.CancelledError):
            await working


async def test_publish_says_how_many_it_reached(demo_server: Server) -> None:
    """Streams of this person; none is no error: a channel is ephemeral."""
    user = new_room()
    async with Publisher(demo_server.url) as publisher:
        assert await publisher.publish(user, "work", "x", {}) == 0
        async with reading(demo_server.url, user):
            assert await publisher.publish(user, "work", "x", {}) == 1


async def test_what_the_server_refuses_is_raised(demo_server: Server) -> None:
    """With its status and its words; and the publisher goes on."""
    async with Publisher(demo_server.url) as publisher:
        with pytest.raises(PublishError, match="channel") as refusal:
            await publisher.publish("ann", "a:b", "x", {})
        assert refusal.value.status == 422
        assert await publisher.publish("ann", "work", "x", {}) == 0


async def test_a_server_that_is_not_there_is_raised() -> None:
    """Refused at once, or silent for longer than the timeout."""
    async with Publisher(f"http://127.0.0.1:{closed_port()}") as publisher:
        with pytest.raises(PublishError) as refusal:
            await publisher.publish("ann", "work", "x", {})
        assert refusal.value.status == 0
    with black_hole() as port:
        async with Publisher(f"http://127.0.0.1:{port}", timeout=0.2) as publisher:
            with pytest.raises(PublishError):
                await publisher.publish("ann", "work", "x", {})


async def test_an_error_that_cannot_be_told_hides_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What the block raised counts; that it was not told is logged."""
    refusing = False

    async def take(request: web.Request) -> web.Response:
        return web.Response(status=500) if refusing else web.json_response({"delivered": 1})

    async with in_process(taking(take)) as url, Publisher(url) as publisher:
        with pytest.raises(ZeroDivisionError):
            async with publisher.task("ann", "work"):
                refusing = True
                raise ZeroDivisionError
    assert "the end of a task was not told" in caplog.text


async def test_the_key_goes_along() -> None:
    """As a bearer token; without one no header is sent."""
    seen: list[str | None] = []

    async def take(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return web.json_response({"delivered": 0})

    async with in_process(taking(take)) as url:
        for key in ("secret", ""):
            async with Publisher(url, key) as publisher:
                await publisher.publish("ann", "work", "x", {})
    assert seen == ["Bearer secret", None]


@pytest.mark.parametrize("url", ["amqp://localhost", "localhost:8080", ""])
def test_another_url_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is sent; so is none, where the environment names none either."""
    for name in ("RIVULET_REDIS__URL", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="http://"):
        Publisher(url)


async def test_a_closed_publisher_leaves_no_connection(demo_server: Server) -> None:
    """However the block around it ends."""
    publisher = Publisher(demo_server.url)
    with contextlib.suppress(PublishError):
        async with publisher:
            await publisher.publish("ann", "a:b", "x", {})
    assert getattr(publisher._way, "_session", None) is None
    await publisher.close()
