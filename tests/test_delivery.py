"""How streams are framed on HTTP/1.0 and 1.1, what they say in silence, and who reads them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest

from tests.behaviour import expected
from tests.clients import (
    KINDS,
    OLD_KINDS,
    PROMPT,
    Kind,
    asked,
    attach,
    attached,
    named,
    see,
    start,
    stop,
    text_of,
)
from tests.conftest import SOAK
from tests.processes import Server, UpstreamProcess, until
from tests.readers import Answer, Ndjson, Sse, Text, ask, connect
from tests.sdk import client_of, said, stream

CHAT = Kind("chat")
HEARTBEAT = 0.2


@pytest.fixture(scope="module")
def beating(
    tmp_path_factory: pytest.TempPathFactory, upstream: UpstreamProcess
) -> Iterator[Server]:
    """A server with short heartbeats."""
    config = {
        "model": {"name": "up:", "base_url": upstream.base},
        "delivery": {"heartbeat": HEARTBEAT},
        "generation": {"commit_after": 0.5},
    }
    process = Server(tmp_path_factory.mktemp("beating"), config)
    yield process
    process.stop()


# --- HTTP ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
async def test_http_1_1_is_chunked_and_stays_open(beating: Server, kind: Kind) -> None:
    """A stream ends with its last chunk, live and replayed, and the connection serves the next
    request; no byte stands between two answers, or comes after the last, heartbeats included.
    """
    model = named("tokens=30,rate=200")
    async with asked(beating.url, CHAT, model) as first, connect(beating.url) as connection:
        stream_id = first.headers["x-stream-id"]
        path = f"/api/v1/streams/{stream_id}/events"
        for _ in range(2):
            target = f"{path}?dialect={kind.dialect}&format={kind.framing}"
            answer = await connection.request("GET", target)
            assert answer.headers["transfer-encoding"] == "chunked"
            assert "content-length" not in answer.headers
            assert answer.headers.get("connection", "keep-alive").lower() == "keep-alive"
            seen = await see(kind, answer)
            assert (seen.text, seen.ended) == (expected(model, PROMPT), "end")
        await asyncio.sleep(2 * HEARTBEAT)
        answer = await connection.request("GET", "/health", headers={"Connection": "close"})
        assert await answer.json() == {"status": "healthy"}
        assert await connection.leftover() == b""


@pytest.mark.parametrize("kind", OLD_KINDS, ids=str)
async def test_http_1_0_ends_with_the_connection(beating: Server, kind: Kind) -> None:
    """No chunks, and the connection is closed at the end, also to a client that would keep it."""
    model = named("tokens=30,rate=200")
    async with asked(beating.url, kind, model, headers={"Connection": "keep-alive"}) as answer:
        assert "transfer-encoding" not in answer.headers
        assert answer.headers["connection"] == "close"
        seen = await see(kind, answer)
        assert (seen.text, seen.ended) == (expected(model, PROMPT), "end")
        assert await answer.connection.leftover() == b""


@pytest.mark.parametrize("kind", KINDS, ids=str)
async def test_headers(beating: Server, kind: Kind) -> None:
    """No proxy and no cache holds a stream back, and every answer names its stream."""
    async with asked(beating.url, kind, named("tokens=3")) as answer:
        await answer.body()
    media = {"sse": "text/event-stream", "ndjson": "application/x-ndjson", "text": "text/plain"}
    assert answer.headers["content-type"].startswith(media[kind.framing])
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-cache, no-transform"
    assert len(answer.headers["x-stream-id"]) >= 16
    assert answer.headers["x-request-id"]


async def test_a_client_may_ask_to_close(beating: Server) -> None:
    """`Connection: close` over HTTP/1.1: chunks, an end, then FIN."""
    async with asked(beating.url, CHAT, named("tokens=3")) as answer:
        assert answer.headers["transfer-encoding"] == "chunked"
        assert answer.headers["connection"] == "close"
        assert (await see(CHAT, answer)).ending == "finished"
        assert await answer.connection.leftover() == b""


# --- the beginning ------------------------------------------------------------------------------


async def first_bytes(answer: Answer) -> bytes:
    return await anext(answer.pieces())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.dialect != "openai"], ids=str)
async def test_headers_come_at_once(beating: Server, kind: Kind) -> None:
    """Long before the first token; in SSE with a comment, and *content* has its first id then."""
    began = time.monotonic()
    async with asked(beating.url, kind, named("delay=60")) as answer:
        assert answer.status == 200
        stream_id = answer.headers["x-stream-id"]
        if kind.framing == "sse":
            opening = await first_bytes(answer)
            assert opening.startswith(b": stream\n\n")
            if kind.dialect == "content":
                assert opening == f": stream\n\nid: {stream_id}-1\n\n".encode()
        assert time.monotonic() - began < 30
    await stop(beating.url, stream_id)


async def test_openai_waits_for_the_first_token(relay_server: Server) -> None:
    """Its status comes with the first token, and no comment before the first chunk."""
    began = time.monotonic()
    async with asked(relay_server.url, Kind("openai"), named("delay=0.5,tokens=3")) as answer:
        assert time.monotonic() - began >= 0.5
        assert (await first_bytes(answer)).startswith(b"data: {")


# --- silence ------------------------------------------------------------------------------------


async def test_sse_has_comments_in_silence(beating: Server) -> None:
    """Before the first token and between two; *openai* has them only after its headers."""

    async def check(kind: Kind) -> None:
        model, parser = named("delay=0.9,tokens=2,rate=1"), Sse()
        async with asked(beating.url, kind, model) as answer:
            messages = await answer.read(parser)
        items = [message.json() for message in messages if message.data != "[DONE]"]
        assert "".join(text_of(kind, item) for item in items) == expected(model, PROMPT)
        beats = parser.comments.count("heartbeat")
        assert beats >= 4
        opening = [] if kind.dialect == "openai" else ["stream"]
        assert parser.comments == opening + ["heartbeat"] * beats
        assert not any(message.event == "heartbeat" for message in messages)

    await asyncio.gather(*(check(kind) for kind in KINDS if kind.framing == "sse"))


async def test_other_framings_are_silent(beating: Server) -> None:
    """NDJSON and text carry nothing but the dialect: no blank line, no object of another kind."""

    async def check(kind: Kind) -> None:
        model = named("delay=0.9,tokens=2,rate=1")
        seen = await start(beating.url, kind, model)
        assert seen.text == expected(model, PROMPT)
        if kind.framing == "ndjson":
            assert not any({"type", "timestamp"} >= set(item) for item in seen.items)

    await asyncio.gather(*(check(kind) for kind in KINDS if kind.framing != "sse"))


async def test_heartbeats_by_name(beating: Server) -> None:
    """`heartbeat=ping` makes them an event that JavaScript can see in SSE, and in NDJSON an object
    of that type; both with the time and without an id. Text has none ever.
    """

    async def check(path: str, kind: Kind) -> None:
        query = f"dialect={kind.dialect}&format={kind.framing}&heartbeat=ping"
        async with ask("GET", f"{beating.url}{path}/events?{query}") as answer:
            if kind.framing == "text":
                assert "".join(await answer.read(Text())) == text
                return
            if kind.framing == "ndjson":
                items = await answer.read(Ndjson())
                beats = [item for item in items if item.get("type") == "ping"]
                assert {tuple(beat) for beat in beats} == {("type", "timestamp")}
            else:
                parser = Sse()
                messages = await answer.read(parser)
                beats = [m.json() for m in messages if m.event == "ping"]
                items = [m.json() for m in messages if m.data != "[DONE]" and m.event != "ping"]
                assert "heartbeat" not in parser.comments
                assert not any("timestamp" in m.data and m.event == "message" for m in messages)
        assert len(beats) >= 2
        now = time.time() * 1000
        assert all(now - 60_000 < beat["timestamp"] <= now for beat in beats)
        assert "".join(text_of(kind, item) for item in items if item not in beats) == text

    model = named("delay=1.2,tokens=2")
    text = expected(model, PROMPT)
    async with asked(beating.url, CHAT, model) as running:
        path = f"/api/v1/streams/{running.headers['x-stream-id']}"
        await asyncio.gather(*(check(path, kind) for kind in KINDS if kind.dialect != "chat"))


async def test_a_stock_sdk_passes_over_comments(beating: Server) -> None:
    """Heartbeats after the headers of *openai*, which go out after `commit_after`."""
    model = named("delay=1.5,tokens=3")
    async with client_of(beating) as client:
        assert said(await stream(client, model)) == expected(model, PROMPT)


async def test_no_heartbeat_while_data_flows(
    server: Callable[..., Server], upstream: UpstreamProcess
) -> None:
    """Only silence has heartbeats."""
    model = {"name": "up:", "base_url": upstream.base}
    steady, parser = server(model=model, delivery={"heartbeat": 1.0}), Sse()
    async with asked(steady.url, CHAT, named("tokens=125,rate=50")) as answer:
        await answer.read(parser)
    assert parser.comments == ["stream"]


# --- many readers, and readers that go ----------------------------------------------------------


async def test_many_readers_of_one_answer(relay_server: Server, upstream: UpstreamProcess) -> None:
    """A thousand, in every dialect and framing, over both versions of HTTP: each has the exact text
    and the end, and the model is called once.
    """
    count = 5000 if SOAK else 1000
    model = named("tokens=100,rate=20")
    kinds = [kind for kind in KINDS + OLD_KINDS if kind.dialect != "openai"]
    async with asked(relay_server.url, CHAT, model) as first:
        stream_id = first.headers["x-stream-id"]
        reading = [attach(relay_server.url, stream_id, kinds[i % len(kinds)]) for i in range(count)]
        seen = await asyncio.gather(*reading)
    assert {each.text for each in seen} == {expected(model, PROMPT)}
    assert {(each.ending, each.ended) for each in seen} == {("finished", "end")}
    assert len(upstream.log(model)) == 1


@pytest.mark.parametrize("rst", [False, True], ids=["FIN", "RST"])
async def test_readers_that_go_leave_nothing_behind(
    relay_server: Server, upstream: UpstreamProcess, rst: bool
) -> None:
    """Sixty that go midway, by FIN or by RST: their sockets are given back while the answer still
    runs, and whoever stays has all of it.
    """
    model = named("tokens=5000,rate=100")
    async with asked(relay_server.url, CHAT, model) as first:
        stream_id = first.headers["x-stream-id"]
        await upstream.requests(model)
        before = relay_server.files()

        async def go(kind: Kind) -> None:
            async with attached(relay_server.url, stream_id, kind) as answer:
                async for _ in answer.pieces(cut_after=2000, rst=rst):
                    pass
                assert answer.ended == "cut"

        await asyncio.gather(*(go(kind) for kind in (KINDS + OLD_KINDS) * 2))
        await until(lambda: relay_server.files() <= before)
        await stop(relay_server.url, stream_id)
        seen = await see(CHAT, first)
    assert seen.ending == "cancelled"
    assert expected(model, PROMPT).startswith(seen.text)
    assert (await attach(relay_server.url, stream_id, CHAT)).text.endswith(seen.text)
