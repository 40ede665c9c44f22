"""Clients that mean harm, with a token of their own or none: what is not theirs stays out of reach,
by whatever spelling of an address, and what they hold open counts.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from app import build
from handlers.keys import DELIVERY, TICKETS
from streaming.config import Auth, Config
from streaming.tickets import FRESH
from tests.clients import named
from tests.inside import in_process
from tests.people import Socket, request
from tests.processes import Server, UpstreamProcess
from tests.raw_socket import dialled
from tests.readers import ask, connect
from tests.tokens import SECRET, token

StartServer = Callable[..., Server]
LONG = "demo:rate=2,tokens=1000"


UPGRADE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def bearer(user: str, **claims: Any) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(user, **claims)}"}


@asynccontextmanager
async def socket(server: Server, path: str, user: str) -> AsyncIterator[Socket]:
    async with dialled(server.url, path, headers=bearer(user)) as raw:
        yield Socket(raw)


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE"])
async def test_no_spelling_of_a_path_is_open_to_everybody(guarded: Server, method: str) -> None:
    """But those that are, and those of nothing."""
    for path in (
        "//health", "//metrics", "/health/", "/health/../metrics", "/health/..%2fmetrics",
        "/health%2f..%2fmetrics", "/%2e/metrics", "/%6detrics", "/metrics%20", "/health;/metrics",
        "/ws/../metrics", "/ws/%2e%2e/metrics", "/health%00", "http://127.0.0.1/metrics",
        "/api/heartbeat/../v1/rooms", "/%61pi/v1/rooms",
    ):  # fmt: skip
        async with connect(guarded.url) as connection:
            answer = await connection.request(method, path)
            assert answer.status == 401, path


@pytest.mark.parametrize(
    "room", ["conv:ann:c1", "conv%3Aann%3Ac1", "%63onv:ann:c1", "conv:%61nn:c1", "user:ann"]
)
async def test_no_spelling_of_a_room_is_another_users(guarded: Server, room: str) -> None:
    """It is answered like one that is not there, by every route; over a socket too."""
    path = f"/api/v1/rooms/{room}"
    for method, below, body in (
        ("GET", "/messages", None), ("POST", "/messages", {"content": "Hi"}),
        ("GET", "/presence", None), ("GET", "/events", None), ("DELETE", "", None),
    ):  # fmt: skip
        told = await request(guarded.url, method, path + below, body, headers=bearer("bob"))
        assert (told[0], told[1]["error"]["code"]) == (404, "not_found"), method
    async with ask("GET", f"{guarded.url}/ws/{room}", headers={**bearer("bob"), **UPGRADE}) as got:
        assert got.status == 404
    said = {"message": "Hi", "room": "conv:ann:c1"}
    status, _ = await request(guarded.url, "POST", "/api/chat/stream", said, headers=bearer("bob"))
    assert status == 422
    async with socket(guarded, "/ws", "bob") as bob:
        for name in ("conv:ann:c1", "user:ann"):
            assert (await bob.call("join", room=name))["code"] == "not_found"
            for type in ("message", "history", "presence", "typing", "generate", "leave"):
                frame = await bob.call(type, room=name, content="Hi", message="Hi")
                assert frame["code"] == "not_found", type


async def test_another_users_answer_is_out_of_reach(guarded: Server) -> None:
    """To read, to resume by any route, to stop: it is like one that is not known."""
    asked = {"message": "Hi", "model": LONG, "conversation_id": "c1"}
    chat = f"{guarded.url}/api/chat/stream"
    async with ask("POST", chat, headers=bearer("ann"), json_body=asked) as answer:
        stream = answer.headers["x-stream-id"]
        at = f"/api/v1/streams/{stream}"
        for method, path in (("GET", at), ("GET", f"{at}/events"), ("POST", f"{at}/stop")):
            assert (await request(guarded.url, method, path, headers=bearer("bob")))[0] == 404
        again = {**bearer("bob"), "Last-Event-ID": f"{stream}-1"}
        for method, path in (
            ("GET", "/stream"), ("POST", "/stream"), ("GET", "/chat"), ("GET", f"{at}/events"),
            ("POST", "/api/chat/stream"), ("POST", "/api/v1/generate"),
            ("POST", "/api/v1/ai/generate"), ("POST", "/api/v1/ai/generate/stream"),
            ("POST", "/v1/chat/completions"),
        ):  # fmt: skip
            status, _ = await request(guarded.url, method, path, headers=again)
            assert status == 410, path
        async with socket(guarded, "/ws/lobby", "bob") as bob:
            assert (await bob.call("stop", stream_id=stream))["code"] == "not_found"
        _, told = await request(guarded.url, "GET", at, headers=bearer("ann"))
        assert told["state"] == "running"


async def test_another_users_idempotency_key_finds_nothing(guarded: Server) -> None:
    """The same key and body, of two people: two answers, two messages."""
    ids: set[str] = set()
    for user in ("ann", "bob", "ann"):
        headers = {**bearer(user), "Idempotency-Key": "1"}
        asked = {"prompt": "Hi", "model": "demo:tokens=2"}
        url = f"{guarded.url}/stream"
        async with ask("POST", url, headers=headers, json_body=asked) as answer:
            ids.add(answer.headers["x-stream-id"])
        path = "/api/v1/rooms/shared/messages"
        _, told = await request(guarded.url, "POST", path, {"content": "Hi"}, headers=headers)
        ids.add(told["id"])
    assert len(ids) == 4


async def test_a_ticket_is_for_opening_a_stream(guarded: Server) -> None:
    """Not for what changes anything, and not for another ticket."""
    headers = bearer("ann")
    _, told = await request(guarded.url, "POST", "/api/v1/tickets", headers=headers)
    query = f"?ticket={told['ticket']}"
    for method, path in (
        ("POST", "/api/v1/tickets"), ("POST", "/stream"), ("POST", "/api/v1/rooms/a/messages"),
        ("DELETE", "/api/v1/rooms/a"), ("POST", "/api/v1/disconnect"), ("HEAD", "/v1/models"),
    ):  # fmt: skip
        async with ask(method, guarded.url + path + query) as answer:
            assert answer.status == 401, path
    assert (await request(guarded.url, "GET", f"/v1/models{query}"))[0] == 200


async def test_a_spent_ticket_is_kept_for_a_moment() -> None:
    """To be refused; no longer, because many would drive out the good ones."""
    app = build(Config(auth=Auth(mode="token", jwt_secret=SECRET)))
    async with in_process(app) as url:
        _, told = await request(url, "POST", "/api/v1/tickets", headers=bearer("ann"))
        async with dialled(url, f"/ws?ticket={told['ticket']}"):
            ((value, until),) = app[TICKETS]._store._kept.values()  # type: ignore[attr-defined]
    assert value.startswith(b"spent") and until < time.monotonic() + FRESH


async def test_a_model_tells_nobody_what_they_may_not_read(
    server: StartServer, upstream: UpstreamProcess
) -> None:
    """Who may only generate in a room is answered without what was said in it."""
    auth = {"mode": "token", "jwt_secret": SECRET}
    running = server(auth=auth, model={"name": "up:", "base_url": upstream.base})
    path, model, headers = "/api/v1/rooms/board/messages", named("tokens=2"), bearer("ann")
    await request(running.url, "POST", path, {"content": "the plan"}, headers=headers)
    asked = {"message": "What was said?", "room": "board", "model": model}
    for rooms in (["generate"], ["generate", "subscribe"]):
        headers = bearer("bob", rooms={"board": rooms})
        chat = f"{running.url}/api/chat/stream"
        async with ask("POST", chat, headers=headers, json_body=asked) as answer:
            assert answer.status == 200
            await answer.body()
    told = [
        [each["content"] for each in entry["body"]["messages"]] for entry in upstream.log(model)
    ]
    assert told[0] == ["What was said?"] and told[1][0] == "the plan"


async def test_who_only_moderates_stops_what_runs_in_a_room(server: StartServer) -> None:
    """They may not read it, and with the room it ends all the same."""
    grants = json.dumps([{"key": "a-key", "user": "mod", "grants": {"*": ["moderate"]}}])
    auth = {"mode": "token", "jwt_secret": SECRET}
    running = server(auth=auth, env={"RIVULET_AUTH__KEYS": grants})
    async with socket(running, "/ws/lobby", "ann") as ann:
        stream = (await ann.call("generate", message="Hi", model=LONG))["stream_id"]
        path, key = "/api/v1/rooms/lobby", {"X-API-Key": "a-key"}
        assert (await request(running.url, "DELETE", path, headers=key))[0] == 200
        _, told = await request(
            running.url, "GET", f"/api/v1/streams/{stream}", headers=bearer("ann")
        )
        assert told["state"] == "cancelled"


async def test_the_first_who_speaks_is_who_it_is(guarded: Server) -> None:
    """Two frames at once that say to be somebody: the second is refused, and nobody else came."""
    async with dialled(guarded.url, "/ws/race") as raw:
        anybody = Socket(raw)
        for user in ("ann", "bob"):
            await anybody.say("authenticate", token=token(user), ref=user)
        told = await anybody.until("error")
        assert [each["userId"] for each in told if each["type"] == "authenticated"] == ["ann"]
        assert (told[-1]["code"], told[-1]["ref"]) == ("forbidden", "bob")
        assert (await anybody.call("presence"))["members"] == ["ann"]


async def test_a_socket_in_ones_own_room_is_told_once(guarded: Server) -> None:
    """It is in that room anyhow."""
    async with socket(guarded, "/ws/user:ann", "ann") as ann:
        assert [each["type"] for each in await ann.so_far()] == ["joined"]
        own = await ann.call("message", content="Hi")
        assert [each["id"] for each in await ann.so_far()] == [own["id"]]


async def test_a_socket_keeps_no_part_of_its_url() -> None:
    """It can have 64 KB, and be one of many thousands."""
    app = build(Config())
    path = f"/ws/lobby?last_event_id={'x' * 5000}"
    async with in_process(app) as url, dialled(url, path) as raw:
        assert len((await raw.hear("gap"))["requested"]) == 5000
        await raw.hear("joined")
        (sink,) = app[DELIVERY]
        assert sink.listener._after is None  # type: ignore[attr-defined]


async def test_an_echo_is_a_connection(server: StartServer) -> None:
    """It counts as the others do, until it is closed."""
    few = server(limits={"connections": 2})

    async def another() -> int:
        async with ask("GET", f"{few.url}/echo", headers=UPGRADE, keep_alive=True) as answer:
            return answer.status

    async with AsyncExitStack() as held:
        for _ in range(2):
            await held.enter_async_context(dialled(few.url, "/echo"))
        assert await another() == 503
    async with asyncio.timeout(30):
        while await another() != 101:  # noqa: ASYNC110 - it is another process
            await asyncio.sleep(0.01)
