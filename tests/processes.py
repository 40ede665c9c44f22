"""The processes that tests start: the server and the upstream, each ended by its own pid."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
START = 60.0  # seconds for a process to come up; a busy machine takes a few
running: list[Process] = []  # what a failing test shows the output of


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """What `condition()` gives, as soon as that is true. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not true within {seconds} s: {condition}")
        await asyncio.sleep(0.005)
    return value


class Process:
    """A child process. Its output is read all the time, so that it never blocks on it."""

    def __init__(
        self, command: list[str], env: Mapping[str, str], files: tuple[int, ...] = ()
    ) -> None:
        """files: descriptors of ours that it inherits."""
        self.child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(env),
            pass_fds=files,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self.pid = self.child.pid
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self.shown = 0  # lines of stderr that belong to tests before this one
        self._readers = [
            threading.Thread(target=self._read, args=pipe, daemon=True)
            for pipe in ((self.child.stdout, self.stdout), (self.child.stderr, self.stderr))
        ]
        for thread in self._readers:
            thread.start()
        running.append(self)

    @staticmethod
    def _read(pipe: TextIO, lines: list[str]) -> None:
        with pipe:
            while line := pipe.readline():
                lines.append(line.rstrip("\n"))

    def first(self, lines: list[str], found: Callable[[str], Any]) -> Any:
        """What `found` gives of the first line of which it gives something. Waits for it."""
        end = time.monotonic() + START
        seen = 0
        while True:
            alive = self.child.poll() is None
            for line in lines[seen:]:
                seen += 1
                if value := found(line):
                    return value
            if not alive or time.monotonic() > end:
                self.stop()
                raise RuntimeError("did not start:\n" + "\n".join(self.stdout + self.stderr))
            time.sleep(0.01)

    def __str__(self) -> str:
        return f"{self.pid}: {self.child.args!s}"

    def stop(self, wait: float = 30.0) -> int:
        """SIGTERM, and SIGKILL for one that does not go. Returns the exit code; may be repeated."""
        with contextlib.suppress(ProcessLookupError):
            self.child.send_signal(signal.SIGTERM)
        try:
            self.child.wait(wait)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        for thread in self._readers:
            thread.join(1)
        if self in running:
            running.remove(self)
        return self.child.returncode

    def rss(self) -> int:
        """Bytes of memory it holds."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    def cpu(self) -> float:
        """Seconds of CPU it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def files(self) -> int:
        """Open file descriptors, sockets among them."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


class Server(Process):
    """`app.py` as its users start it, on a port of the system's choosing.

    url: "http://127.0.0.1:port". Configuration comes from `config` alone: sections by name, and
    `upstreams` as a list of tables; nothing of this process's RIVULET_ or OPENAI_ environment.
    """

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
        arguments: tuple[str, ...] = (),
    ) -> None:
        file = directory / f"config-{time.monotonic_ns()}.toml"
        file.write_text("\n".join(toml(config)))
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RIVULET_", "OPENAI_"))
        }
        command = [sys.executable, "app.py", "--config", str(file)]
        super().__init__(
            [*command, "--host", "127.0.0.1", "--port", "0", *arguments],
            {**inherited, "PYTHONUNBUFFERED": "1", **(env or {})},
        )
        self.url: str = self.first(self.stderr, listening)
        self.port = int(self.url.rpartition(":")[2])

    def log_lines(self, event: str | None = None) -> list[dict[str, Any]]:
        """Its log so far, or the lines of one event. A line that is no JSON (a traceback, say) is
        `{"event": "", "text": line}`."""
        lines = [_parsed(line) for line in self.stderr]
        return [line for line in lines if event is None or line.get("event") == event]


def _parsed(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"event": "", "text": line}


def listening(line: str) -> str | None:
    parsed = _parsed(line)
    return parsed["url"] if parsed.get("event") == "listening" else None


def toml(config: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a TOML file. JSON spells strings, numbers, booleans and lists as TOML does."""
    for section, value in config.items():
        for table in value if isinstance(value, list) else [value]:
            yield f"[[{section}]]" if isinstance(value, list) else f"[{section}]"
            for key, entry in table.items():
                yield f"{key} = {json.dumps(entry)}"


class UpstreamProcess(Process):
    """tests/upstream.py in a process of its own. base: what `[model] base_url` takes."""

    def __init__(self) -> None:
        super().__init__([sys.executable, "-m", "tests.upstream", "--port", "0"], os.environ)
        self.url: str = self.first(self.stdout, str)
        self.base = f"{self.url}/v1"

    def _look(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as answer:
            return json.load(answer)

    def log(self, model: str | None = None) -> list[dict[str, Any]]:
        """The requests it has seen, oldest first, or those to one model."""
        query = f"?model={urllib.parse.quote(model)}" if model is not None else ""
        found: list[dict[str, Any]] = self._look(f"/control/log{query}")
        return found

    def open(self) -> int:
        """How many answers are under way."""
        return int(self._look("/control/open"))

    async def requests(
        self, model: str, count: int = 1, *, closed: bool = False
    ) -> list[dict[str, Any]]:
        """The requests to `model` as soon as there are so many (and they are over)."""

        def enough() -> list[dict[str, Any]]:
            log = self.log(model)
            done = sum(not closed or entry["closed_at"] is not None for entry in log)
            return log if done >= count else []

        found: list[dict[str, Any]] = await until(enough)
        return found
