"""Several instances of the server on one Redis, and what tests ask of them."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from tests.people import members, request
from tests.processes import Server, UpstreamProcess
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

    def stop(self) -> None:
        for server in self.servers:
            server.stop()

    def broke(self) -> list[dict[str, Any]]:
        """What any of them has logged as its own fault."""
        lines = [line for server in self.servers for line in server.log_lines()]
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
