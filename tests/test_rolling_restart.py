"""Two instances behind nginx are restarted one after the other, with people in rooms, writers and
answers under way: whoever comes back has everything, once, in order, and all come back spread out.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.behaviour import expected
from tests.bridged import Instances
from tests.clients import PROMPT, Kind, named, text_of
from tests.conftest import SOAK
from tests.nginx import Way
from tests.people import JSON, TRANSPORTS, Socket, Stream, following, new_room, publish, request
from tests.processes import until
from tests.readers import Refused, Sse, ask
from tests.redis_server import RedisServer
from tests.test_recovery import offset_of

CROWD = 600 if SOAK else 70  # of each transport
ANSWERS = 100 if SOAK else 10  # at once, with two readers each
ROOMS = 20 if SOAK else 4
PAUSE = 1.0 if SOAK else 0.3  # seconds between two messages of a room
WORDS = "tokens=40,rate=20" if SOAK else "tokens=40,rate=40"
WINDOW = 10.0 if SOAK else 2.0  # seconds of a drain
LONG = f"tokens={int(20 * (WINDOW + 3))},rate=20"  # an answer that outlives a drain
PARTS = 10 if SOAK else 3  # of a window; a share must be large enough not to double by chance
RETRY = 3.0  # seconds that an `EventSource` waits which has been told nothing
CHAT, NATIVE = Kind("chat"), Kind("native")


class Crowd:
    """Everybody, and what they saw.

    told: each event of any room by its id, the same to all. acked: what was acknowledged, by its
    id. back: of each that was cut its transport, when that was, and when it came back.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.rooms = [new_room() for _ in range(ROOMS)]
        self.told: dict[str, JSON] = {}
        self.acked: dict[str, str] = {}
        self.back: list[tuple[str, float, float]] = []
        self.refused: Counter[int] = Counter()
        self.codes: Counter[int] = Counter()  # with which WebSockets were closed
        self.reading: Counter[str] = Counter()  # streams of an answer's readers, by its model
        self.answered = 0
        self.over = False

    async def comes_back(self, transport: str, wait: float) -> None:
        """Returns when it is time to."""
        cut = time.monotonic()
        await asyncio.sleep(wait)
        self.back.append((transport, cut, time.monotonic()))

    def refuses(self, status: int, headers: Mapping[str, str], resumes: bool) -> float:
        """How long to wait after this. An `EventSource` that `resumes` would be gone for good."""
        self.refused[status] += 1
        assert status in (502, 503), status
        assert not resumes, status
        return float(headers["retry-after"])

    async def write(self, room: str) -> None:
        """Publishes until it is over, each message until it is acknowledged."""
        number = 0
        while not self.over:
            content = f"{room}.{number}"
            number += await self.acknowledged(room, content)
            await asyncio.sleep(PAUSE)

    async def acknowledged(self, room: str, content: str) -> bool:
        """Publishes a message; whether that was acknowledged."""
        try:
            status, told = await publish(self.url, room, {"content": content}, key=content)
        except (OSError, EOFError):
            return False
        if status == 201:
            self.acked[told["id"]] = content
        else:
            self.refused[status] += 1
            assert status in (502, 503), told
        return status == 201

    async def ask(self, room: str | None) -> None:
        """One answer after the other, told to a room or not, until it is over."""
        while not self.over:
            await self.answer(named(WORDS), room, self.url, self.url)
            self.answered += 1

    async def answer(self, model: str, room: str | None, maker: str, reader: str) -> None:
        """One answer, read by who asked for it at `maker`, and by another who begins at `reader`.
        Who is cut comes back through nginx.
        """
        begun = asyncio.get_running_loop().create_future()
        body = {"message": PROMPT, "model": model, **({"room": room} if room else {})}
        await asyncio.gather(
            self._read(CHAT, begun, body, maker), self._read(NATIVE, begun, body, reader)
        )

    async def _read(self, kind: Kind, begun: asyncio.Future[str], body: JSON, url: str) -> None:
        """Reads an answer to its end, as an `EventSource` does."""
        text, after, retry = "", "", RETRY
        while True:
            headers = {"Accept": "text/event-stream", "Idempotency-Key": body["model"]}
            if after:
                headers["Last-Event-ID"] = after
            asks: dict[str, Any] = {"headers": headers}
            if kind is CHAT and not after:
                method, path = "POST", "/api/chat/stream"
                asks["json_body"] = body
            else:
                method, path = "GET", f"/api/v1/streams/{await begun}/events?dialect={kind.dialect}"
            parser, wait = Sse(), None
            try:
                async with ask(method, url + path, **asks) as answer:
                    if answer.status == 204:
                        break
                    if answer.status != 200:
                        wait = self.refuses(answer.status, answer.headers, bool(after))
                    else:
                        self.reading[body["model"]] += 1
                        if not begun.done():
                            begun.set_result(answer.headers["x-stream-id"])
                    async for message in answer.items(parser):
                        text += text_of(kind, item := message.json())
                        assert item["type"] not in ("error", "failed", "cancelled", "gap"), item
                        if item["type"] in ("end", "finished"):
                            break
                    else:
                        raise EOFError(answer.ended)
                    break
            except (OSError, EOFError):
                pass
            after = parser.last_event_id or after
            url, retry = self.url, retry if parser.retry is None else parser.retry / 1000
            await self.comes_back("answer", retry if wait is None else wait)
        assert text == expected(body["model"], PROMPT)


class Member:
    """One who is in a room all the time. A WebSocket and NDJSON come back at once."""

    def __init__(self, crowd: Crowd, room: str, transport: str) -> None:
        self.crowd, self.room, self.transport = crowd, room, transport
        self.position: str | None = None
        self.texts: dict[str, str] = {}  # so far, of the answers that it is told
        self.retry = RETRY if transport == "sse" else 0.0

    def __repr__(self) -> str:
        return f"{self.transport} in {self.room} at {self.position}"

    async def run(self) -> None:
        """Reads up to the message `last`."""
        while True:
            wait = None
            try:
                after = {"after": self.position}
                async with following(self.crowd.url, self.room, self.transport, **after) as here:
                    try:
                        while self._take(await here.next()):
                            pass
                        return
                    finally:
                        self._left(here)
            except Refused as error:
                lost = self.transport == "sse" and self.position is not None
                wait = self.crowd.refuses(error.status, error.headers, lost)
            except (OSError, EOFError):
                pass
            await self.crowd.comes_back(self.transport, self.retry if wait is None else wait)

    def _left(self, here: Any) -> None:
        if isinstance(here, Socket) and not self.crowd.over:
            self.crowd.codes[here.code] += 1
        elif isinstance(here, Stream) and isinstance(here.parser, Sse) and here.parser.retry:
            self.retry = here.parser.retry / 1000

    def _take(self, told: JSON) -> bool:
        type, id, stream = told["type"], told.get("id"), told.get("stream_id", "")
        if type == "joined":
            assert told["recovered"] is (self.position is not None), self
            assert self.position in (None, id), self
            self.texts = {each["stream_id"]: each["content"] for each in told["active"]}
        elif id is not None:
            assert offset_of(id) == offset_of(str(self.position)) + 1, (self, told)
            assert self.crowd.told.setdefault(id, told) == told
        if type == "stream_start":
            self.texts.setdefault(stream, "")
        elif type == "stream_chunk":
            before = "" if told.get("replace") else self.texts[stream]
            self.texts[stream] = before + told["content"]
        elif type == "stream_end":
            # What ended while it was away it is told here at once.
            assert self.texts.pop(stream, "") in ("", told["content"]), self
            assert told["content"] == expected(told["model"], PROMPT), self
        else:
            assert type in ("joined", "message", "presence", "user_joined"), (self, told)
        self.position = id or self.position
        return told.get("content") != "last"


def peak(times: list[float]) -> float:
    """How many times the mean come in the fullest part of the window that begins at 0."""
    parts = Counter(min(int(when / WINDOW * PARTS), PARTS - 1) for when in times)
    return max(parts.values()) / (len(times) / PARTS)


async def tried_again(way: Way, url: str) -> None:
    """Returns when nginx, which had found nobody there, asks this instance again: an operator waits
    for this before the next one is restarted, or for a moment there would be none.
    """
    async with asyncio.timeout(30):
        while way.nginxes[0].lines()[-1]["instance"] != url.removeprefix("http://"):
            await request(way.url, "GET", "/ready")


@pytest.mark.timeout(600)
async def test_a_rolling_restart(
    redis_server: Callable[..., RedisServer], instances: Callable[..., Any], tmp_path: Path
) -> None:
    """No token and no acknowledged event is lost, doubled or moved; who is cut comes back spread
    over the window, and is never refused for good.
    """
    brief = {"server": {"drain": WINDOW, "access_log": False}, "history": {"messages": 5}}
    pair: Instances = await instances(redis_server().url, 2, **brief)
    way = Way(tmp_path, pair.urls, two=False)
    try:
        crowd = Crowd(way.url)
        each = itertools.product(range(CROWD), TRANSPORTS)
        members = [Member(crowd, crowd.rooms[number % ROOMS], kind) for number, kind in each]
        random.shuffle(members)  # so that each instance gets some of all
        async with asyncio.TaskGroup() as group:
            reading = [group.create_task(member.run()) for member in members]
            await until(lambda: all(member.position for member in members))
            for room in crowd.rooms:
                group.create_task(crowd.write(room))
            for number in range(ANSWERS):
                group.create_task(crowd.ask(crowd.rooms[number] if number < 3 else None))
            begun = []
            for number in range(2):
                places = pair.urls[1 - number], pair.urls[number]
                models = [named(LONG) for _ in range(ANSWERS)]
                for model in models:
                    group.create_task(crowd.answer(model, None, *places))
                await until(lambda: all(crowd.reading[model] == 2 for model in models))  # noqa: B023
                begun.append(time.monotonic())
                await pair.restart(number)
                await tried_again(way, pair.urls[number])
            await asyncio.sleep(WINDOW)  # the last `EventSource` is back by then
            crowd.over = True
            for room in crowd.rooms:
                while not await crowd.acknowledged(room, "last"):
                    pass
            await asyncio.gather(*reading)
    finally:
        way.stop()
    assert crowd.acked.keys() <= crowd.told.keys()
    assert all(crowd.told[id]["content"] == said for id, said in crowd.acked.items())
    said = Counter(told.get("content") for told in crowd.told.values())
    assert {said[content] for content in crowd.acked.values() if content != "last"} == {1}
    assert len(crowd.acked) > ROOMS * 10 and crowd.answered > ANSWERS
    assert set(crowd.codes) == {1012}
    assert sum(kind == "answer" for kind, _, _ in crowd.back) >= 2 * ANSWERS
    for start, end in itertools.pairwise([*begun, time.monotonic()]):
        cut = [(kind, when, back) for kind, when, back in crowd.back if start <= when < end]
        for kind in TRANSPORTS:
            # An `EventSource` is cut at the window's end, and stays away for up to as long again.
            after = min(when for each, when, _ in cut if each == kind) if kind == "sse" else start
            times = [back - after for each, _, back in cut if each == kind]
            assert len(times) > CROWD / 4
            # Some dozens in three parts: chance, and a busy machine, have their share.
            assert peak(times) <= (2 if SOAK else 2.7), (kind, sorted(times))
    assert pair.broke() == []
