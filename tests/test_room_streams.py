"""Rooms over HTTP: SSE and NDJSON streams, publishing, history, presence, the list, deletion."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from tests.clients import MEDIA
from tests.conftest import StartServer
from tests.people import TRANSPORTS, empty, following, joined, new_room, publish, request
from tests.processes import Server
from tests.readers import ask


def without(told: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in told.items() if name not in names}


async def pages(url: str, room: str, limit: int) -> list[list[str]]:
    """All history, page by page: the contents."""
    found, before = [], None
    while True:
        path = f"/api/v1/rooms/{room}/messages"
        query = {"limit": limit, "before": before}
        status, page = await request(url, "GET", path, None, None, None, **query)
        assert status == 200
        found.append([message["content"] for message in page["messages"]])
        before = page["next"]
        if before is None:
            return found


# --- following ----------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_every_stream_begins_with_joined(demo_server: Server, transport: str) -> None:
    """The same on all transports."""
    room = new_room()
    _, first = await publish(demo_server.url, room, {"content": "Hi"}, "ann")
    async with following(demo_server.url, room, transport, "bob") as bob:
        told = await bob.next()
    (message,) = told.pop("messages")
    assert told == {
        "type": "joined",
        "id": first["id"],
        "room": room,
        "recovered": False,
        "members": ["bob"],
        "active": [],
    }
    assert (message["id"], message["content"]) == (first["id"], "Hi")


async def test_a_newcomer_is_told_of_so_much(demo_server: Server) -> None:
    """Of large messages the last that go into a quarter of a megabyte, and one however large it
    is; what was before is in the history.
    """
    room = new_room()
    said = [f"{number} {'x' * 50_000}" for number in range(8)]
    for number, content in enumerate(said):
        body = {"content": content} if number % 2 else {"content": content[:2], "data": content}
        await publish(demo_server.url, room, body)
    async with following(demo_server.url, room) as ann:
        told = (await ann.hear("joined"))["messages"]
    assert [message["content"][:1] for message in told] == ["3", "4", "5", "6", "7"]
    path, before = f"/api/v1/rooms/{room}/messages", told[0]["id"]
    _, page = await request(demo_server.url, "GET", path, None, None, None, before=before)
    assert [message["content"][:1] for message in page["messages"]] == ["0", "1", "2"]
    await publish(demo_server.url, room, {"content": "x" * 150_000, "data": "x" * 110_000})
    async with following(demo_server.url, room) as ann:
        told = (await ann.hear("joined"))["messages"]
    assert [len(message["content"]) for message in told] == [150_000]


async def test_everybody_sees_the_same_frames(demo_server: Server) -> None:
    """On WebSocket, SSE and NDJSON: messages, other events, typing, an answer's start and end."""
    room = new_room()
    async with contextlib.AsyncExitStack() as stack:
        a, b, c = [
            await stack.enter_async_context(joined(demo_server.url, room, "ann", transport))
            for transport in TRANSPORTS
        ]
        await publish(demo_server.url, room, [{"content": "Hi"}, {"type": "poll", "data": [1]}])
        await a.say("typing")
        await a.say("generate", message="Go on", model="demo:tokens=5")
        heard = [await each.until("stream_end") for each in (a, b, c)]
    heard[0] = [told for told in heard[0] if told["type"] != "ack"]
    assert heard[0] == heard[1] == heard[2]
    types = [told["type"] for told in heard[0] if told["type"] != "stream_chunk"]
    assert types == ["message", "poll", "user_typing", "message", "stream_start", "stream_end"]


@pytest.mark.parametrize("framing", ["sse", "ndjson"])
async def test_headers_of_a_room_stream(demo_server: Server, framing: str) -> None:
    """No proxy and no cache holds it back."""
    path = f"{demo_server.url}/api/v1/rooms/{new_room()}/events"
    async with ask("GET", path, headers={"Accept": MEDIA[framing]}) as answer:
        assert answer.status == 200
        assert answer.headers["content-type"].startswith(MEDIA[framing])
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["cache-control"] == "no-cache, no-transform"


@pytest.mark.parametrize("format", ["text", "text/plain", "xml"])
async def test_a_room_is_no_bare_text(demo_server: Server, format: str) -> None:
    """There is SSE and NDJSON; another format is refused by name."""
    path = f"/api/v1/rooms/{new_room()}/events"
    status, told = await request(demo_server.url, "GET", path, format=format)
    assert (status, told["error"]["param"]) == (422, "format")


# --- publishing ---------------------------------------------------------------------------------


async def test_publish_one(demo_server: Server) -> None:
    """201 with its id, which is the id of the frame."""
    room = new_room()
    async with joined(demo_server.url, room) as ann:
        status, told = await publish(demo_server.url, room, {"content": "Hi", "data": 7}, "bob")
        frame = await ann.hear("message")
    assert (status, told) == (201, {"id": frame["id"]})
    assert (frame["userId"], frame["content"], frame["data"]) == ("bob", "Hi", 7)


async def test_publish_an_event_of_another_type(demo_server: Server) -> None:
    """It goes out by its own name, and is no message of the history."""
    room = new_room()
    async with joined(demo_server.url, room, None, "sse") as ann:
        await publish(demo_server.url, room, {"type": "world.update", "data": {"x": 1}}, "bob")
        told = await ann.hear("world.update")
        assert (told["userId"], told["data"], "content" in told) == ("bob", {"x": 1}, False)
    assert await pages(demo_server.url, room, 10) == [[]]


async def test_publish_a_batch(demo_server: Server) -> None:
    """All in a row, whoever else publishes meanwhile."""
    room = new_room()
    batches = [[{"content": f"{writer}.{n}"} for n in range(50)] for writer in range(4)]
    told = await asyncio.gather(*(publish(demo_server.url, room, batch) for batch in batches))
    for status, answer in told:
        offsets = [int(id.rpartition("-")[2]) for id in answer["ids"]]
        assert (status, offsets) == (201, list(range(offsets[0], offsets[0] + 50)))
    (page,) = await pages(demo_server.url, room, 1000)
    runs = [page[start : start + 50] for start in range(0, 200, 50)]
    assert sorted(runs) == [[each["content"] for each in batch] for batch in batches]


async def test_a_batch_with_one_bad_event_publishes_nothing(demo_server: Server) -> None:
    """All or none."""
    room = new_room()
    for bad in ({}, {"type": "joined"}, 7, {"content": 7}):
        status, _ = await publish(demo_server.url, room, [{"content": "Hi"}, bad])
        assert 400 <= status < 500
    assert await pages(demo_server.url, room, 10) == [[]]


@pytest.mark.parametrize("batch", [False, True])
async def test_an_idempotency_key_publishes_once(demo_server: Server, batch: bool) -> None:
    """The same key and body give the first answer, however often and however close together;
    another body is 422; another person's key is another key.
    """
    room = new_room()
    body = [{"content": "1"}, {"content": "2"}] if batch else {"content": "1"}
    told = await asyncio.gather(
        *(publish(demo_server.url, room, body, "ann", key="k") for _ in range(10))
    )
    assert all(each == told[0] and each[0] == 201 for each in told)
    status, refused = await publish(demo_server.url, room, {"content": "3"}, "ann", key="k")
    assert (status, refused["error"]["param"]) == (422, "Idempotency-Key")
    assert (await publish(demo_server.url, room, body, "bob", key="k"))[1] != told[0][1]
    (page,) = await pages(demo_server.url, room, 10)
    assert page == (["1", "2"] if batch else ["1"]) * 2


WRONG: dict[str, tuple[Any, int, str]] = {
    "nothing": ([], 400, "body"),
    "a number": (7, 400, "body"),
    "no object": ([7], 400, "body"),
    "no content": ({}, 422, "content"),
    "empty content": ({"content": ""}, 422, "content"),
    "content of another type": ({"content": [1]}, 422, "content"),
    "long content": ({"content": "x" * 200_001}, 413, "content"),
    "a large event": ({"content": "x", "data": "y" * 300_000}, 413, "body"),
    "a type with a space": ({"type": "a b"}, 422, "type"),
    "an empty type": ({"type": ""}, 422, "type"),
    "a type of another type": ({"type": 7}, 422, "type"),
    "the server's own type": ({"type": "joined"}, 422, "type"),
    "an ending": ({"type": "finished"}, 422, "type"),
    "a chunk": ({"type": "stream_chunk"}, 422, "type"),
    "too many": ([{"content": "x"}] * 101, 413, "body"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_a_wrong_publish_is_refused(demo_server: Server, what: str) -> None:
    """With the field's name; nothing is published."""
    body, status, param = WRONG[what]
    room = new_room()
    found, told = await publish(demo_server.url, room, body)
    assert (found, told["error"]["param"]) == (status, param)
    assert await pages(demo_server.url, room, 10) == [[]]


@pytest.mark.parametrize("depth", [200, 248, 250, 252, 400, 1500])
async def test_deep_data_is_published_whole_or_refused(demo_server: Server, depth: int) -> None:
    """It never breaks the room for who reads it, or comes later."""
    room = new_room()
    body = b'{"content":"x","data":' + b"[" * depth + b"]" * depth + b"}"
    url = f"{demo_server.url}/api/v1/rooms/{room}/messages"
    async with joined(demo_server.url, room) as ann:
        async with ask("POST", url, body=body) as answer:
            assert answer.status in (201, 400)
            published = answer.status == 201
            await answer.body()
        assert len(await ann.so_far()) == published
        assert len((await ann.call("history"))["messages"]) == published
    async with following(demo_server.url, room, "sse") as bob:
        assert len((await bob.next())["messages"]) == published
    assert (await publish(demo_server.url, room, {"content": "Hi"}))[0] == 201


# --- looking back -------------------------------------------------------------------------------


async def test_history_comes_in_pages(demo_server: Server) -> None:
    """The newest first, oldest first inside, each message once; an answer is a message."""
    room = new_room()
    await publish(demo_server.url, room, [{"content": str(n)} for n in range(5)])
    assert await pages(demo_server.url, room, 2) == [["3", "4"], ["1", "2"], ["0"]]
    assert await pages(demo_server.url, room, 5) == [list("01234")]
    async with joined(demo_server.url, room, "ann") as ann:
        await ann.say("generate", message="5", model="demo:tokens=3")
        end = await ann.hear("stream_end")
    path = f"/api/v1/rooms/{room}/messages"
    _, page = await request(demo_server.url, "GET", path, limit=2)
    question, answer = page["messages"]
    assert (question["content"], question["userId"]) == ("5", "ann")
    assert (answer["content"], answer["userId"]) == (end["content"], "assistant")
    assert (answer["id"], answer["data"]["stream_id"]) == (end["id"], end["stream_id"])


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"before": "x"}, "before"),
        ({"before": "epoch_of_another_life-7"}, "before"),
    ],
)
async def test_a_wrong_page_is_refused(
    demo_server: Server, query: dict[str, Any], param: str
) -> None:
    """With the field's name."""
    path = f"/api/v1/rooms/{new_room()}/messages"
    status, told = await request(demo_server.url, "GET", path, None, None, None, **query)
    assert (status, told["error"]["param"]) == (422, param)


# --- who and which ------------------------------------------------------------------------------


async def test_presence_and_the_list_of_rooms(server: StartServer) -> None:
    """Who is in a room on any transport; which rooms live, with how many people in each."""
    url = server().url
    async with contextlib.AsyncExitStack() as stack:
        for transport in TRANSPORTS:
            each = joined(url, "a", f"on {transport}", transport)
            await stack.enter_async_context(each)
        _, told = await request(url, "GET", "/api/v1/rooms/a/presence")
        assert told == {"room": "a", "members": ["on ndjson", "on sse", "on ws"]}
        _, sent = await publish(url, "b", {"content": "Hi"})
        _, told = await request(url, "GET", "/api/v1/rooms")
        by_name = {room["room"]: without(room, "room") for room in told["rooms"]}
        assert (by_name["a"]["members"], by_name["b"]["members"]) == (3, 0)
        assert by_name["b"]["position"] == sent["id"]


@pytest.mark.parametrize("room", ["a b", "x" * 10_000, "\x7f", "a\nb"])
async def test_a_bad_room_name_is_refused(demo_server: Server, room: str) -> None:
    """Everywhere, with the field's name."""
    told = await publish(demo_server.url, room, {"content": "Hi"})
    assert (told[0], told[1]["error"]["param"]) == (422, "room")


@pytest.mark.parametrize("room", ["a/b", "ä", "conv", "a:b", "%2e", "..;", "x" * 128, "🌊"])
async def test_a_room_may_have_any_name(demo_server: Server, room: str) -> None:
    """Of up to 128 characters without spaces, the same on every transport and by REST."""
    await publish(demo_server.url, room, {"content": "Hi"})
    for transport in TRANSPORTS:
        async with following(demo_server.url, room, transport) as ann:
            told = await ann.next()
            assert (told["room"], told["messages"][-1]["content"]) == (room, "Hi")


# --- deletion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_deleted_room_is_over_for_everybody(demo_server: Server, transport: str) -> None:
    """They are told `left`, and a stream ends; the room of that name is then a new one, and who
    comes back with an old position is told of the gap.
    """
    room = new_room()
    async with joined(demo_server.url, room, "ann", transport) as ann:
        await publish(demo_server.url, room, {"content": "Hi"})
        path = f"/api/v1/rooms/{room}"
        assert await request(demo_server.url, "DELETE", path) == (200, {"deleted": True})
        heard = await ann.until("left") if transport == "ws" else await ann.rest()
        assert [told["type"] for told in heard] == ["message", "left"]
        assert (await request(demo_server.url, "DELETE", path))[0] == 404
        if transport == "ws":
            assert (await ann.call("message", room=room, content="Hi"))["code"] == "not_found"
            assert (await ann.call("join", room=room))["messages"] == []
            await publish(demo_server.url, room, {"content": "Ho"})
            assert (await ann.hear("message"))["content"] == "Ho"
        else:
            assert ann.answer.ended == "end"
    async with following(demo_server.url, room, transport, after=heard[0]["id"]) as ann:
        assert (await ann.next())["type"] == "gap"
        assert not (await ann.next())["recovered"]


async def test_a_deleted_room_stops_what_runs_in_it(demo_server: Server) -> None:
    """Everybody is told; its answer ends, also for who waits for it elsewhere."""
    room = new_room()
    async with joined(demo_server.url, room) as ann:
        ack = await ann.call("generate", message="Hi", model="demo:rate=20,tokens=2000")
        await ann.hear("stream_chunk")
        await request(demo_server.url, "DELETE", f"/api/v1/rooms/{room}")
        heard = await ann.until("left")
        assert [told["type"] for told in heard][-2:] == ["stream_cancelled", "left"]
        path = f"/api/v1/streams/{ack['stream_id']}"
        assert (await request(demo_server.url, "GET", path))[1]["state"] == "cancelled"


async def test_rooms_do_not_add_up(server: StartServer) -> None:
    """Those that nobody uses any more make place for others."""
    url = server(rooms={"max_rooms": 10, "grace": 0.0}).url
    for number in range(50):
        async with joined(url, f"r{number}"):
            assert (await publish(url, f"r{number}", {"content": "Hi"}))[0] == 201
        await empty(url, f"r{number}")
    _, told = await request(url, "GET", "/api/v1/rooms")
    assert len(told["rooms"]) <= 10


async def test_a_stream_in_silence_has_heartbeats(server: StartServer) -> None:
    """Comments in SSE, nothing in NDJSON unless asked for by name."""
    url = server(delivery={"heartbeat": 0.1}).url
    for query, framing, wanted in (
        ("", "sse", b": heartbeat\n\n"),
        ("?heartbeat=beat", "sse", b"event: beat\n"),
        ("?heartbeat=beat", "ndjson", b'{"type":"beat",'),
    ):
        path = f"{url}/api/v1/rooms/a/events{query}"
        async with ask("GET", path, headers={"Accept": MEDIA[framing]}) as answer:
            body = b""
            async for piece in answer.pieces():
                body += piece
                if wanted in body:
                    break
