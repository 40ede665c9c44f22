"""Streams through nginx as deploy/ configures it, and through two in a row: at once, one by one,
through silence, in both directions, exact, and to the end that was meant.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.behaviour import expected
from tests.clients import (
    DONE,
    JSON_PATHS,
    KINDS,
    PROMPT,
    Kind,
    asked,
    attach,
    named,
    see,
    start,
    text_of,
    whole,
)
from tests.conftest import StartNginx, StartServer
from tests.endpoints import ENDPOINTS, asking, url_of
from tests.nginx import Way
from tests.people import TRANSPORTS, Stream, empty, joined, new_room, on_socket, publish
from tests.processes import Server, UpstreamProcess
from tests.raw_socket import dialled, frame
from tests.readers import Answer, Ndjson, Parser, Sse, Text, ask

CHAT, NDJSON = Kind("chat"), Kind("content", "ndjson")
PARSERS: dict[str, type[Parser[Any]]] = {"sse": Sse, "ndjson": Ndjson, "text": Text}
SHORT = {"proxy_read_timeout 75s": "proxy_read_timeout 2s"}
WAIT = 60.0  # seconds for what should be there at once


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory, upstream: UpstreamProcess) -> Iterator[Server]:
    """An instance with short clocks, whose model is the upstream."""
    config = {
        "server": {"drain": 0.1},
        "model": {"name": "up:", "base_url": upstream.base},
        "delivery": {"heartbeat": 0.3},
        "generation": {"commit_after": 0.5},
    }
    process = Server(tmp_path_factory.mktemp("quick"), config)
    yield process
    process.stop()


async def read_until(kind: Kind, answer: Answer, wanted: str) -> None:
    """Reads until exactly this text has come."""
    text = ""
    async with asyncio.timeout(WAIT):
        async for item in answer.items(PARSERS[kind.framing]()):
            if kind.framing == "sse":
                item = DONE if item.data == DONE else item.json()
            text += text_of(kind, item)
            if text == wanted:
                return
    raise AssertionError(f"{kind}: {text!r} instead of {wanted!r}")


# --- at once, and one by one --------------------------------------------------------------------


async def test_the_first_bytes_come_at_once(
    nginx: StartNginx, quick: Server, upstream: UpstreamProcess
) -> None:
    """The status of every stream, and the opening comment of SSE (*openai*: the role), are there
    while the model has not said a word yet.
    """
    way, model = nginx(quick.url), named("delay=600")
    async with AsyncExitStack() as opened, asyncio.timeout(WAIT):
        for kind in KINDS:
            answer = await opened.enter_async_context(asked(way.url, kind, model))
            assert answer.status == 200
            assert answer.headers["cache-control"] == "no-cache, no-transform"
            if kind.framing == "sse":
                first = await anext(answer.pieces())
                assert first.startswith(b"data: {" if kind.dialect == "openai" else b":")
        assert not any(entry["first_token_at"] for entry in upstream.log(model))


async def say_and_stall(way: Way, upstream: UpstreamProcess) -> None:
    """In every dialect and framing: what the model said before it fell silent has come, whatever
    coding the client would take.
    """

    async def read(kind: Kind, said: int) -> None:
        model = named(f"tokens=20,stall={said}")
        wanted = "".join(f"{token} " for token in expected(model, PROMPT).split()[:said])
        headers = {"Accept-Encoding": "gzip, deflate, br"}
        async with asked(way.url, kind, model, headers=headers) as answer:
            assert "content-encoding" not in answer.headers
            await read_until(kind, answer, wanted)
            (entry,) = upstream.log(model)
            assert entry["closed_at"] is None

    await asyncio.gather(*(read(kind, said) for kind in KINDS for said in (1, 4)))


async def test_each_token_comes_when_the_model_has_said_it(
    nginx: StartNginx, quick: Server, upstream: UpstreamProcess
) -> None:
    """Nothing waits for a buffer to be full, or for an end."""
    await say_and_stall(nginx(quick.url), upstream)


async def test_a_front_that_buffers_does_not_buffer_streams(
    quick: Server, upstream: UpstreamProcess, tmp_path: Path
) -> None:
    """One that is not ours to configure, as it comes, is told by X-Accel-Buffering, which the nginx
    before the instances passes on.
    """
    changes = {"proxy_buffering off;": "", "proxy_http_version 1.1;": ""}
    way = Way(tmp_path, [quick.url], two=True, front_changes=changes)
    try:
        await say_and_stall(way, upstream)
    finally:
        way.stop()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_room_events_come_one_by_one(
    nginx: StartNginx, quick: Server, transport: str
) -> None:
    """Each has been read before the next is published."""
    way, room = nginx(quick.url), new_room()
    async with joined(way.url, room, "reader", transport) as reader:
        for number in range(30):
            await publish(way.url, room, {"content": f"word {number}"}, "writer")
            assert (await reader.hear("message"))["content"] == f"word {number}"


# --- silence ------------------------------------------------------------------------------------


async def test_a_long_silence_survives(nginx: StartNginx, quick: Server) -> None:
    """Before the first token and between two the model is silent for longer than nginx waits for a
    word. Heartbeats hold SSE of every dialect, NDJSON that asks for them, rooms, and WebSockets;
    answers in one piece have a longer wait of their own. NDJSON and text without heartbeats are
    cut, never ended, and can be resumed.
    """
    way, room, words = nginx(quick.url, changes=SHORT), new_room(), "delay=5,tokens=2,rate=0.2"
    wanted = expected(f"up:{words}", PROMPT)
    room_events = url_of(way.url, f"/api/v1/rooms/{room}/events", format="ndjson", heartbeat="beat")

    async def held(kind: Kind) -> None:
        seen = await start(way.url, kind, named(words))
        assert (seen.text, seen.ending, seen.ended) == (wanted, "finished", "end"), kind

    async def beating() -> None:
        post = next(e for e in ENDPOINTS if (e.method, e.path) == ("POST", "/stream"))
        query = {"heartbeat": "beat", "format": "ndjson"}
        async with asking(way.url, post, query=query, model=named(words)) as answer:
            items = await answer.read(Ndjson())
        assert "".join(item.get("content", "") for item in items) == wanted
        assert sum(item.get("type") == "beat" for item in items) > 10
        assert answer.ended == "end"

    async def cut(framing: str) -> None:
        seen = await start(way.url, Kind("content", framing), named(words))
        assert (seen.text, seen.ended) == ("", "cut")
        again = await attach(quick.url, seen.stream_id, Kind("content", framing))
        assert (again.text, again.ended) == (wanted, "end")

    async def in_one_piece(path: str) -> None:
        seen = await whole(way.url, path, named(words))
        assert (seen.status, seen.text) == (200, wanted)

    async with (
        joined(way.url, room, "a", "ws") as socket,
        joined(way.url, room, "b", "sse") as sse,
        ask("GET", room_events) as answer,
    ):
        people = (socket, sse, Stream(answer, Ndjson()))
        hearing = [asyncio.ensure_future(each.hear("message")) for each in people]
        await asyncio.gather(
            *(held(kind) for kind in KINDS if kind.framing == "sse" and kind.dialect != "native"),
            beating(),
            *(cut(framing) for framing in ("ndjson", "text")),
            *(in_one_piece(path) for path in JSON_PATHS),
        )
        await publish(way.url, room, {"content": "still here?"})
        for heard in await asyncio.gather(*hearing):
            assert heard["content"] == "still here?"


# --- all that goes through ----------------------------------------------------------------------


async def test_every_answer_is_exact(nginx: StartNginx, quick: Server) -> None:
    """Every endpoint, by GET and by POST, every dialect and framing, streamed and in one piece."""
    way, words = nginx(quick.url), "tokens=300,rate=1000,u2028"
    wanted = expected(f"up:{words}", PROMPT)
    for seen in await asyncio.gather(*(start(way.url, kind, named(words)) for kind in KINDS)):
        assert (seen.text, seen.ending, seen.ended) == (wanted, "finished", "end")
    for seen in await asyncio.gather(*(whole(way.url, path, named(words)) for path in JSON_PATHS)):
        assert (seen.status, seen.text) == (200, wanted)
    for endpoint in ENDPOINTS:
        async with asking(way.url, endpoint, model=named(words)) as answer:
            seen = await see(Kind(endpoint.dialect, endpoint.framing), answer)
        assert (seen.text, seen.ended) == (wanted, "end"), endpoint


async def test_one_connection_carries_many_requests(nginx: StartNginx, quick: Server) -> None:
    """A client's connection outlives its streams, as it does without nginx."""
    way = nginx(quick.url)
    async with ask("GET", f"{way.url}/health", keep_alive=True) as answer:
        await answer.body()
        for _ in range(5):
            body = {"prompt": PROMPT, "model": named("tokens=5")}
            again = await answer.connection.request("POST", "/stream", json_body=body)
            assert (await see(Kind("content"), again)).ending == "finished"


async def test_resume_by_last_event_id(nginx: StartNginx, quick: Server) -> None:
    """A client that is cut comes back on the same path, by POST and by GET, and has the exact text
    in the end.
    """
    way, words = nginx(quick.url), "tokens=100,rate=500"
    wanted = expected(f"up:{words}", PROMPT)
    for method in ("POST", "GET"):
        parser = Sse()
        async with asked(way.url, CHAT, named(words)) as answer:
            stream_id = answer.headers["x-stream-id"]
            messages = await answer.read(parser, cut_after=3000)
        path = "/api/chat/stream" if method == "POST" else f"/api/v1/streams/{stream_id}/events"
        headers = {"Last-Event-ID": parser.last_event_id, "Accept": "text/event-stream"}
        url = url_of(way.url, path, dialect="chat")
        async with ask(method, url, headers=headers) as answer:
            rest = await see(CHAT, answer)
        assert "".join(text_of(CHAT, each.json()) for each in messages) + rest.text == wanted
        assert rest.ending == "finished"


async def test_people_and_a_model_in_a_room(nginx: StartNginx, quick: Server) -> None:
    """WebSockets in both directions: messages small and large, typing, an answer to all that one of
    them stops, and a leave that the others see.
    """
    way, room = nginx(quick.url), new_room()
    async with joined(way.url, room, "ann") as ann:
        async with joined(way.url, room, "bob") as bob:
            assert (await ann.hear("user_joined"))["userId"] == "bob"
            for content in ("hello", "x" * 200_000, "ünï\u2028cödé"):
                ack = await bob.call("message", content=content)
                heard = await ann.hear("message", content=content)
                assert (heard["id"], heard["userId"]) == (ack["id"], "bob")
            await ann.say("typing", typing=True)
            await bob.hear("user_typing", userId="ann")
            model = named("tokens=5000,rate=100")
            started = await ann.call("generate", message="a joke", model=model)
            await bob.hear("stream_chunk", stream_id=started["stream_id"])
            await bob.say("stop", stream_id=started["stream_id"])
            await ann.hear("stream_cancelled")
        await ann.hear("user_left", userId="bob")
    async with on_socket(way.url, f"/ws/{room}", last_event_id=ack["id"]) as late:
        assert (await late.hear("joined"))["recovered"]


async def test_frames_come_back_as_they_were(nginx: StartNginx, quick: Server) -> None:
    """Text, binary, empty, a megabyte, pings; and the server's close code."""
    way = nginx(quick.url)
    async with dialled(way.url, "/echo") as socket:
        for opcode, payload in ((1, b"text"), (2, bytes(range(256))), (1, b""), (2, b"x" * 2**20)):
            await socket.send(frame(opcode, payload))
            back = await socket.receive()
            assert back and (back.opcode, back.payload) == (opcode, payload)
        await socket.send(frame(9, b"are you there?"))
        back = await socket.receive()
        assert back and (back.opcode, back.payload) == (10, b"are you there?")
    async with dialled(way.url, f"/ws/{new_room()}") as socket:
        await socket.send(frame(1, b"x" * 300_000))
        assert await socket.ended() == 1009


async def test_long_requests_go_through(nginx: StartNginx, quick: Server) -> None:
    """A GET's prompt stands in the first line; a room's name may have a slash in it; a body may be
    as large as the server takes, and what is larger is refused in the server's words.
    """
    way, prompt = nginx(quick.url), "word " * 6000
    query = {"prompt": prompt, "model": named("echo=100"), "format": "ndjson"}
    async with ask("GET", url_of(way.url, "/stream", **query)) as answer:
        assert (await see(NDJSON, answer)).text == prompt
    room = new_room() + "/a%2F?é"
    async with joined(way.url, room, transport="sse") as reader:
        await publish(way.url, room, {"content": "hello"})
        assert (await reader.hear("message"))["room"] == room
    for size, said in ((2**23, "prompt"), (2**23 + 1, "body")):
        head, tail = b'{"prompt": "', b'"}'
        body = head + b"x" * (size - len(head) - len(tail)) + tail
        async with ask("POST", f"{way.url}/stream", body=body) as answer:
            error = (await answer.json())["error"]
        assert (answer.status, error["code"], error["param"]) == (413, "too_large", said)
        assert error["request_id"] and answer.headers["cache-control"] == "no-store"


# --- a client that goes -------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["tokens=5000,rate=100", "delay=600"])
async def test_an_abort_reaches_the_model(
    nginx: StartNginx, server: StartServer, upstream: UpstreamProcess, words: str
) -> None:
    """A client that goes away, with a word or without, before the first token or later, ends its
    answer where nobody can come back to it: the model's connection is closed.
    """
    generation = {"linger": 0.0, "commit_after": 0.1}
    model = {"name": "up:", "base_url": upstream.base}
    way = nginx(server(model=model, generation=generation).url)
    for number, kind in enumerate(kind for kind in KINDS if kind.dialect != "native"):
        name = named(words)
        async with asked(way.url, kind, name) as answer:
            if words != "delay=600":
                await anext(answer.pieces())
            (entry,) = await upstream.requests(name)
            assert entry["closed_at"] is None
            answer.connection.cut(rst=bool(number % 2))
            (entry,) = await upstream.requests(name, closed=True)
            assert entry["closed_by"] == "client"


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_who_is_cut_off_has_left_the_room(
    nginx: StartNginx, server: StartServer, transport: str
) -> None:
    """Presence follows the clients' connections, not nginx's."""
    instance, room = server(rooms={"grace": 0.0}), new_room()
    way = nginx(instance.url)
    for rst in (False, True):
        async with joined(way.url, room, "ann", transport) as ann:
            ann.cut(rst)
            await empty(instance.url, room)
