"""Processes for measuring: started, pinned, asked, ended.

The server gets a core of its own. The load and the upstream share another, or have one each where
there are three; with a single core all share it, and the numbers are worth less.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from bench.plan import Plan, Result
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
        found: dict[str, int] = json.loads(exchange(address, request("GET", path, "bench")).body)
        return found


def _pinned(
    module: Sequence[str], core: int, env: Mapping[str, str], out: int, err: int | IO[bytes]
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, *module],
        cwd=ROOT,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        text=True,
    )
    os.sched_setaffinity(process.pid, {core})  # before it has threads: they inherit it
    return process


@contextmanager
def start(arguments: Sequence[str], core: int, env: Mapping[str, str]) -> Iterator[Server]:
    """Runs `python ARGUMENTS` on this core until the block is left, then kills it.

    Waits for its JSON line with `"event": "listening"` on stderr; raises RuntimeError with the last
    of what it said where none comes.
    """
    with tempfile.TemporaryFile() as log:
        process = _pinned(arguments, core, env, subprocess.DEVNULL, log)
        try:
            yield Server(process.pid, _listening(process, log))
        finally:
            process.kill()
            process.wait()


def _listening(process: subprocess.Popen[str], log: IO[bytes]) -> int:
    deadline = time.monotonic() + _START_SECONDS
    said = ""
    while time.monotonic() < deadline and process.poll() is None:
        said = os.pread(log.fileno(), 1 << 20, 0).decode()
        for line in said.splitlines(keepends=True):
            if line.endswith("\n") and line.startswith("{") and '"listening"' in line:
                return urlsplit(json.loads(line)["url"]).port or 0
        time.sleep(0.02)
    raise RuntimeError(f"{process.args!r} did not start: {said[-2000:]}")


def run_load(plan: Plan, core: int) -> Result:
    """Runs the load generator on this core and returns what it measured.

    Raises RuntimeError with what it said where it failed.
    """
    options = []
    for name, value in dataclasses.asdict(plan).items():
        if value is True:
            options.append(f"--{name}")
        elif value is not False:
            options.append(f"--{name}={value}")
    load = _pinned(["-m", "bench.load", *options], core, {}, subprocess.PIPE, subprocess.PIPE)
    out, err = load.communicate()
    if load.returncode:
        raise RuntimeError(f"the load failed: {err[-2000:]}")
    return Result.parse(out)
