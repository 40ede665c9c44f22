"""`--workers N`: several processes on one port, joined by Redis."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from tests.people import joined, new_room, publish
from tests.processes import ROOT, Server, until
from tests.readers import ask
from tests.redis_server import RedisServer

StartServer = Callable[..., Server]


def children(server: Server) -> set[int]:
    """The processes that it has started."""
    text = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
    return {int(pid) for pid in text.split()}


def alive(pid: int) -> bool:
    """Whether this process is there."""
    return Path(f"/proc/{pid}").exists()


def files(pid: int) -> int:
    """How many files a process holds, connections among them."""
    return len(os.listdir(f"/proc/{pid}/fd"))


async def test_they_share_a_port_and_its_rooms(
    server: StartServer, redis_server: Callable[..., RedisServer]
) -> None:
    """Connections are dealt out among them, and everybody hears everybody."""
    redis = redis_server()
    shared = server(redis={"url": redis.url}, arguments=("--workers", "3"))
    await until(lambda: len(shared.log_lines("listening")) == 3)
    assert len(children(shared)) == 3
    room, before = new_room(), {pid: files(pid) for pid in children(shared)}
    async with AsyncExitStack() as stack:
        following = [
            await stack.enter_async_context(joined(shared.url, room, f"user{n}")) for n in range(30)
        ]
        await publish(shared.url, room, {"content": "hello"})
        heard = await asyncio.gather(*(each.hear("message") for each in following))
        # Thirty connections on one of three would be a chance of 3 ** -29.
        assert sum(files(pid) > count + 1 for pid, count in before.items()) > 1
    assert {frame["content"] for frame in heard} == {"hello"}
    assert shared.stop() == 0


async def test_one_that_breaks_is_started_anew(
    server: StartServer, redis_server: Callable[..., RedisServer]
) -> None:
    """The others serve on meanwhile."""
    shared = server(redis={"url": redis_server().url}, arguments=("--workers", "2"))
    await until(lambda: len(shared.log_lines("listening")) == 2)
    before = children(shared)
    os.kill(min(before), signal.SIGKILL)
    await until(lambda: len(shared.log_lines("listening")) == 3)
    after = children(shared)
    assert len(after) == 2 and len(after & before) == 1
    (told,) = shared.log_lines("worker ended")
    assert told["pid"] == min(before)
    for _ in range(20):
        async with ask("GET", f"{shared.url}/health") as answer:
            assert answer.status == 200
    assert shared.stop() == 0


async def test_sigterm_ends_all(
    server: StartServer, redis_server: Callable[..., RedisServer]
) -> None:
    """Each drains, and no process is left."""
    shared = server(redis={"url": redis_server().url}, arguments=("--workers", "2"))
    await until(lambda: len(shared.log_lines("listening")) == 2)
    pids = children(shared)
    assert shared.stop() == 0
    assert len(shared.log_lines("draining")) == 2
    assert not any(alive(pid) for pid in pids)


def refused(**environ: str) -> subprocess.CompletedProcess[bytes]:
    """A start of two workers, which must fail."""
    command = [sys.executable, "app.py", "--workers", "2", "--port", "0"]
    environ |= {name: value for name, value in os.environ.items() if "REDIS" not in name}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, timeout=60)


def test_without_redis_it_is_refused() -> None:
    """They would be servers that know nothing of each other."""
    ended = refused()
    assert ended.returncode == 2
    assert b"server.workers: more than one needs redis.url" in ended.stderr


def test_where_none_can_start_they_are_not_started_anew() -> None:
    """What each of them says of it is said, and the status is as of one."""
    ended = refused(RIVULET_REDIS__URL="redis://here:port")
    assert ended.returncode == 2
    assert {line[:27] for line in ended.stderr.splitlines()} == {b"redis.url: cannot be read; "}
