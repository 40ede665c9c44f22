"""Who may read no more is sent away: by the end of a token, by a key taken back, by a moderator."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from app import build
from handlers import websocket
from streaming.config import Auth, Config
from streaming.config import Server as ServerConfig
from tests.conftest import StartServer
from tests.inside import in_process
from tests.processes import Server
from tests.raw_socket import CLOSE, RawSocket, dial, dialled
from tests.readers import Answer, Ndjson, Sse, ask, connect
from tests.redis_server import RedisServer
from tests.tokens import SECRET, bearer, token

JSON = dict[str, Any]
SHORT = 2.0  # seconds that a token lasts
LATE = 5.0  # seconds after its end in which a stream must have ended; a second is the promise
SERVICE = {"X-API-Key": "a-service-key"}
KEYS = {"RIVULET_AUTH__KEYS": json.dumps([{"key": "a-service-key", "user": "s", "service": True}])}
AUTH = {"mode": "token", "jwt_secret": SECRET}
QUICK = {"drain": 0.0}
SLOW = "demo:rate=20,tokens=2000"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server in token mode."""
    process = Server(tmp_path_factory.mktemp("guarded"), {"auth": AUTH, "server": QUICK}, KEYS)
    yield process
    process.stop()


def brief(user: str = "ann") -> tuple[dict[str, str], float]:
    """Headers with a token that ends soon, and when."""
    ends = int(time.time()) + SHORT + 1
    return bearer(token(user, exp=ends)), ends


async def rest(answer: Answer, framing: str) -> list[JSON]:
    """What is still told, to the end, which is a cut."""
    found: list[JSON] = []
    if framing == "sse":
        found += [item.json() async for item in answer.items(Sse())]
    else:
        found += [item async for item in answer.items(Ndjson())]
    assert answer.ended == "cut"
    return found


async def closed(socket: RawSocket) -> tuple[list[JSON], int]:
    """What is still told, and the code with which the server closes."""
    told: list[JSON] = []
    while (found := await socket.receive()) is not None:
        if found.opcode == CLOSE:
            return told, found.code
        if found.opcode == 1:
            told.append(found.json())
    return told, 1006


STREAMS: dict[str, tuple[str, str, JSON | None, Callable[[JSON], str]]] = {
    "room sse": ("sse", "/api/v1/rooms/r/events", None, lambda told: told["code"]),
    "room ndjson": ("ndjson", "/api/v1/rooms/r/events?format=ndjson", None, lambda t: t["code"]),
    "channel": ("sse", "/api/v1/sse/stream/news", None, lambda told: told["code"]),
    "content": ("ndjson", f"/chat?prompt=x&model={SLOW}", None, lambda told: told["code"]),
    "chat": (
        "sse", "/api/chat/stream", {"message": "x", "model": SLOW},
        lambda told: told["metadata"]["code"],
    ),
    "openai": (
        "sse", "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "model": SLOW, "stream": True},
        lambda told: told["error"]["code"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream_ends_with_its_token(guarded: Server, name: str) -> None:
    """Within a second, with a word in its dialect that says why; and never as if it were whole."""
    framing, path, body, code = STREAMS[name]
    headers, ends = brief()
    method = "GET" if body is None else "POST"
    async with ask(method, guarded.url + path, headers=headers, json_body=body) as answer:
        assert answer.status == 200
        async with asyncio.timeout(SHORT + 1 + LATE):
            told = await rest(answer, framing)
    assert code(told[-1]) == "token_expired"
    assert ends <= time.time() < ends + LATE


async def test_a_socket_ends_with_its_token(guarded: Server) -> None:
    """With an error frame and 4401. What ran goes on: going away is not stop."""
    headers, ends = brief()
    async with dialled(guarded.url, "/ws/hall", headers=headers) as socket:
        await socket.say(type="generate", message="x", model=SLOW)
        stream_id = (await socket.hear("ack"))["stream_id"]
        async with asyncio.timeout(SHORT + 1 + LATE):
            told, code = await closed(socket)
    assert (told[-1]["code"], code) == ("token_expired", 4401)
    assert ends <= time.time() < ends + LATE
    url = f"{guarded.url}/api/v1/streams/{stream_id}"
    async with ask("GET", url, headers=bearer(token("ann"))) as answer:
        assert json.loads(await answer.body())["state"] == "running"
    async with ask("POST", f"{url}/stop", headers=bearer(token("ann"))) as answer:
        assert answer.status == 200


async def test_a_socket_with_a_fresh_token_stays(guarded: Server) -> None:
    """It is said on the socket before the old one ends."""
    headers, ends = brief()
    async with dialled(guarded.url, "/ws/hall2", headers=headers) as socket:
        await socket.say(type="authenticate", token=token("ann"))
        await socket.hear("authenticated")
        while time.time() < ends + 2:  # noqa: ASYNC110 - it is the time that must pass
            await asyncio.sleep(0.1)
        await socket.say(type="ping")
        await socket.hear("pong")


async def test_an_echo_ends_as_other_sockets_do(guarded: Server) -> None:
    """With its token, or because its user is sent away."""
    headers, ends = brief("echo")
    async with (
        dialled(guarded.url, "/echo", headers=headers) as short,
        dialled(guarded.url, "/echo", headers=bearer(token("echo"))) as long,
    ):
        async with asyncio.timeout(SHORT + 1 + LATE):
            told, code = await closed(short)
        assert (told[-1]["code"], code) == ("token_expired", 4401)
        assert ends <= time.time() < ends + LATE
        await long.say(still="here")
        assert (await long.receive() or pytest.fail("it ended")).json() == {"still": "here"}
        assert await away(guarded.url, "echo", SERVICE) == 200
        async with asyncio.timeout(LATE):
            assert (await closed(long))[1] == 4403


async def test_one_that_comes_back_with_a_fresh_token_misses_nothing(guarded: Server) -> None:
    """The last word has a position too: after it the answer goes on."""
    model = "demo:rate=20,tokens=100"
    headers, _ = brief()
    body = {"message": "x", "model": model}
    async with ask(
        "POST", f"{guarded.url}/api/chat/stream", headers=headers, json_body=body
    ) as got:
        first = [item async for item in got.items(Sse())]
        stream_id = got.headers["x-stream-id"]
    assert first[-1].json()["metadata"]["code"] == "token_expired"
    headers = {**bearer(token("ann")), "Last-Event-ID": first[-1].id}
    async with ask(
        "POST", f"{guarded.url}/api/chat/stream", headers=headers, json_body=body
    ) as got:
        second = [item.json() async for item in got.items(Sse())]
    assert second[-1]["type"] == "end"
    heard = [item.json() for item in first] + second
    text = "".join(told["content"] for told in heard if told["type"] == "chunk")
    url = f"{guarded.url}/api/v1/streams/{stream_id}/events?format=text"
    async with ask("GET", url, headers=bearer(token("ann"))) as got:
        assert (await got.body()).decode() == text


async def test_one_that_takes_nothing_is_cut(server: StartServer) -> None:
    """It cannot be told, and is not waited for."""
    guarded = server(auth=AUTH, server=QUICK, env=KEYS)
    headers, ends = brief()
    async with connect(guarded.url, receive_buffer=2048) as connection:
        await connection.request("GET", "/api/v1/rooms/busy/events", headers=headers)
        async with connect(guarded.url) as publisher:
            while time.time() < ends + LATE:
                path = "/api/v1/rooms/busy/messages"
                said = {"content": "x" * 30_000}
                answer = await publisher.request("POST", path, headers=SERVICE, json_body=said)
                assert answer.status == 201
                await answer.body()
                path = "/api/v1/rooms/busy/presence"
                answer = await publisher.request("GET", path, headers=SERVICE)
                if not json.loads(await answer.body())["members"]:
                    break
                await asyncio.sleep(0.05)
            else:
                pytest.fail("it is still there")
    assert time.time() >= ends


async def test_a_key_that_is_taken_back(server: StartServer, tmp_path: Path) -> None:
    """Its streams end; another key's go on, and a file that is broken changes nothing."""
    file = tmp_path / "keys.toml"
    lines = [f'[[keys]]\nkey = "the-key-of-{user}"\nuser = "{user}"\n' for user in ("ann", "bob")]
    file.write_text("".join(lines))
    guarded = server(auth={"mode": "token", "keys_file": str(file)}, server=QUICK)
    async with (
        dialled(guarded.url, "/ws/r", headers={"X-API-Key": "the-key-of-ann"}) as ann,
        dialled(guarded.url, "/ws/r", headers={"X-API-Key": "the-key-of-bob"}) as bob,
    ):
        file.write_text("broken")
        await asyncio.to_thread(guarded.first, guarded.stderr, lambda line: "not used" in line)
        await ann.say(type="ping")
        await ann.hear("pong")
        file.write_text(lines[1])
        async with asyncio.timeout(LATE):
            told, code = await closed(ann)
        assert (told[-1]["code"], code) == ("token_revoked", 4401)
        await bob.say(type="ping")
        await bob.hear("pong")
        headers = {"X-API-Key": "the-key-of-ann"}
        async with ask("GET", f"{guarded.url}/api/v1/rooms/r/presence", headers=headers) as answer:
            assert answer.status == 401


# --- sent away ----------------------------------------------------------------------------------


async def away(url: str, user: str, headers: dict[str, str]) -> int:
    body = {"user": user}
    async with ask("POST", f"{url}/api/v1/disconnect", headers=headers, json_body=body) as answer:
        return answer.status


async def test_a_user_is_sent_away_everywhere(
    instances: Callable[..., Any], redis_server: Callable[..., RedisServer]
) -> None:
    """From all instances, on every transport, and their tickets are good no more; others stay, and
    who was sent away may come back.
    """
    one, two = (await instances(redis_server().url, 2, auth=AUTH)).servers
    ann, moderator = bearer(token("ann")), bearer(token("mod", rooms={"user:*": ["moderate"]}))
    async with (
        dialled(one.url, "/ws/r", headers=ann) as socket,
        dialled(two.url, "/ws/r", headers=bearer(token("bob"))) as other,
        ask("GET", f"{two.url}/api/v1/rooms/r/events", headers=ann) as stream,
    ):
        ticket = await a_ticket(two.url, ann)
        await socket.hear("joined")
        await other.hear("joined")
        assert await away(one.url, "ann", bearer(token("bob"))) == 403
        assert await away(two.url, "ann", moderator) == 200
        async with asyncio.timeout(LATE):
            told, code = await closed(socket)
            heard = await rest(stream, "sse")
        assert (told[-1]["code"], code, heard[-1]["code"]) == ("disconnected", 4403, "disconnected")
        await other.say(type="ping")
        await other.hear("pong")
        for url in (one.url, two.url):
            target = f"{url}/api/v1/rooms/r/events?ticket={ticket}"
            async with ask("GET", target) as answer:
                assert answer.status == 401
    async with dialled(two.url, "/ws/r", headers=ann) as socket:
        await socket.hear("joined")
        assert await away(one.url, "ann", ann) == 200  # their own
        async with asyncio.timeout(LATE):
            assert (await closed(socket))[1] == 4403


# --- tickets ------------------------------------------------------------------------------------


async def a_ticket(url: str, headers: dict[str, str], **fields: str) -> str:
    url = f"{url}/api/v1/tickets"
    async with ask("POST", url, headers=headers, json_body=fields) as answer:
        assert answer.status == 200
        told = json.loads(await answer.body())
        assert told["expires_in"] == 30
        ticket: str = told["ticket"]
        return ticket


async def status_of(url: str) -> int:
    async with ask("GET", url) as answer:
        return answer.status


async def test_a_ticket_opens_one_socket(guarded: Server) -> None:
    """As whom it was given; then it is spent."""
    ticket = await a_ticket(guarded.url, bearer(token("ann")))
    async with dialled(guarded.url, f"/ws/hall?ticket={ticket}") as socket:
        await socket.say(type="authenticate", token=token("bob"))
        assert (await socket.hear("error"))["code"] == "forbidden"
        await socket.say(type="authenticate", token=token("ann"))
        assert (await socket.hear("authenticated"))["userId"] == "ann"
    async with dialled(guarded.url, f"/ws/hall?ticket={ticket}") as socket:
        told, code = await closed(socket)
        assert (told[-1]["code"], code) == ("ticket_invalid", 4401)


async def test_a_ticket_is_good_for_the_reconnects_of_a_stream(guarded: Server) -> None:
    """With the same path and query, and for nothing else."""
    ticket = await a_ticket(guarded.url, bearer(token("ann")))
    at = f"{guarded.url}/api/v1/rooms/hall/events"
    for _ in range(3):
        async with ask("GET", f"{at}?heartbeat=beat&ticket={ticket}") as answer:
            assert answer.status == 200
    assert await status_of(f"{at}?ticket={ticket}") == 401
    assert await status_of(f"{guarded.url}/api/v1/rooms/other/events?ticket={ticket}") == 401
    assert await status_of(f"{at}?heartbeat=beat&ticket={ticket}") == 200
    async with ask(
        "POST", f"{at[:-7]}/messages?ticket={ticket}", json_body={"content": "x"}
    ) as got:
        assert got.status == 401


async def test_a_ticket_for_a_path(guarded: Server) -> None:
    """Is good for that one, with any query."""
    ann = bearer(token("ann"))
    ticket = await a_ticket(guarded.url, ann, path="/api/v1/rooms/hall/events")
    assert await status_of(f"{guarded.url}/api/v1/rooms/other/events?ticket={ticket}") == 401
    assert await status_of(f"{guarded.url}/api/v1/rooms/hall/events?ticket={ticket}") == 200


# --- who does not say who it is -----------------------------------------------------------------


async def test_a_socket_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is closed after some seconds; one that has said who it is, is not."""
    monkeypatch.setattr(websocket, "SAY_WHO", 0.5)
    async with in_process(inside()) as url:
        silent, named = await dial(url, "/ws/hall"), await dial(url, "/ws/hall")
        await named.say(type="authenticate", token=token("ann"))
        told, code = await closed(silent)
        assert (told[-1]["code"], code) == ("token_missing", 4401)
        await named.say(type="ping")
        await named.hear("pong")
        silent.cut()
        named.cut()


def inside() -> web.Application:
    return build(Config(auth=Auth(mode="token", jwt_secret=SECRET), server=ServerConfig(drain=0)))
