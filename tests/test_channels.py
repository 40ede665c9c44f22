"""Channels: events for one person, ephemeral, over SSE (wire.md, section 4)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import pytest

from app import build
from streaming.channels import HEARTBEAT
from streaming.config import Config
from tests.clients import MEDIA
from tests.conftest import StartServer
from tests.inside import in_process
from tests.people import new_room, request
from tests.processes import Server
from tests.readers import Answer, Message, Ndjson, Sse, ask, connect

WAIT = 30


class Channel:
    """Somebody's open stream. `first`: its `connected`."""

    first: Message

    def __init__(self, answer: Answer) -> None:
        self.answer, self.parser = answer, Sse()
        self._items = answer.items(self.parser)

    async def next(self) -> Message:
        async with asyncio.timeout(WAIT):
            return await anext(self._items)


@asynccontextmanager
async def reading(url: str, user: str, channel: str = "work") -> AsyncIterator[Channel]:
    """An open stream, of which `connected` has been read."""
    path = f"{url}/api/v1/sse/stream/{quote(channel, safe='')}"
    async with ask("GET", path, headers={"X-User-Id": user}) as answer:
        assert answer.status == 200, answer.status
        stream = Channel(answer)
        stream.first = await stream.next()
        yield stream


async def publish(url: str, user: str, event: str, data: Any, channel: str = "work") -> Any:
    """Publishes into a channel: how many streams it went to."""
    body = {"user_id": user, "channel": channel, "event": event, "data": data}
    status, told = await request(url, "POST", "/api/v1/sse/publish", body)
    assert status == 202, told
    return told["delivered"]


# --- the stream ---------------------------------------------------------------------------------


async def test_connected_comes_first(demo_server: Server) -> None:
    """With the time and the channel's name; no id, as there is nothing to come back to."""
    async with reading(demo_server.url, new_room(), "work") as ann:
        told = ann.first.json()
        assert (ann.first.event, told["channel"], ann.first.id) == ("connected", "work", "")
        assert told["timestamp"].endswith("Z")
        assert ann.answer.headers["content-type"].startswith("text/event-stream")
        assert ann.answer.headers["x-accel-buffering"] == "no"


@pytest.mark.parametrize(
    "event",
    ["generation.progress", "world.update", "assistant.thinking", "task.failed", "x", "A-b_c.9"],
)
async def test_an_event_goes_out_by_its_name(demo_server: Server, event: str) -> None:
    """With its data, and the time unless the data say one; without an id."""
    user = new_room()
    async with reading(demo_server.url, user) as ann:
        assert await publish(demo_server.url, user, event, {"percent": 50}) == 1
        told = await ann.next()
        assert (told.event, told.id) == (event, "")
        assert told.json()["percent"] == 50 and told.json()["timestamp"]
        await publish(demo_server.url, user, event, {"timestamp": "then"})
        assert (await ann.next()).json() == {"timestamp": "then"}


async def test_an_event_called_error_goes_out_as_failed(demo_server: Server) -> None:
    """A browser would take it for a broken connection."""
    user = new_room()
    async with reading(demo_server.url, user) as ann:
        await publish(demo_server.url, user, "error", {"code": "x"})
        told = await ann.next()
        assert (told.event, told.json()["code"]) == ("failed", "x")
        await publish(demo_server.url, user, "generation.error", {})
        assert (await ann.next()).event == "generation.error"


@pytest.mark.parametrize("data", [None, 7, "text", [1, 2], {"a": {"b": "\n\u2028"}}])
async def test_data_may_be_any_json(demo_server: Server, data: Any) -> None:
    """An object goes out as it is, another value under `data`."""
    user = new_room()
    async with reading(demo_server.url, user) as ann:
        await publish(demo_server.url, user, "x", data)
        told = (await ann.next()).json()
        del told["timestamp"]
        wanted = {} if data is None else data if isinstance(data, dict) else {"data": data}
        assert told == wanted


async def test_only_the_person_and_the_channel_named_get_it(demo_server: Server) -> None:
    """Each of their streams once; nobody else, and nothing of before."""
    ann, bob = new_room(), new_room()
    assert await publish(demo_server.url, ann, "before", {}) == 0
    async with (
        reading(demo_server.url, ann) as one,
        reading(demo_server.url, ann) as two,
        reading(demo_server.url, ann, "play") as other,
        reading(demo_server.url, bob) as stranger,
    ):
        assert await publish(demo_server.url, ann, "x", {}) == 2
        for user, channel in ((ann, "work"), (ann, "play"), (bob, "work")):
            await publish(demo_server.url, user, "last", {}, channel)
        for stream, wanted in ((one, ["x", "last"]), (two, ["x", "last"])):
            assert [(await stream.next()).event for _ in wanted] == wanted
        for stream in (other, stranger):
            assert (await stream.next()).event == "last"


async def test_events_come_in_order(demo_server: Server) -> None:
    """All of them, to whoever keeps up."""
    user = new_room()
    async with reading(demo_server.url, user) as ann:
        for number in range(200):
            await publish(demo_server.url, user, "x", {"n": number})
        assert [(await ann.next()).json()["n"] for _ in range(200)] == list(range(200))


async def test_silence_has_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named events with the time, after a period in which nothing came."""
    monkeypatch.setattr("streaming.channels.HEARTBEAT", 0.3)
    async with in_process(build(Config())) as url, reading(url, "ann") as ann:
        for _ in range(2):
            told = await ann.next()
            assert told.event == "heartbeat" and list(told.json()) == ["timestamp"]
            # As `connected` says it (RFC 3339), to the millisecond.
            assert len(told.json()["timestamp"]) == len(ann.first.json()["timestamp"])
            assert told.json()["timestamp"] > ann.first.json()["timestamp"]
        await publish(url, "ann", "x", {})
        assert (await ann.next()).event == "x"
        assert (await ann.next()).event == "heartbeat"


def test_the_period_is_thirty_seconds() -> None:
    """Clients of these streams count on it."""
    assert HEARTBEAT == 30.0


# --- bounds -------------------------------------------------------------------------------------


async def test_a_user_has_five_streams(demo_server: Server) -> None:
    """The sixth gets 429 and when to come back, whatever its channel; the five stay, another person
    has their own, and one that is closed makes place.
    """
    user = new_room()
    path = f"{demo_server.url}/api/v1/sse/stream/other"
    async with contextlib.AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(reading(demo_server.url, user)) for _ in range(5)
        ]
        async with ask("GET", path, headers={"X-User-Id": user}) as answer:
            told = await answer.json()
        assert (answer.status, told["error"]["code"]) == (429, "too_many_streams")
        assert int(answer.headers["retry-after"]) >= 1
        async with reading(demo_server.url, new_room()):
            assert await publish(demo_server.url, user, "x", {}) == 5
        for stream in streams:
            assert (await stream.next()).event == "x"
        streams[0].answer.connection.cut(rst=True)
        while await publish(demo_server.url, user, "y", {}) > 4:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)
        async with reading(demo_server.url, user):
            pass


async def test_the_number_of_streams_is_configured(server: StartServer) -> None:
    """`limits.streams_per_user`."""
    url = server(limits={"streams_per_user": 1}).url
    async with (
        reading(url, "ann"),
        ask("GET", f"{url}/api/v1/sse/stream/x", headers={"X-User-Id": "ann"}) as answer,
    ):
        assert answer.status == 429


async def test_a_reader_that_does_not_read_is_cut(server: StartServer) -> None:
    """What waits for it is bounded; others get everything."""
    process = server(delivery={"write_timeout": 1.0, "high_water": 1024})
    async with (
        connect(process.url, receive_buffer=2048) as stalled,
        reading(process.url, "ann") as ann,
    ):
        await stalled.request("GET", "/api/v1/sse/stream/work?user_id=ann")
        before = process.rss()
        sent = 0
        while await publish(process.url, "ann", "x", {"n": sent, "text": "x" * 50_000}) > 1:
            assert (await ann.next()).json()["n"] == sent
            sent += 1
        assert process.rss() - before < 100 * 2**20


# --- what is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", ["a:b", "a b", "x" * 129, "\x01"])
async def test_a_bad_channel_name_is_refused(demo_server: Server, channel: str) -> None:
    """To read and to publish; `:` would be another person's channel in Redis."""
    path = f"/api/v1/sse/stream/{quote(channel, safe='')}"
    status, told = await request(demo_server.url, "GET", path)
    assert (status, told["error"]["param"]) == (422, "channel")
    body = {"user_id": "ann", "channel": channel, "event": "x"}
    status, told = await request(demo_server.url, "POST", "/api/v1/sse/publish", body)
    assert status in (413, 422) and told["error"]["param"] == "channel"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"user_id": None}, "user_id"),
        ({"user_id": 7}, "user_id"),
        ({"channel": None}, "channel"),
        ({"event": None}, "event"),
        ({"event": "a b"}, "event"),
        ({"event": "a\nb"}, "event"),
        ({"data": "x" * 300_000}, "body"),
    ],
)
async def test_a_wrong_publish_is_refused(
    demo_server: Server, change: dict[str, Any], param: str
) -> None:
    """With the field's name."""
    body = {"user_id": "ann", "channel": "work", "event": "x", "data": {}} | change
    status, told = await request(demo_server.url, "POST", "/api/v1/sse/publish", body)
    assert (status, told["error"]["param"]) == (413 if param == "body" else 422, param)


async def test_deep_data_is_published_or_refused(demo_server: Server) -> None:
    """It breaks no stream."""
    user = new_room()
    async with reading(demo_server.url, user) as ann:
        for depth in (248, 250, 252, 400):
            deep = b"[" * depth + b"]" * depth
            body = b'{"channel":"work","event":"x","user_id":"%b","data":{"a":%b}}'
            url = f"{demo_server.url}/api/v1/sse/publish"
            async with ask("POST", url, body=body % (user.encode(), deep)) as answer:
                assert answer.status in (202, 400)
                await answer.body()
            if answer.status == 202:
                assert (await ann.next()).event == "x"
        await publish(demo_server.url, user, "last", {})
        assert (await ann.next()).event == "last"


async def test_a_channel_over_ndjson(demo_server: Server) -> None:
    """One object a line for who asks for it, with the event's name; bare text is refused."""
    path, user = f"{demo_server.url}/api/v1/sse/stream/work", new_room()
    headers = {"Accept": MEDIA["ndjson"], "X-User-Id": user}
    async with ask("GET", path, headers=headers) as answer:
        items = answer.items(Ndjson())
        told = await anext(items)
        assert (told["type"], told["channel"]) == ("connected", "work")
        await publish(demo_server.url, user, "task.created", {"n": 1})
        told = await anext(items)
        assert (told["type"], told["n"]) == ("task.created", 1)
    async with ask("GET", f"{path}?format=text") as answer:
        assert answer.status == 422
