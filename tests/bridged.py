"""Several instances of the server on one Redis, and what tests ask of them."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from pathlib import Path
from typing import Any

from tests.people import TRANSPORTS, following, members, new_room, publish, request
from tests.processes import Server, UpstreamProcess, until
from tests.readers import ask

LEASE = 1.5  # seconds after which an instance that is silent is lost
TRUTH = 10.0  # seconds in which `/ready` must tell how it is


class Instances:
    """Servers that share a Redis, ended together. a, b, c: the URLs of the first three."""

    def __init__(self, directory: Path, upstream: UpstreamProcess, url: str, **more: Any) -> None:
        self.directory = directory
        self.config: dict[str, Any] = {
            "model": {"name": "up:", "base_url": upstream.base, "api_key": "sk-test"},
            "redis": {"url": url, "lease": LEASE},
            "server": {"drain": 1.0, "access_log": False},
            "rooms": {"grace": 0.1, "events": 10**6, "bytes": 2**30},
            **more,
        }
        self.servers: list[Server] = []
        self.ended: list[Server] = []  # by `restart`

    async def add(self, count: int = 1, url: str = "", **more: Any) -> list[Server]:
        """Starts so many more, with other sections of configuration; url: of their way to Redis, if
        it is another one.
        """
        config = {**self.config, **more}
        if url:
            config["redis"] = {**config["redis"], "url": url}
        starting = [
            asyncio.to_thread(Server, self.directory / str(len(self.servers) + n), config)
            for n in range(count)
        ]
        for n in range(count):
            (self.directory / str(len(self.servers) + n)).mkdir()
        started = await asyncio.gather(*starting)
        self.servers += started
        return list(started)

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]

    @property
    def a(self) -> str:
        return self.servers[0].url

    @property
    def b(self) -> str:
        return self.servers[1].url

    @property
    def c(self) -> str:
        return self.servers[2].url

    async def restart(self, number: int) -> None:
        """Ends one as an operator does; when it is gone, starts another on the same port."""
        before = self.servers[number]
        before.child.send_signal(signal.SIGTERM)
        await until(lambda: before.child.poll() is not None, 120)
        before.stop()
        assert before.child.returncode == 0
        self.ended.append(before)
        where = self.directory / str(number), self.config, None, ("--port", str(before.port))
        self.servers[number] = await asyncio.to_thread(Server, *where)

    def stop(self) -> None:
        for server in self.servers:
            server.stop()

    def broke(self) -> list[dict[str, Any]]:
        """What any of them has logged as its own fault."""
        lines = [line for each in self.servers + self.ended for line in each.log_lines()]
        return [line for line in lines if line.get("level") == "error" or "text" in line]


async def ready(url: str) -> bool:
    """What `/ready` says."""
    async with ask("GET", f"{url}/ready") as answer:
        said = await answer.json()
        assert said["status"] == ("ready" if answer.status == 200 else "bridge_unavailable")
        return answer.status == 200


async def tells(wanted: bool, *urls: str) -> float:
    """Waits until `/ready` of all says this; seconds that it took. Raises TimeoutError."""
    begun = time.monotonic()
    async with asyncio.timeout(TRUTH):
        for url in urls:
            while await ready(url) is not wanted:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.02)
    return time.monotonic() - begun


async def here(url: str, room: str, *people: str) -> None:
    """Returns once exactly these are there, as this instance says. Raises TimeoutError."""
    async with asyncio.timeout(30):
        while await members(url, room) != sorted(people):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)


async def messages(url: str, room: str) -> list[str]:
    """The contents of a room's last messages."""
    status, told = await request(url, "GET", f"/api/v1/rooms/{room}/messages", limit=1000)
    assert status == 200, told
    return [message["content"] for message in told["messages"]]


def kill(server: Server) -> None:
    """Ends an instance at once."""
    server.child.kill()
    server.child.wait()


class Day:
    """People who write and read in one room, come what may.

    acked: what was acknowledged, in no order. Writers try again with the same key; readers come
    back with their position, to the same instance or, where that is gone, to another.
    """

    def __init__(self, urls: list[str], pause: float = 0.02) -> None:
        self.urls, self.room, self.pause = urls, new_room(), pause
        self.acked: dict[str, str] = {}  # content -> id
        self.refused: list[tuple[int, str]] = []  # status and code of what was not acknowledged
        self.readers = [Witness(self, n, t) for n in range(len(urls)) for t in TRANSPORTS]
        self._done = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Day:
        reading = [asyncio.create_task(reader.run()) for reader in self.readers]
        await until(lambda: all(reader.position for reader in self.readers))
        self._tasks = [asyncio.create_task(self._write(url, n)) for n, url in enumerate(self.urls)]
        self._tasks += reading
        await self.passes(20)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write(self, url: str, number: int) -> None:
        for count in itertools.count():
            if self._done:
                return
            content = f"{number}.{count}"
            while not self._done and content not in self.acked:
                try:
                    status, told = await publish(url, self.room, {"content": content}, key=content)
                except (OSError, EOFError):
                    url = self.urls[(self.urls.index(url) + 1) % len(self.urls)]
                    continue
                if status == 201:
                    self.acked[content] = told["id"]
                else:
                    self.refused.append((status, told["error"]["code"]))
                await asyncio.sleep(self.pause)

    async def passes(self, count: int) -> None:
        """Returns once so many more have been acknowledged."""
        enough = len(self.acked) + count
        await until(lambda: len(self.acked) >= enough, 60)

    async def ends(self, gaps: bool) -> None:
        """The day is over: each reader has all that was acknowledged, once, in the same order, or
        was told of a gap; whether there were any is known.
        """
        await self.passes(20)
        self._done = True
        writing, reading = self._tasks[: len(self.urls)], self._tasks[len(self.urls) :]
        await asyncio.wait(writing, timeout=30)
        status, _ = await publish(self.urls[0], self.room, {"content": "last"})
        assert status == 201
        async with asyncio.timeout(60):
            await asyncio.gather(*reading)
        for reader in self.readers:
            heard = [content for content in reader.heard if content]
            assert len(heard) == len(set(heard)), reader
            assert gaps or not reader.gaps, reader
            if not reader.gaps:
                missing = self.acked.keys() - set(heard) - reader.before
                assert not missing, (reader, sorted(missing)[:5])
            for number in range(len(self.urls)):
                own = [int(c.partition(".")[2]) for c in heard if c.startswith(f"{number}.")]
                assert own == sorted(own), reader
        assert not gaps or all(reader.gaps for reader in self.readers)
        assert {code for status, code in self.refused if status != 503} <= set()


class Witness:
    """One reader. heard: contents in order; "" stands for a gap that was announced."""

    def __init__(self, day: Day, number: int, transport: str) -> None:
        self.day, self.number, self.transport = day, number, transport
        self.heard: list[str] = []
        self.before: set[str] = set()  # said before it came
        self.position: str | None = None

    def __str__(self) -> str:
        return f"{self.transport} on {self.number}: {len(self.heard)}, {self.gaps} gaps"

    __repr__ = __str__

    @property
    def gaps(self) -> int:
        return self.heard.count("")

    async def run(self) -> None:
        """Reads up to the message `last`."""
        while True:
            urls, after = self.day.urls, self.position
            url = urls[self.number % len(urls)]
            try:
                async with following(url, self.day.room, self.transport, after=after) as follower:
                    while self._take(await follower.next()):
                        pass
                    return
            except ConnectionRefusedError:
                self.number += 1  # it is gone
            except (OSError, EOFError, AssertionError):
                pass  # cut, or told to come back later
            await asyncio.sleep(0.05)

    def _take(self, told: dict[str, Any]) -> bool:
        if told["type"] == "gap":
            assert told["requested"] == self.position, self
            self.heard.append("")
        elif told["type"] == "joined":
            said = {message["content"] for message in told["messages"]}
            if self.position is None:
                self.before = said
        elif told["type"] == "message":
            self.heard.append(told["content"])
        self.position = told.get("id", self.position)
        return told.get("content") != "last"
