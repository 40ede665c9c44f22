"""`GET /api/stream`, which counts, to try a client or a proxy on; and what machines ask."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from typing import Any

import pytest

from tests.clients import MEDIA
from tests.endpoints import url_of
from tests.processes import Server
from tests.readers import DataBlocks, DataLines, Ndjson, Sse, Text, ask, connect

PATH = "/api/stream"
each_http = pytest.mark.parametrize("http", ["1.1", "1.0"])


def without_times(items: list[Any]) -> list[Any]:
    """The objects without their timestamps, which rise and are of today."""
    times = [item.pop("timestamp") for item in items if item["type"] == "data"]
    assert times == sorted(times)
    assert all(abs(each / 1000 - time.time()) < 3600 for each in times)
    return items


def counted(first: int, last: int) -> list[Any]:
    """The objects of a count, from event `first` on (the start is event 1)."""
    data = [{"type": "data", "content": f"Message {n}"} for n in range(1, last + 1)]
    return [{"type": "start"}, *data, {"type": "end"}][first - 1 :]


# --- the stream ---------------------------------------------------------------------------------


@each_http
async def test_a_count_over_sse(demo_server: Server, http: str) -> None:
    """A start, the messages, an end; each id stands in a block of its own after its data, and a
    reader of lines or of blocks sees the same objects.
    """
    async with ask("GET", url_of(demo_server.url, PATH, count=3, interval=0), http=http) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["cache-control"] == "no-cache, no-transform"
        assert answer.headers["x-accel-buffering"] == "no"
        body = await answer.body()
        assert answer.ended == "end"
        assert await answer.connection.leftover() == b""
    shape = rb": stream\n\n" + rb'(?:data: (\{"type":.+\})\n\nid: api_stream_count-(\d)\n\n)' * 5
    found = re.fullmatch(shape, body)
    assert found, body
    assert found.groups()[1::2] == (b"1", b"2", b"3", b"4", b"5")
    messages = Sse().feed(body)
    assert without_times([message.json() for message in messages]) == counted(1, 3)
    datas = [message.data for message in messages]
    assert DataLines().feed(body) == DataBlocks().feed(body) == datas


@each_http
async def test_a_count_in_other_framings(demo_server: Server, http: str) -> None:
    """NDJSON is the same objects, each with its id; text is the messages, one a line."""
    for wish in ({"format": "ndjson"}, {"headers": {"Accept": MEDIA["ndjson"]}}):
        headers = wish.pop("headers", None)
        url = url_of(demo_server.url, PATH, count=3, interval=0, **wish)
        async with ask("GET", url, http=http, headers=headers) as answer:
            assert answer.headers["content-type"] == MEDIA["ndjson"]
            items = await answer.read(Ndjson())
        assert [item.pop("id") for item in items] == [f"api_stream_count-{n}" for n in range(1, 6)]
        assert without_times(items) == counted(1, 3)
    url = url_of(demo_server.url, PATH, count=3, interval=0, format="text")
    async with ask("GET", url, http=http) as answer:
        assert "".join(await answer.read(Text())) == "Message 1\nMessage 2\nMessage 3\n"


async def test_axios_gets_the_default(demo_server: Server) -> None:
    """What axios always sends is no wish for text."""
    headers = {"Accept": "application/json, text/plain, */*"}
    url = url_of(demo_server.url, PATH, count=0)
    async with ask("GET", url, headers=headers) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        assert [m.json() for m in await answer.read(Sse())] == [{"type": "start"}, {"type": "end"}]


async def test_the_defaults(demo_server: Server) -> None:
    """Ten messages, a second between two: the first at once, the next not before its time."""
    async with ask("GET", demo_server.url + PATH) as answer:
        messages, began = answer.items(Sse()), time.monotonic()
        taken = [await anext(messages) for _ in range(3)]
        assert time.monotonic() - began > 0.9
        assert without_times([m.json() for m in taken]) == counted(1, 10)[:3]
    # A message is never later than it should be because of another: nobody waits for the last.
    async with ask("GET", url_of(demo_server.url, PATH, count=1, interval=3600)) as answer:
        assert without_times([m.json() for m in await answer.read(Sse())]) == counted(1, 1)


async def test_an_interval(demo_server: Server) -> None:
    """Messages come one by one, so far apart as was asked."""
    url = url_of(demo_server.url, PATH, count=5, interval=0.1)
    async with ask("GET", url) as answer:
        items = [message.json() for message in await answer.read(Sse())]
    times = [item["timestamp"] for item in items if item["type"] == "data"]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(gaps) == 4
    assert all(gap >= 95 for gap in gaps)


async def test_many_at_once(demo_server: Server) -> None:
    """Counts do not disturb each other."""

    async def count(last: int) -> None:
        url = url_of(demo_server.url, PATH, count=last, interval=0.001)
        async with ask("GET", url) as answer:
            items = [message.json() for message in await answer.read(Sse())]
        assert without_times(items) == counted(1, last)

    await asyncio.gather(*map(count, range(50)))


async def test_a_connection_serves_again(demo_server: Server) -> None:
    """After a count the same connection takes the next request."""
    async with connect(demo_server.url) as connection:
        for _ in range(3):
            answer = await connection.request("GET", f"{PATH}?count=2&interval=0")
            items = [message.json() for message in await answer.read(Sse())]
            assert without_times(items) == counted(1, 2)
        assert await (await connection.request("GET", "/health")).json() == {"status": "healthy"}


# --- resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["header", "query"])
async def test_it_resumes(demo_server: Server, by: str) -> None:
    """From every position it goes on with the next event, in any framing; after the end: 204."""
    for at in range(7):
        position = f"api_stream_count-{at}"
        headers = {"Last-Event-ID": position} if by == "header" else {}
        query = {"last_event_id": position} if by == "query" else {}
        for framing, reader in (("sse", Sse), ("ndjson", Ndjson)):
            url = url_of(demo_server.url, PATH, count=3, interval=0, format=framing, **query)
            async with ask("GET", url, headers=headers) as answer:
                if at >= 5:
                    assert (answer.status, await answer.body()) == (204, b"")
                    continue
                items: list[Any] = await answer.read(reader())
            if framing == "sse":
                ids = [message.id for message in items]
                items = [message.json() for message in items]
                # Each message has the id of the one before: its own comes in the block after it.
                assert ids[1:] == [f"api_stream_count-{n}" for n in range(at + 1, 5)]
            else:
                ids = [item.pop("id") for item in items]
                assert ids == [f"api_stream_count-{n}" for n in range(at + 1, 6)]
            assert without_times(items) == counted(at + 1, 3)


async def test_event_source_counts_on(demo_server: Server) -> None:
    """Cut after each message, an `EventSource` hears all of them once and is told to stop."""
    items, last_event_id, connections = [], "", 0
    url = url_of(demo_server.url, PATH, count=5, interval=0.01)
    while True:
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        async with ask("GET", url, headers=headers) as answer:
            connections += 1
            if answer.status == 204:
                break
            parser, body = Sse(), b""
            async for piece in answer.pieces():
                body += piece
                head, found, _ = body.partition(b"-")
                if found and b"\n\n" in body[len(head) :]:
                    body = body[: body.index(b"\n\n", len(head)) + 2]
                    break
            items += [message.json() for message in parser.feed(body)]
            last_event_id = parser.last_event_id
    assert connections == 8
    assert without_times(items) == counted(1, 5)


async def test_what_cannot_be_resumed(demo_server: Server) -> None:
    """A position of anything else is 410."""
    for position in ("7", "x", "api_stream_count", "api_stream_count-x", f"{'0' * 32}-1", "-1"):
        headers = {"Last-Event-ID": position}
        async with ask("GET", demo_server.url + PATH, headers=headers) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["code"], error["param"]) == (410, "gone", "Last-Event-ID")


async def test_a_count_that_nobody_reads(demo_server: Server) -> None:
    """The longest count there is, to a client that does not read: it costs next to nothing, and
    when the client reads on, it is exact.
    """
    before = demo_server.rss()
    async with connect(demo_server.url, receive_buffer=4096) as connection:
        answer = await connection.request("GET", f"{PATH}?count=1000000&interval=0&format=ndjson")
        seen = answer.items(Ndjson())
        assert (await anext(seen))["type"] == "start"
        idle = demo_server.cpu()
        for _ in range(10):
            await asyncio.sleep(0.1)
            assert demo_server.rss() < before + 32 * 2**20
        assert demo_server.cpu() - idle < 0.3
        for n in range(1, 20_000):
            assert (await anext(seen))["content"] == f"Message {n}"
    # Nor does what is left of it, once the client has gone.
    busy = demo_server.cpu()
    async with ask("GET", demo_server.url + "/health") as answer:
        assert answer.status == 200
    assert demo_server.cpu() - busy < 0.5


# --- machines -----------------------------------------------------------------------------------


@each_http
async def test_it_is_alive(demo_server: Server, http: str) -> None:
    """Health, readiness and a heartbeat, as JSON that nobody stores."""
    for method, path in (
        ("GET", "/health"), ("GET", "/ready"),
        ("GET", "/api/heartbeat"), ("POST", "/api/heartbeat"),
    ):  # fmt: skip
        async with ask(method, demo_server.url + path, http=http) as answer:
            assert answer.status == 200
            assert answer.headers["content-type"] == "application/json"
            assert answer.headers["cache-control"] == "no-store"
            said = await answer.json()
        stamp = said.pop("timestamp", None)
        assert said == {"status": {"/health": "healthy", "/ready": "ready"}.get(path, "ok")}
        assert (stamp is not None) is (path == "/api/heartbeat")
        assert stamp is None or re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", stamp)


async def test_a_heartbeat_takes_any_body(demo_server: Server) -> None:
    """What is posted to it does not matter."""
    for body in (b"", b"{", b'{"a":1}', b"\xff" * 1000):
        async with ask("POST", demo_server.url + "/api/heartbeat", body=body) as answer:
            assert (await answer.json())["status"] == "ok"
