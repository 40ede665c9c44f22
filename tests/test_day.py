"""A day of use in seconds (SOAK=1: in minutes). People come with tokens that expire, talk, listen,
ask, are cut, come back and go, in any order; nothing of it stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from app import build
from handlers.keys import CHANNELS, DELIVERY, GENERATIONS, LIMITS, PRESENCE, ROOMS, TICKETS
from streaming import limits, tickets
from streaming.config import load
from tests.conftest import SOAK
from tests.inside import in_process
from tests.people import Socket, Stream, request
from tests.processes import Server, toml, until
from tests.raw_socket import RawSocket, closing, dialled
from tests.readers import Answer, Ndjson, Sse, ask
from tests.tokens import SECRET, token

MB = 2**20
PEOPLE, ROUNDS = (40, 150) if SOAK else (15, 8)
SERVICE = {"X-API-Key": "the-key-of-a-service"}
CONFIG: dict[str, Any] = {
    "auth": {"mode": "token", "jwt_secret": SECRET},
    "generation": {"linger": 0.3, "retention": 0.5},
    "rooms": {"idle": 0.5, "grace": 0.1},
    "limits": {
        "generations_per_minute": 10**6,
        "requests_per_minute": 10**6,
        "connections_per_user": 1000,
        "connections_per_ip": 10_000,
        "running_per_user": 1000,
        "streams_per_user": 1000,
    },
}
KEYS = json.dumps([{"key": SERVICE["X-API-Key"], "user": "operator", "service": True}])
ENV = {"RIVULET_AUTH__KEYS": KEYS}


class Person:
    """Somebody with habits. seen: what has happened to anybody."""

    def __init__(self, url: str, name: str, seen: Counter[str]) -> None:
        self.url = url
        self.name = name
        self.seen = seen
        self.random = random.Random(name)

    def bearer(self, seconds: float = 60.0) -> dict[str, str]:
        signed = token(self.name, exp=time.time() + seconds)
        named = self.random.choice(["Authorization", "Cookie"])
        return {
            named: f"Bearer {signed}" if named == "Authorization" else f"rivulet_token={signed}"
        }

    async def live(self, rounds: int) -> None:
        habits = [self.talk, self.follow, self.wonder, self.listen, self.knock, self.stay]
        for _ in range(rounds):
            habit: Callable[[], Awaitable[None]] = self.random.choice(habits)
            with contextlib.suppress(ConnectionError):  # to write to a socket that was just closed
                await habit()

    def room(self) -> str:
        return self.random.choice(["lobby", f"room{self.random.randrange(10_000)}"])

    async def ticket(self) -> str:
        _, told = await request(self.url, "POST", "/api/v1/tickets", headers=self.bearer())
        return f"?ticket={told['ticket']}"

    @asynccontextmanager
    async def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> AsyncIterator[Answer]:
        fields = {**self.bearer(), **headers}
        async with ask(method, self.url + path, headers=fields, json_body=body) as answer:
            yield answer

    async def talk(self) -> None:
        """On a socket, in rooms; who it is comes by a header, a ticket or a frame."""
        way = self.random.choice(["header", "ticket", "frame"])
        path = f"/ws/{self.room()}" + (await self.ticket() if way == "ticket" else "")
        headers = self.bearer() if way == "header" else {}
        async with dialled(self.url, path, headers=headers) as raw:
            socket = Socket(raw)
            if way == "frame":
                await socket.say("authenticate", token=token("nobody", key=SECRET[::-1]))
                await socket.hear("error", code="token_invalid")
                await socket.say("authenticate", token=token(self.name))
            await socket.hear("joined")
            for _ in range(self.random.randrange(8)):
                await self.speak(socket)
            for room in range(self.random.randrange(3)):
                await socket.call("join", room=f"also{room}")
            if self.random.random() < 0.5:
                await raw.send(closing(1000))
                assert await raw.ended() == 1000
            raw.cut(rst=self.random.random() < 0.5)

    async def speak(self, socket: Socket) -> None:
        kind = self.random.choice(["message", "generate", "typing", "history", "authenticate"])
        match kind:
            case "message":
                key = self.random.choice(["", "k1", "k2"])
                assert (await socket.call(kind, content="Hi" + key, idempotency_key=key or None))[
                    "type"
                ] == "ack"
            case "generate":
                model = self.random.choice(
                    ["demo:tokens=5,rate=100", "demo:rate=20", "demo:fail=midway"]
                )
                told = await socket.call(kind, message="Hi", model=model)
                if self.random.random() < 0.5:
                    await socket.call("stop", stream_id=told["stream_id"])
            case "typing":
                await socket.say(kind)
            case "history":
                await socket.call(kind, limit=3)
            case "authenticate":
                await socket.say(kind, token=token(self.name))
                await socket.hear("authenticated")

    async def follow(self) -> None:
        """A room as a stream, cut and resumed."""
        path = f"/api/v1/rooms/{self.room()}/events"
        after: dict[str, str] = {}
        for _ in range(self.random.randrange(1, 4)):
            accept = self.random.choice(["text/event-stream", "application/x-ndjson"])
            async with self.ask("GET", path, Accept=accept, **after) as answer:
                reader = Stream(answer, Sse() if accept == "text/event-stream" else Ndjson())
                await reader.hear("joined")
                await self.ask_away(f"{path.removesuffix('/events')}/messages")
                await reader.hear("message")
                after = {"Last-Event-ID": reader.last_id}
                reader.cut(rst=self.random.random() < 0.5)
            self.seen["followed"] += 1

    async def ask_away(self, path: str) -> None:
        key = {"Idempotency-Key": str(self.random.random())} if self.random.random() < 0.5 else {}
        async with self.ask("POST", path, {"content": "Hi"}, **key) as answer:
            assert answer.status == 201

    async def wonder(self) -> None:
        """An answer, cut in its midst, resumed by one of several ways, stopped perhaps, or left."""
        asked = {"message": "Hi", "model": "demo:tokens=40,rate=200", "conversation_id": "c1"}
        key = {"Idempotency-Key": str(self.random.random())} if self.random.random() < 0.5 else {}
        async with self.ask("POST", "/api/chat/stream", asked, **key) as answer:
            stream = answer.headers["x-stream-id"]
            async for _ in answer.pieces(cut_after=self.random.randrange(1, 2000)):
                pass
        match self.random.choice(["resume", "attach", "stop", "leave"]):
            case "resume":
                again = {"Last-Event-ID": f"{stream}-2"}
                async with self.ask("POST", "/api/chat/stream", asked, **again) as answer:
                    assert b'"finish_reason":"stop"' in await answer.body()
                self.seen["resumed"] += 1
            case "attach":
                path = f"{self.url}/api/v1/streams/{stream}/events{await self.ticket()}"
                for _ in range(2):  # as an EventSource comes back, with the same ticket
                    async with ask("GET", path) as answer:
                        assert answer.status == 200
            case "stop":
                async with self.ask("POST", f"/api/v1/streams/{stream}/stop") as answer:
                    assert answer.status == 200

    async def listen(self) -> None:
        """To a channel of theirs, into which a service publishes."""
        channel = f"channel{self.random.randrange(3)}"
        async with self.ask("GET", f"/api/v1/sse/stream/{channel}") as answer:
            reader = answer.items(Sse())
            assert (await anext(reader)).event == "connected"
            told = {"user_id": self.name, "channel": channel, "event": "e", "data": {}}
            status, _ = await request(
                self.url, "POST", "/api/v1/sse/publish", told, headers=SERVICE
            )
            assert status == 202
            assert (await anext(reader)).event == "e"
            answer.connection.cut()

    async def knock(self) -> None:
        """Wherever they are not let in."""
        wrong = {"Authorization": f"Bearer {token(self.name, exp=time.time() - 1)}"}
        for path in (
            "/v1/models",
            f"/api/v1/rooms/{self.room()}/events",
            "/echo",
            "/chat?ticket=x",
        ):
            async with ask("GET", self.url + path, headers=wrong) as answer:
                assert answer.status == 401
        theirs = f"/api/v1/rooms/{quote('conv:somebody:c1')}/events"
        for path in ("/api/v1/streams/none/events", theirs):
            async with self.ask("GET", path) as answer:
                assert answer.status == 404
        async with dialled(self.url, "/ws", headers=wrong) as raw:
            assert await closed(raw) == 4401

    async def stay(self) -> None:
        """Longer than their token lasts: they are sent away, wherever they are."""
        short = self.bearer(seconds=1.0)
        if self.random.random() < 0.5:
            async with dialled(self.url, f"/ws/{self.room()}", headers=short) as raw:
                self.seen[str(await closed(raw))] += 1
        else:
            path = f"{self.url}/api/v1/rooms/{self.room()}/events"
            async with ask("GET", path, headers=short) as answer:
                if answer.status == 200:
                    assert b"token_expired" in await answer.body()
                    self.seen["expired"] += 1


async def closed(raw: RawSocket) -> int:
    """The code with which the server closes, once it has; it is answered."""
    socket = Socket(raw)
    await socket.rest()
    return socket.code


async def day(url: str, part: str, rounds: int) -> Counter[str]:
    """All of them live at once; what happened."""
    seen: Counter[str] = Counter()
    async with asyncio.TaskGroup() as people:
        for number in range(PEOPLE):
            people.create_task(Person(url, f"{part}{number}", seen).live(rounds))
    return seen


@pytest.mark.timeout(1200)
async def test_a_day_leaves_nothing_in_a_server(
    server: Callable[..., Server],
) -> None:
    """Neither memory nor descriptors; and nothing broke inside."""
    running = server(env=ENV, **CONFIG)
    await day(running.url, "early", max(ROUNDS // 4, 4))
    await quiet(running.url)
    files, before = running.files(), running.rss()
    seen = await day(running.url, "late", ROUNDS)
    assert all(seen[each] for each in ("followed", "resumed", "4401", "expired")), seen
    await quiet(running.url)
    await until(lambda: running.files() <= files)
    assert running.rss() < before + 8 * MB
    assert not [x for x in running.log_lines() if x.get("level", "error") == "error"]


async def quiet(url: str) -> None:
    """Returns when the gauges say that nobody is there and nothing runs."""
    left: dict[str, float] = {"": 1.0}
    async with asyncio.timeout(30):
        while any(left.values()):
            await asyncio.sleep(0.1)
            # A room is forgotten when another is made, which goes by the next.
            await request(url, "GET", f"/api/v1/rooms/r{time.time()}/presence", headers=SERVICE)
            async with ask("GET", f"{url}/metrics", headers=SERVICE) as answer:
                lines = (await answer.body()).decode().splitlines()
            samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
            left = {name: float(value) for name, _, value in samples if name.startswith(GAUGES)}
            left["rivulet_rooms"] -= min(left["rivulet_rooms"], 10)  # of these last


GAUGES = (
    "rivulet_connections",
    "rivulet_subscriptions",
    "rivulet_rooms",
    "rivulet_generations_running",
)


async def test_a_day_leaves_nothing_in_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of limits, tickets, keys, readers and timers; nor a task."""
    monkeypatch.setattr(limits, "WINDOW", 0.5)
    for name in ("FRESH", "IDLE", "HELD"):
        monkeypatch.setattr(tickets, name, 2.0)
    file = tmp_path / "day.toml"
    file.write_text("\n".join(toml(CONFIG)))
    app = build(load(str(file), ENV))
    async with in_process(app) as url:
        tasks = len(asyncio.all_tasks())
        await day(url, "early", 6)
        await quiet(url)
        await asyncio.sleep(2.5)
        # Each of these looks after what is over.
        await request(url, "POST", "/api/v1/tickets", headers=SERVICE)
        await request(url, "GET", "/api/v1/streams/none", headers=SERVICE)
        deliveries = app[DELIVERY], app[CHANNELS].delivery
        held = [
            *of(app[LIMITS], "_windows", "_counts", "_addresses"),
            *of(app[GENERATIONS], "_held", "_running", "_keys", "_starting", "_leaving"),
            *of(app[TICKETS], "_held"),
            *of(app[TICKETS]._store, "_kept"),
            *of(app[PRESENCE], "_leaving"),
            *of(app[CHANNELS], "_channels", "_streams"),
            *(each for delivery in deliveries for each in of(delivery, "_sinks", "_feeds")),
            *(each for delivery in deliveries for each in of(delivery.silence, "_touched")),
            *of(app[DELIVERY].pings, "_touched"),
        ]
        # What is left is of the operator's last request, and the ticket that it was given.
        assert sorted(filter(None, map(len, held))) == [1, 1]
        assert (app[LIMITS].connections, app[GENERATIONS]._leaving_bytes) == (0, 0)
        assert len(app[ROOMS]) < 10
        await until(lambda: len(asyncio.all_tasks()) <= tasks)


def of(part: object, *tables: str) -> list[Any]:
    return [getattr(part, table) for table in tables]
