"""Models in rooms: who follows a room follows the answers in it, from their start to their end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest

from streaming import config
from streaming.demo import DemoModel
from streaming.generation import Ask
from streaming.generations import Generations
from streaming.limits import Limits
from streaming.metrics import Metrics
from streaming.models import ModelCall, Models
from streaming.room import Keeper, Room
from tests.behaviour import expected
from tests.clients import named, once, status
from tests.conftest import StartServer
from tests.people import (
    JSON,
    TRANSPORTS,
    Follower,
    empty,
    following,
    joined,
    new_room,
    publish,
    request,
)
from tests.processes import Server, UpstreamProcess
from tests.readers import Sse, ask

Heard = list[JSON]


def chunks(heard: Heard, stream_id: str) -> str:
    """The text that came in chunks; their `seq` must rise."""
    told = [t for t in heard if t["type"] == "stream_chunk" and t["stream_id"] == stream_id]
    numbers = [t["seq"] for t in told]
    assert numbers == sorted(set(numbers))
    assert all("id" not in t for t in told)
    return "".join(t["content"] for t in told)


async def generate(person: Any, model: str, message: str = "Go on", **more: Any) -> str:
    """Lets a model answer in the person's room: the stream's id."""
    ack = await person.call("generate", message=message, model=model, **more)
    stream_id: str = ack["stream_id"]
    return stream_id


# --- one answer ---------------------------------------------------------------------------------


async def test_generate(relay_server: Server) -> None:
    """The question is a message; then the start, the chunks, the end with the whole text, in this
    order, for everybody on every transport.
    """
    room, model = new_room(), named("tokens=30,rate=300")
    async with contextlib.AsyncExitStack() as stack:
        people = [
            await stack.enter_async_context(joined(relay_server.url, room, "ann", transport))
            for transport in TRANSPORTS
        ]
        ack = await people[0].call("generate", message="Go on", model=model)
        assert (ack["type"], ack["room"]) == ("ack", room)
        for person in people:
            heard = await person.until("stream_end")
            asked, start, *middle, end = [told for told in heard if told["type"] != "ack"]
            assert (asked["type"], asked["content"], asked["userId"]) == ("message", "Go on", "ann")
            assert start["type"] == "stream_start"
            assert (start["stream_id"], start["userId"]) == (ack["stream_id"], "ann")
            assert start["model"] == model
            assert {told["type"] for told in middle} == {"stream_chunk"}
            text = expected(model, "Go on")
            assert chunks(heard, ack["stream_id"]) == end["content"] == text
            assert (end["finish_reason"], end["usage"]["completion_tokens"]) == ("stop", 30)


async def test_the_room_is_the_models_context(
    relay_server: Server, upstream: UpstreamProcess
) -> None:
    """What people and models said there before; with `messages` the client's own instead."""
    room, model = new_room(), named("echo=5")
    async with joined(relay_server.url, room) as ann:
        await publish(relay_server.url, room, {"content": "One."}, "bob")
        for message in ("Two.", "Three."):
            await generate(ann, model, message)
            assert (await ann.hear("stream_end"))["content"] == message
        own = [{"role": "user", "content": "Mine."}]
        ack = await ann.call("generate", messages=own, model=model)
        assert (await ann.hear("stream_end", stream_id=ack["stream_id"]))["content"] == "Mine."
    log = upstream.log(model)
    assert [[m["content"] for m in entry["body"]["messages"]] for entry in log] == [
        ["One.", "Two."],
        ["One.", "Two.", "Two.", "Three."],
        ["Mine."],
    ]


async def test_a_chat_request_may_answer_in_a_room(relay_server: Server) -> None:
    """`POST /api/chat/stream` with `room`: the caller reads it there, the room's people here."""
    room, model = new_room(), named("tokens=10")
    async with joined(relay_server.url, room) as ann:
        body = {"message": "Go on", "room": room, "model": model}
        async with ask("POST", f"{relay_server.url}/api/chat/stream", json_body=body) as answer:
            items = [item.json() for item in await answer.read(Sse())]
        heard = await ann.until("stream_end")
    said = "".join(item["content"] for item in items if item["type"] == "chunk")
    stream_id = answer.headers["x-stream-id"]
    assert said == chunks(heard, stream_id) == heard[-1]["content"] == expected(model, "Go on")


@pytest.mark.parametrize(
    ("words", "ending", "code"),
    [("drop=10", "stream_error", "upstream_cut"), ("error_event=10", "stream_error", "upstream")],
)
async def test_a_failure_is_told_with_the_text_so_far(
    relay_server: Server, words: str, ending: str, code: str
) -> None:
    """`stream_error` with its code; what had been said stays a message."""
    room, model = new_room(), named(f"tokens=20,rate=200,{words}")
    async with joined(relay_server.url, room) as ann:
        stream_id = await generate(ann, model)
        heard = await ann.until(ending)
        assert chunks(heard, stream_id) == heard[-1]["content"]
        assert expected(model, "Go on").startswith(heard[-1]["content"]) and heard[-1]["content"]
        assert heard[-1]["error"]["code"].startswith(code)
        page = await ann.call("history")
        assert page["messages"][-1]["content"] == heard[-1]["content"]


# --- joining ------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_who_joins_midway_gets_the_text_so_far(relay_server: Server, transport: str) -> None:
    """In `joined`, in one piece; the chunks go on after its `seq`."""
    room, model = new_room(), named("tokens=300,rate=300")
    async with joined(relay_server.url, room) as ann:
        stream_id = await generate(ann, model)
        for _ in range(10):
            await ann.hear("stream_chunk")
        async with following(relay_server.url, room, transport) as bob:
            told = await bob.next()
            (active,) = told["active"]
            assert active["stream_id"] == stream_id and active["content"]
            heard = await bob.until("stream_end")
    assert heard[0]["type"] in ("stream_chunk", "user_joined")
    numbers = [frame["seq"] for frame in heard if frame["type"] == "stream_chunk"]
    assert numbers[0] > active["seq"]
    text = expected(model, "Go on")
    assert active["content"] + chunks(heard, stream_id) == heard[-1]["content"] == text
    assert "stream_start" not in [frame["type"] for frame in heard]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_who_comes_back_midway_has_the_exact_text(
    relay_server: Server, transport: str
) -> None:
    """The room goes on from its position, the answer from the text so far in `joined`."""
    room, model = new_room(), named("tokens=300,rate=300")
    async with (
        joined(relay_server.url, room, "ann", "sse") as ann,
        joined(relay_server.url, room) as bob,
    ):
        stream_id = await generate(bob, model)
        await ann.hear("stream_chunk")
        ann.cut()
        await publish(relay_server.url, room, {"content": "missed"})
        async with following(relay_server.url, room, transport, after=ann.last_id) as ann:
            told = await ann.next()
            assert told["recovered"]
            (active,) = told["active"]
            heard = await ann.until("stream_end")
    assert [frame["content"] for frame in heard if frame["type"] == "message"] == ["missed"]
    assert active["content"] + chunks(heard, stream_id) == expected(model, "Go on")


async def test_who_comes_back_after_the_end_has_the_whole_text(relay_server: Server) -> None:
    """In `stream_end`; there are no chunks to be replayed."""
    room, model = new_room(), named("tokens=50,rate=500")
    async with joined(relay_server.url, room) as ann:
        stream_id = await generate(ann, model)
        await ann.hear("stream_start")
        after = ann.last_id
        await ann.hear("stream_end")
    async with following(relay_server.url, room, "ndjson", after=after) as bob:
        told = await bob.next()
        assert (told["recovered"], told["active"]) == (True, [])
        end = await bob.hear("stream_end", stream_id=stream_id)
        assert end["content"] == expected(model, "Go on")


# --- several ------------------------------------------------------------------------------------


async def test_several_answers_run_at_once(relay_server: Server) -> None:
    """Each is exact, to who was there from the start and to who joins on another transport."""
    room = new_room()
    models = [named(f"tokens=200,rate={rate}") for rate in (150, 200, 250, 300)]
    async with joined(relay_server.url, room) as ann:
        own = {"messages": [{"role": "user", "content": "Go on"}]}
        for model in models:
            await ann.say("generate", model=model, **own)
        heard: Heard = []
        starts: dict[str, str] = {}
        while len(starts) < len(models):
            heard += await ann.until("stream_start")
            starts[heard[-1]["stream_id"]] = heard[-1]["model"]
        async with following(relay_server.url, room, "sse") as bob:
            active = {each["stream_id"]: each["content"] for each in (await bob.next())["active"]}
            assert active.keys() == starts.keys()
            later = await all_ends(bob, len(models))
        heard += await all_ends(ann, len(models))
    for stream_id, model in starts.items():
        text = expected(model, "Go on")
        assert chunks(heard, stream_id) == text
        assert active[stream_id] + chunks(later, stream_id) == text


async def all_ends(person: Follower, count: int) -> Heard:
    heard: Heard = []
    for _ in range(count):
        heard += await person.until("stream_end")
    return heard


# --- stopping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["tokens=10000,rate=100", "delay=60"])
@pytest.mark.parametrize("how", ["frame", "call"])
async def test_anybody_in_the_room_stops_it(
    relay_server: Server, upstream: UpstreamProcess, words: str, how: str
) -> None:
    """Before the first token too, and by REST as well as by a frame: all see `stream_cancelled`
    with the text so far, and the upstream is let go at once.
    """
    room, model = new_room(), named(words)
    async with (
        joined(relay_server.url, room, "ann") as ann,
        joined(relay_server.url, room, "bob") as bob,
    ):
        stream_id = await generate(ann, model)
        heard = await ann.until("stream_start")
        await upstream.requests(model)
        if not words.startswith("delay"):
            heard += await ann.until("stream_chunk")
        stopped = time.time()
        if how == "frame":
            assert (await bob.call("stop", stream_id=stream_id))["type"] == "ack"
        else:
            path = f"/api/v1/streams/{stream_id}/stop"
            assert (await request(relay_server.url, "POST", path, user="bob"))[0] == 200
        heard += await ann.until("stream_cancelled")
        assert chunks(heard, stream_id) == heard[-1]["content"]
        (entry,) = await upstream.requests(model, closed=True)
        assert entry["closed_at"] - stopped < 1
        assert (await bob.call("stop", stream_id=stream_id))["type"] == "ack"


async def test_a_stranger_cannot_stop_a_conversation(relay_server: Server) -> None:
    """An answer in a conversation is its owner's; to others it is not there."""
    body = {"message": "Go on", "conversation_id": "c", "model": named("tokens=1000,rate=50")}
    headers = {"X-User-Id": new_room()}
    url = f"{relay_server.url}/api/chat/stream"
    async with (
        ask("POST", url, json_body=body, headers=headers) as answer,
        joined(relay_server.url, new_room(), "bob") as bob,
    ):
        stream_id = answer.headers["x-stream-id"]
        assert (await bob.call("stop", stream_id=stream_id))["code"] == "not_found"
        assert (await status(relay_server.url, stream_id, **headers))["state"] == "running"


# --- when nobody reads --------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_answer_in_a_room_runs_while_somebody_is_there(
    server: StartServer, upstream: UpstreamProcess, transport: str
) -> None:
    """However long, on any transport; when all have gone it lingers, and is then cancelled
    upstream.
    """
    linger = 0.5
    url = server(
        model={"name": "up:", "base_url": upstream.base}, generation={"linger": linger}
    ).url
    model = named("tokens=10000,rate=20")
    async with joined(url, "a", None, transport) as ann:
        async with joined(url, "a") as bob:
            stream_id = await generate(bob, model)
        await asyncio.sleep(4 * linger)
        assert (await status(url, stream_id))["state"] == "running"
        ann.cut()
    said = await once(url, stream_id, "state", "cancelled")
    assert said["usage"]["completion_tokens"] > 0
    await upstream.requests(model, closed=True)


async def test_a_reload_just_before_the_linger_ends_does_not_cancel(
    server: StartServer, upstream: UpstreamProcess
) -> None:
    """The time counts from when the last reader left, not from when the first one came."""
    linger = 2.0
    url = server(
        model={"name": "up:", "base_url": upstream.base}, generation={"linger": linger}
    ).url
    model = named("tokens=10000,rate=20")
    async with joined(url, "a") as ann:
        began = time.monotonic()
        stream_id = await generate(ann, model)
        await asyncio.sleep(began + 0.85 * linger - time.monotonic())
    await asyncio.sleep(0.6 * linger)
    async with joined(url, "a") as ann:
        assert (await status(url, stream_id))["state"] == "running"
        await ann.hear("stream_chunk", stream_id=stream_id)
        await ann.call("stop", stream_id=stream_id)


async def test_nobody_left_cancels_even_where_others_publish(
    server: StartServer, upstream: UpstreamProcess
) -> None:
    """To publish into a room is not to read it."""
    url = server(
        model={"name": "up:", "base_url": upstream.base},
        generation={"linger": 0.3},
        rooms={"grace": 0.0},
    ).url
    async with joined(url, "a") as ann:
        stream_id = await generate(ann, named("tokens=10000,rate=20"))
    await empty(url, "a")
    while (await status(url, stream_id))["state"] == "running":
        assert (await publish(url, "a", {"content": "Hi"}))[0] == 201
        await asyncio.sleep(0.02)


class LateKeeper(Keeper):
    """Others have heard what is published before whoever publishes it knows."""

    def __init__(self) -> None:
        self.heard, self.known = asyncio.Event(), asyncio.Event()

    async def publish(self, room: Room, events: Any, key: tuple[str, str]) -> list[str]:
        ids = room.add(events, key)
        self.heard.set()
        await self.known.wait()
        return ids


async def test_who_hears_of_the_start_sooner_may_stop_it() -> None:
    """Sooner than the instance that makes it knows: its room is told of the end all the same, and
    no model is asked.
    """
    keeper = LateKeeper()
    room = Room("a", config.Rooms(), 10, keeper)
    models, limits = Models("demo", DemoModel(), {}), Limits(config.Limits())
    generations = Generations(config.Generation(), models, None, Metrics(), limits)
    ask = Ask(ModelCall("demo", [{"role": "user", "content": "Hi"}]), "ann", 60.0, room=room)
    starting = asyncio.create_task(generations.start(ask))
    await keeper.heard.wait()
    (stream_id,) = room.running
    (generation,) = [generations.held_here(stream_id)]
    assert generation is not None
    generation.stop()
    keeper.known.set()
    assert await starting is generation
    assert not room.running
    assert [event.type for event in room.log.read(0)] == ["started", "cancelled"]
    assert generation.text() == ""
    await generations.close()
