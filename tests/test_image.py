"""The image, built by the Dockerfile's steps in a Debian of its own, and run as a container is:
nothing can be written, no rights, and its process is the first of all. For root, under SOAK alone.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.clients import Kind, asked, see
from tests.image import Image, base_of, build, instructions
from tests.people import joined, new_room, publish
from tests.processes import Process, listening, until
from tests.readers import ask
from tests.sockets import closed_port

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may make and enter a root directory"),
]
CHAT = Kind("chat")
LARGEST = 220  # megabytes


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """The image as the Dockerfile has it."""
    suite = next(re.findall(r"debian:(\w+)", rest) for name, _, rest in instructions())[0]
    with tempfile.TemporaryDirectory() as directory:
        yield build(base_of(Path(directory), suite), Path(directory))


@contextmanager
def container(image: Image, port: int, **env: str) -> Iterator[tuple[Process, int]]:
    """It runs, on loopback: `unshare`, whose status is its own, and its first process' pid."""
    local = {"RIVULET_SERVER__HOST": "127.0.0.1", "RIVULET_SERVER__PORT": str(port), **env}
    process = Process(*image.process(image.entrypoint, local, volumes="/data"))
    process.first(process.stderr, listening)
    first = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
    try:
        yield process, first
    finally:
        with suppress(ProcessLookupError):
            os.kill(first, signal.SIGKILL)
        process.stop()


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def test_it_is_small(image: Image) -> None:
    """No compiler, no pip, nothing of what made it; whom to trust is there, and every package."""
    assert image.megabytes() < LARGEST
    assert {path.name for path in (image.root / "app").iterdir()} >= {"app.py", "config.toml"}
    for directory in ("usr/bin", "usr/local/bin", "venv/bin"):
        there = {path.name for path in (image.root / directory).iterdir()}
        assert there.isdisjoint({"pip", "pip3", "cc", "gcc", "make"})
    trusted = "import ssl; raise SystemExit(not ssl.create_default_context().get_ca_certs())"
    assert image.run(image.entrypoint[0], "-c", trusted) == 0
    modules = [path.stem for path in (image.root / "app/streaming").glob("[a-z]*.py")]
    imports = ", ".join(f"streaming.{module}" for module in modules)
    assert image.run(image.entrypoint[0], "-c", f"import {imports}") == 0


async def test_it_serves(image: Image) -> None:
    """As nobody in particular, on files that root could not write either: streams, sockets, and
    rooms in a file on its volume. Its check tells whether it is there.
    """
    port = closed_port()
    url, asks = f"http://127.0.0.1:{port}", {"RIVULET_SERVER__PORT": str(port)}
    asks["RIVULET_SERVER__HOST"] = "127.0.0.1"
    assert replace(image, user="0:0").run("touch", "/app/new") != 0
    assert image.run(*image.healthcheck, env=asks) == 1
    with container(image, port, RIVULET_HISTORY__PATH="/data/history.db") as (process, first):
        status = status_of(first)
        assert re.search(r"^NSpid:\s+\d+\s+1$", status, re.MULTILINE)
        assert re.search(r"^Uid:(\s+10001){4}$", status, re.MULTILINE)
        assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
        assert image.run(*image.healthcheck, env=asks) == 0
        async with asked(url, CHAT, "demo:rate=1000") as answer:
            assert (await see(CHAT, answer)).ending == "finished"
        room = new_room()
        async with joined(url, room) as socket:
            assert (await publish(url, room, {"content": "x" * 200_000}))[0] == 201
            await socket.hear("message")
        async with ask("GET", f"{url}/ready") as answer:
            assert answer.status == 200
        assert not [line for line in process.stderr if "exception" in line or "Trace" in line]
    assert image.run(*image.healthcheck, env=asks) == 1


async def test_its_first_process_drains(image: Image) -> None:
    """SIGTERM is heard, though the first process has no handler but its own: an answer that runs
    ends whole, and the status is 0.
    """
    port = closed_port()
    with container(image, port) as (process, first):
        async with asked(f"http://127.0.0.1:{port}", CHAT, "demo:rate=20,tokens=40") as answer:
            os.kill(first, signal.SIGTERM)
            seen = await see(CHAT, answer)
        assert (seen.ending, seen.ended) == ("finished", "end")
        await until(lambda: process.child.poll() is not None)
        assert process.child.returncode == 0
