"""Processes for measuring: started, pinned, asked, ended.

The server gets a core of its own. The load and the upstream share another, or have one each where
there are three; with a single core all share it, and the numbers are worth less.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from bench.plan import Options
from bench.proc import family, more_files
from bench.wire import exchange, request

ROOT = Path(__file__).resolve().parent.parent
_START_SECONDS = 30.0


@dataclass(frozen=True)
class Cores:
    """Which core each process is pinned to."""

    server: int
    load: int
    upstream: int

    @classmethod
    def here(cls) -> "Cores":
        cores = sorted(os.sched_getaffinity(0))
        return cls(cores[0], cores[min(1, len(cores) - 1)], cores[min(2, len(cores) - 1)])


@dataclass(frozen=True)
class Server:
    """A process that listens on 127.0.0.1."""

    pid: int
    port: int

    def get(self, path: str) -> dict[str, int]:
        """The JSON object at this path."""
        address = ("127.0.0.1", self.port)
        found: dict[str, int] = json.loads(
            exchange(address, request("GET", path, "localhost")).body
        )
        return found


def _pinned(
    command: Sequence[str], core: int, env: Mapping[str, str], out: int, err: int | IO[bytes]
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        text=True,
    )
    os.sched_setaffinity(process.pid, {core})  # before it has threads: they inherit it
    more_files(process.pid)
    return process


@contextmanager
def start(
    arguments: Sequence[str], core: int, env: Mapping[str, str], program: str = sys.executable
) -> Iterator[Server]:
    """Runs `python ARGUMENTS` (or another program) on this core until the block is left, then kills
    it and its children.

    Waits for its JSON line with `"event": "listening"` on stderr; raises RuntimeError with the last
    of what it said where none comes.
    """
    with tempfile.TemporaryFile() as log:
        process = _pinned([program, *arguments], core, env, subprocess.DEVNULL, log)
        try:
            yield Server(process.pid, _listening(process, log))
        finally:
            for pid in family(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def _listening(process: subprocess.Popen[str], log: IO[bytes]) -> int:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        said = os.pread(log.fileno(), 1 << 20, 0).decode()
        for line in said.splitlines(keepends=True):
            if line.endswith("\n") and line.startswith("{") and '"listening"' in line:
                return urlsplit(json.loads(line)["url"]).port or 0
        time.sleep(0.02)
    said = os.pread(log.fileno(), 1 << 20, 0).decode()
    raise RuntimeError(f"{process.args!r} did not start: {said[-2000:]}")


def run_load(module: str, plan: Options, core: int) -> str:
    """Runs a load generator on this core and returns the line in which it says what it measured.

    Raises RuntimeError with what it said where it failed.
    """
    command = [sys.executable, "-m", module, *plan.arguments()]
    load = _pinned(command, core, {}, subprocess.PIPE, subprocess.PIPE)
    out, err = load.communicate()
    if load.returncode:
        raise RuntimeError(f"the load failed: {err[-2000:]}")
    return out
