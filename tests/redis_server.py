"""A real Redis for tests, and the wire to it, which can be slow, deaf or cut."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import redis

from tests.processes import Process


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


class RedisServer:
    """A redis-server on a free port of loopback, with a directory of its own. `options` are lines
    of its configuration: `appendonly="yes"`, `maxmemory="20mb"`, `unixsocket=...`.
    """

    def __init__(self, directory: Path, **options: str) -> None:
        self.directory = directory
        self.options = {"save": "", "appendonly": "no", **options}
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.process: Process | None = None
        self.start()

    def start(self) -> None:
        """Starts it, with what its directory holds."""
        self.directory.mkdir(parents=True, exist_ok=True)
        options = {"port": str(self.port), "bind": "127.0.0.1", **self.options}
        words = [
            word for name, value in options.items() for word in (f"--{name}", *value.split(" "))
        ]
        command = ["redis-server", "--dir", str(self.directory), *words]
        self.process = Process(command, os.environ)
        self.process.first(self.process.stdout, lambda line: "eady to accept" in line)

    def stop(self) -> None:
        """Ends it as an orderly operator does. It may be frozen, or gone."""
        if self.process is not None:
            self.thaw()
            self.process.stop()
            self.process = None

    def kill(self) -> None:
        """Ends it at once."""
        assert self.process is not None
        self.process.child.kill()
        self.stop()

    def forget(self) -> None:
        """Takes its data away, while it is stopped."""
        shutil.rmtree(self.directory)

    def freeze(self) -> None:
        """It answers nothing, with its connections in order."""
        assert self.process is not None
        self.process.child.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on where it was."""
        assert self.process is not None
        self.process.child.send_signal(signal.SIGCONT)

    def call(self, *words: Any) -> Any:
        """Runs one command."""
        with redis.Redis(port=self.port, decode_responses=True) as client:
            return client.execute_command(*words)

    def names(self, pattern: str = "*") -> list[str]:
        """The names of the keys that it holds."""
        return sorted(self.call("KEYS", pattern))

    def cut_all(self) -> None:
        """Kills every connection."""
        for kind in ("normal", "pubsub"):
            self.call("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")


class Sentinel(Process):
    """Sees to it that this server, or a replica of it that is connected, is the master of "m"."""

    def __init__(self, directory: Path, master: RedisServer) -> None:
        self.port = free_port()
        self.url = f"redis+sentinel://127.0.0.1:{self.port}/m"
        directory.mkdir()
        file = directory / "sentinel.conf"  # it writes there what it learns
        lines = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"dir {directory}",
            f"sentinel monitor m 127.0.0.1 {master.port} 1",
            "sentinel down-after-milliseconds m 1000",
            "sentinel failover-timeout m 3000",
        ]
        file.write_text("\n".join([*lines, ""]))
        super().__init__(["redis-sentinel", str(file)], os.environ)
        self.first(self.stdout, lambda line: "+monitor" in line)


class Wire:
    """Passes bytes between clients and a Redis. url: where clients connect.

    delay: seconds that every piece takes, each way. deaf: what Redis says to subscribers is lost.
    lost: where this is said, nothing that Redis says afterwards on that connection comes through.
    """

    def __init__(self, port: int) -> None:
        self.delay = 0.0
        self.deaf = False
        self.lost = b""
        self.url = ""
        self._target = port
        self._whole = True
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Cuts all connections, and each new one, until it is mended."""
        self._whole = False
        for writer in self._writers:
            writer.transport.abort()

    def mend(self) -> None:
        """Connections pass again."""
        self._whole = True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._whole:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            inner, outer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, outer}
        self._writers |= both
        subscribes, muted = asyncio.Event(), asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, outer, subscribes, muted, spoken=True))
                group.create_task(self._pump(inner, writer, subscribes, muted, spoken=False))
        finally:
            self._tasks.discard(task)
            self._writers -= both
            for each in both:
                each.transport.abort()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        subscribes: asyncio.Event,
        muted: asyncio.Event,
        spoken: bool,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if spoken and b"SUBSCRIBE" in data:
                    subscribes.set()
                if spoken and self.lost and self.lost in data:
                    muted.set()
                await asyncio.sleep(self.delay)
                if not spoken and (muted.is_set() or (self.deaf and subscribes.is_set())):
                    continue
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
