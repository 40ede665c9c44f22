"""Every route and every frame against who asks: nobody, a wrong token, an expired one, another
user's, the right one. The tables must name them all.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest

from app import build
from handlers.identity import PUBLIC
from handlers.websocket import FRAMES
from streaming.config import Config
from tests.processes import Server
from tests.raw_socket import CLOSE, RawSocket, dialled
from tests.readers import ask
from tests.tokens import SECRET, bearer, token

JSON = dict[str, Any]
SERVICE, MINE = "a-service-key", "anns-own-key"
KEYS = [
    {"key": SERVICE, "user": "backend", "service": True},
    {"key": MINE, "user": "ann"},
    {"key": "a-moderators-key", "user": "mod", "grants": {"hall*": ["subscribe", "moderate"]}},
]
LONG = "demo:rate=1,tokens=50"  # an answer that runs as long as a test


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server in token mode."""
    config = {"auth": {"mode": "token", "jwt_secret": SECRET}, "server": {"drain": 0.0}}
    env = {"RIVULET_AUTH__KEYS": json.dumps(KEYS)}
    process = Server(tmp_path_factory.mktemp("guarded"), config, env)
    yield process
    process.stop()


DAY = time.time() + 86400
LASTING = token("ann", exp=DAY)


NOT_IN: dict[str, tuple[dict[str, str], str]] = {
    "nobody": ({}, "token_missing"),
    "wrong": (bearer(token(key="x" * 32, exp=DAY)), "token_invalid"),
    "garbage": (bearer("{}.{}.!"), "token_invalid"),
    "another scheme": ({"Authorization": "Basic YW5uOmFubg=="}, "token_missing"),
    "expired": (bearer(token(exp=time.time() - 5)), "token_expired"),
    "not yet": (bearer(token(nbf=DAY, exp=DAY)), "token_invalid"),
    "unknown key": ({"X-API-Key": "no-such-key"}, "token_invalid"),
    "spent cookie": ({"Cookie": "rivulet_token=nothing"}, "token_invalid"),
}


class Row(NamedTuple):
    """A route. right: the status for whom it is; other: for another user, with a good token.
    `{id}` in the path is Ann's running answer. who: whose it is. Endless streams are cut.
    """

    method: str
    path: str
    right: int
    other: int
    body: JSON | None = None
    who: str = "ann"
    at: str = ""  # where it is asked, where that is not the path


PROMPT: JSON = {"prompt": "Hi", "model": "demo:tokens=2"}
SAID: JSON = {"messages": [{"role": "user", "content": "Hi"}], "model": "demo:tokens=2"}
ROWS = (
    Row("POST", "/api/v1/generate", 200, 200, PROMPT),
    Row("POST", "/api/v1/ai/generate", 200, 200, PROMPT),
    Row("POST", "/api/v1/ai/generate/stream", 200, 200, PROMPT),
    Row("GET", "/stream", 200, 200, at="/stream?model=demo:tokens=2"),
    Row("POST", "/stream", 200, 200, PROMPT),
    Row("GET", "/chat", 200, 200, at="/chat?prompt=Hi&model=demo:tokens=2"),
    Row("POST", "/api/chat/stream", 200, 200, {"message": "Hi", "model": "demo:tokens=2"}),
    Row("POST", "/v1/chat/completions", 200, 200, SAID),
    Row("GET", "/v1/models", 200, 200),
    Row("GET", "/v1/models/{model}", 200, 200, at="/v1/models/demo"),
    Row("GET", "/api/v1/streams/{id}", 200, 404),
    Row("GET", "/api/v1/streams/{id}/events", 200, 404),
    Row("POST", "/api/v1/streams/{id}/stop", 200, 404),
    Row("GET", "/api/v1/rooms", 200, 403, who="service"),
    Row("DELETE", "/api/v1/rooms/{room}", 200, 403, who="service", at="/api/v1/rooms/hall"),
    Row("POST", "/api/v1/rooms/{room}/messages", 201, 404, {"content": "Hi"}),
    Row("GET", "/api/v1/rooms/{room}/messages", 200, 404),
    Row("GET", "/api/v1/rooms/{room}/presence", 200, 404),
    Row("GET", "/api/v1/rooms/{room}/events", 200, 404),
    Row("GET", "/ws/{room}", 101, 404),
    Row("GET", "/ws", 101, 101),
    Row("GET", "/echo", 101, 101),
    Row("GET", "/api/v1/sse/stream/{channel}", 200, 200, at="/api/v1/sse/stream/news"),
    Row(
        "POST", "/api/v1/sse/publish", 202, 403, who="service",
        body={"user_id": "ann", "channel": "news", "event": "task.created"},
    ),
    Row("POST", "/api/v1/tickets", 200, 200),
    Row("POST", "/api/v1/disconnect", 200, 403, {"user": "ann"}, who="service"),
    Row("GET", "/api/stream", 200, 200, at="/api/stream?count=1&interval=0"),
    Row("GET", "/metrics", 200, 403, who="service"),
)  # fmt: skip
REFS = itertools.count(1)
OPEN = ("/ws", "/ws/{room}")  # a client may say on the socket who it is


def test_no_route_is_missing() -> None:
    """The table has them all, and what is open to everybody is on that list."""
    found = {
        (route.method, resource.canonical)
        for resource in build(Config()).router.resources()
        for route in resource
    }
    listed = {(row.method, row.path) for row in ROWS}
    assert {(method, path) for method, path in found if path not in PUBLIC} == listed


async def answer(
    url: str, row: Row, headers: dict[str, str], stream_id: str
) -> tuple[int, JSON, dict[str, str]]:
    """Asks there: the status, the body where it is an error, the headers."""
    target = (row.at or row.path).replace("{id}", stream_id).replace("{room}", "conv:ann:c1")
    if row.path in (*OPEN, "/echo"):
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        headers = {**headers, **upgrade, "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    asked = ask(row.method, url + target, keep_alive=True, headers=headers, json_body=row.body)
    async with asked as got:
        refused = got.status >= 400
        return got.status, json.loads(await got.body()) if refused else {}, got.headers


@asynccontextmanager
async def running(url: str) -> AsyncIterator[str]:
    """The stream id of an answer of Ann's that runs, in a conversation of hers."""
    asked = {"message": "Hi", "model": LONG, "conversation_id": "c1"}
    url = f"{url}/api/chat/stream"
    async with ask("POST", url, headers=bearer(token("ann")), json_body=asked) as got:
        assert got.status == 200
        yield got.headers["x-stream-id"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.method} {row.path}")
async def test_routes(guarded: Server, row: Row) -> None:
    """Who does not come in is told why by 401, and how to by a header; another user's token opens
    nothing that is Ann's, and the right one does.
    """
    rights = {"ann": bearer(token("ann")), "service": {"api-key": SERVICE}}
    async with running(guarded.url) as stream_id:
        for name, (headers, code) in NOT_IN.items():
            if row.path in OPEN:
                continue
            status, told, sent = await answer(guarded.url, row, headers, stream_id)
            assert (name, status, told["error"]["code"]) == (name, 401, code)
            assert sent["www-authenticate"] == "Bearer" and sent["cache-control"] == "no-store"
        other = bearer(token("bob"))
        assert (await answer(guarded.url, row, other, stream_id))[0] == row.other
        if row.path == "/api/v1/rooms/{room}" and row.method == "DELETE":
            await answer(
                guarded.url, ROWS[15]._replace(at="/api/v1/rooms/hall/messages"), other, ""
            )
        assert (await answer(guarded.url, row, rights[row.who], stream_id))[0] == row.right


@pytest.mark.parametrize("path", sorted(PUBLIC))
async def test_what_is_open_to_everybody(guarded: Server, path: str) -> None:
    """It is answered to nobody, and to whoever has a wrong token, just the same."""
    for (headers, _), query in itertools.product(NOT_IN.values(), ("", "?ticket=none")):
        async with ask("GET", guarded.url + path + query, headers=headers) as got:
            assert got.status in (200, 404)  # the page is to come


@pytest.mark.parametrize(
    "headers",
    [
        bearer(MINE),
        bearer(LASTING),
        {"authorization": f"bearer  {MINE}"},
        {"X-API-Key": MINE},
        {"api-key": MINE},
        {"Cookie": f"theme=dark; rivulet_token={MINE}"},
        {"Cookie": f"rivulet_token={LASTING}"},
    ],
)
async def test_ways_to_say_who_it_is(guarded: Server, headers: dict[str, str]) -> None:
    """A personal room is only its owner's, so that it tells who has come in."""
    for path in ("/api/v1/rooms/user:ann/presence", "/api/v1/rooms/conv:ann:x/presence"):
        async with ask("GET", guarded.url + path, headers=headers) as got:
            assert got.status == 200
    async with ask("GET", f"{guarded.url}/api/v1/rooms/user:bob/presence", headers=headers) as got:
        assert got.status == 404


# --- frames -------------------------------------------------------------------------------------

# What each frame gets: from nobody, from who may only read the room, from who may do all in it.
TOLD: dict[str, tuple[JSON, str, str, str]] = {
    "authenticate": ({"token": token("eve", exp=DAY)}, "authenticated", "forbidden", "forbidden"),
    "join": ({"room": "secret"}, "token_missing", "forbidden", "joined"),
    "leave": ({"room": "lobby"}, "token_missing", "left", "left"),
    "message": ({"room": "lobby", "content": "Hi"}, "token_missing", "forbidden", "ack"),
    "send_message": ({"room": "lobby", "message": "Hi"}, "token_missing", "forbidden", "ack"),
    "typing": ({"room": "lobby"}, "token_missing", "forbidden", ""),
    "user_typing": ({"room": "lobby"}, "token_missing", "forbidden", ""),
    "generate": ({"room": "lobby", "message": "Hi"}, "token_missing", "forbidden", "ack"),
    "stop": ({}, "token_missing", "forbidden", "ack"),
    "history": ({"room": "lobby"}, "token_missing", "history", "history"),
    "presence": ({"room": "lobby"}, "token_missing", "presence", "presence"),
    "ping": ({}, "pong", "pong", "pong"),
}


def test_no_frame_is_missing() -> None:
    """The table has them all."""
    assert TOLD.keys() == FRAMES.keys()


async def reply(socket: RawSocket, type: str, fields: JSON) -> str:
    """The type of the answer to a frame, or the code of its error; "" where none came."""
    asked, after = next(REFS), next(REFS)
    await socket.say(type=type, ref=asked, **fields)
    await socket.say(type="ping", ref=after)
    answer = ""
    while True:
        found = await socket.receive()
        assert found is not None
        told = found.json()
        if told.get("ref") == asked:
            answer = told["code"] if told["type"] == "error" else told["type"]
        if told.get("ref") == after:
            return answer


@pytest.mark.parametrize("type", TOLD)
async def test_frames(guarded: Server, type: str) -> None:
    """Nobody is told to say first who it is; who may only read does nothing else; and what may be
    done in one room may not be done in another.
    """
    fields, nobody, reads, all_of_it = TOLD[type]
    async with dialled(guarded.url, "/ws") as socket:
        assert await reply(socket, type, fields) == nobody
    async with dialled(guarded.url, "/ws/lobby", headers=bearer(token("bob"))) as bob:
        await bob.hear("joined")
        await bob.say(type="generate", message="Hi", model=LONG)
        stream_id = (await bob.hear("ack"))["stream_id"]
        if type == "stop":
            fields = {"stream_id": stream_id}
        for rooms, wanted in (({"lobby": ["subscribe"]}, reads), (["lobby", "secret"], all_of_it)):
            headers = bearer(token("ann", rooms=rooms))
            async with dialled(guarded.url, "/ws/lobby", headers=headers) as ann:
                await ann.hear("joined")
                assert await reply(ann, type, fields) == wanted
        await bob.say(type="stop", stream_id=stream_id)


async def closed(socket: RawSocket) -> int:
    """The code with which the server closes."""
    while (found := await socket.receive()) is not None:
        if found.opcode == CLOSE:
            return found.code
    return 1006


@pytest.mark.parametrize("path", ["/ws", "/ws/lobby"])
@pytest.mark.parametrize("name", sorted(set(NOT_IN) - {"nobody", "another scheme"}))
async def test_a_socket_whose_token_does_not_do(guarded: Server, path: str, name: str) -> None:
    """It is told why on the socket, because a page hears of no status, and closed with 4401."""
    headers, code = NOT_IN[name]
    async with dialled(guarded.url, path, headers=headers) as socket:
        assert (await socket.hear("error"))["code"] == code
        assert await closed(socket) == 4401


async def test_a_socket_of_a_room_that_is_not_granted(guarded: Server) -> None:
    """It is told so, and closed with 4403; so is one that says who it is only then."""
    limited = token("ann", rooms=["other"])
    async with dialled(guarded.url, "/ws/lobby", headers=bearer(limited)) as socket:
        assert (await socket.hear("error"))["code"] == "forbidden"
        assert await closed(socket) == 4403
    async with dialled(guarded.url, "/ws/lobby") as socket:
        await socket.say(type="authenticate", token=limited)
        assert (await socket.hear("authenticated"))["userId"] == "ann"
        assert (await socket.hear("error"))["code"] == "forbidden"
        assert await closed(socket) == 4403


async def test_saying_on_the_socket_who_it_is(guarded: Server) -> None:
    """A wrong token may be followed by a right one; then it is in the room of its path, in its own,
    and may be said again, by the same person only.
    """
    async with dialled(guarded.url, "/ws/lobby") as socket:
        assert await reply(socket, "authenticate", {"token": "nonsense"}) == "token_invalid"
        assert await reply(socket, "message", {"content": "Hi"}) == "token_missing"
        await socket.say(type="authenticate", token=token("cid"))
        assert (await socket.hear("authenticated"))["userId"] == "cid"
        assert (await socket.hear("joined"))["room"] == "lobby"
        assert await reply(socket, "message", {"content": "Hi"}) == "ack"
        assert await reply(socket, "authenticate", {"token": token("cid")}) == "authenticated"
        assert await reply(socket, "authenticate", {"token": token("ann")}) == "forbidden"
        url = f"{guarded.url}/api/v1/rooms/user:cid/messages"
        async with ask(
            "POST", url, headers=bearer(token("cid")), json_body={"content": "x"}
        ) as got:
            assert got.status == 201
        assert (await socket.hear("message"))["room"] == "user:cid"


async def test_a_fresh_token_may_grant_less(guarded: Server) -> None:
    """Then the socket leaves the rooms that it may read no more."""
    async with dialled(guarded.url, "/ws/lobby", headers=bearer(token("dan"))) as socket:
        await socket.say(type="join", room="other")
        assert (await socket.hear("joined"))["room"] == "lobby"
        assert (await socket.hear("joined"))["room"] == "other"
        await socket.say(type="authenticate", token=token("dan", rooms=["lobby"]))
        assert (await socket.hear("left"))["room"] == "other"
        assert await reply(socket, "presence", {"room": "lobby"}) == "presence"


async def test_grants_of_a_key(guarded: Server) -> None:
    """They take the place of the usual ones: this one moderates some rooms, and speaks in none."""
    headers = {"X-API-Key": "a-moderators-key"}
    for name in ("hall1", "lobby"):
        url = f"{guarded.url}/api/v1/rooms/{name}/messages"
        async with ask(
            "POST", url, headers=bearer(token("ann")), json_body={"content": "x"}
        ) as got:
            assert got.status == 201
        async with ask("POST", url, headers=headers, json_body={"content": "x"}) as got:
            assert got.status == 403
    async with ask("GET", f"{guarded.url}/api/v1/rooms", headers=headers) as got:
        listed = {room["room"] for room in json.loads(await got.body())["rooms"]}
    assert "hall1" in listed and all(name.startswith("hall") for name in listed)
    statuses = []
    for name in ("hall1", "lobby"):
        async with ask("DELETE", f"{guarded.url}/api/v1/rooms/{name}", headers=headers) as got:
            statuses.append(got.status)
    assert statuses == [200, 403]


async def test_a_room_to_generate_in_must_be_granted(guarded: Server) -> None:
    """Over HTTP as by a frame."""
    asked = {"message": "Hi", "room": "lobby", "model": "demo:tokens=2"}
    url = f"{guarded.url}/api/chat/stream"
    for rooms, status in (({"lobby": ["publish"]}, 403), ({"lobby": ["generate"]}, 200)):
        headers = bearer(token("ann", rooms=rooms))
        async with ask("POST", url, headers=headers, json_body=asked) as got:
            assert got.status == status


async def test_all_at_once_are_told_apart(guarded: Server) -> None:
    """Identities do not mix where many ask at the same moment."""

    async def own(user: str) -> int:
        url = f"{guarded.url}/api/v1/rooms/user:{user}/presence"
        async with ask("GET", url, headers=bearer(token(user))) as got:
            return got.status

    assert set(await asyncio.gather(*(own(f"user{n}") for n in range(40)))) == {200}
