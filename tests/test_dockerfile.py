"""The Dockerfile, as far as it can be held without building it: what goes in, how it starts, and
the check of its health against a server. tests/test_image.py builds it, under SOAK.
"""

from __future__ import annotations

import ast
import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

import pytest
from aiohttp import web

from app import CUT_WAIT
from streaming.config import Config, load
from tests.clients import Kind, asked, see
from tests.image import DOCKERFILE, as_started, copy_context, in_context, instructions
from tests.inside import in_process
from tests.processes import ROOT, Process, listening
from tests.sockets import closed_port

IMAGE = as_started()
CHAT = Kind("chat")
README = (ROOT / "README.md").read_text()
# At the top of the repository, and not in the image.
OUTSIDE = {"bench", "deploy", "docs", "tests"}


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """What would be /app."""
    copy_context(".", tmp_path / "app")
    return tmp_path / "app"


def here(command: tuple[str, ...]) -> list[str]:
    """A command of the image's, with this Python, to be run in its directory."""
    assert command[0] == "/venv/bin/python"
    return [sys.executable, *(each.removeprefix("/app/") for each in command[1:])]


def environment(port: int | None) -> dict[str, str]:
    """The image's, but on loopback, and with no home."""
    local = {"RIVULET_SERVER__PORT": str(port)} if port is not None else {}
    return {"PATH": os.environ["PATH"], **IMAGE.env, "RIVULET_SERVER__HOST": "127.0.0.1", **local}


def healthy(app: Path, port: int | None) -> int:
    """The status of the check, on a server at this port."""
    command, env = here(IMAGE.healthcheck), environment(port)
    done = subprocess.run(command, cwd=app, env=env, capture_output=True, timeout=60, check=False)
    return done.returncode


def listed(app: Path) -> list[Path]:
    return sorted(app.rglob("*"))


@contextmanager
def started(app: Path, port: int | None) -> Iterator[Process]:
    """What the image starts."""
    command, *arguments = here(IMAGE.entrypoint)
    script = f"cd {app} && exec {command} {' '.join(arguments)}"
    process = Process(["sh", "-c", script], environment(port))
    try:
        process.first(process.stderr, listening)
        yield process
    finally:
        process.stop()


# --- what goes in -------------------------------------------------------------------------------


def test_nothing_goes_in_but_the_server(app: Path) -> None:
    """Its code and its configuration; no history, no test, no secret that lies beside them."""
    files = {str(path.relative_to(app)) for path in app.rglob("*") if path.is_file()}
    assert {"app.py", "config.toml", "requirements.txt", "handlers/chat.py"} <= files
    top = re.compile(r"(app\.py|config\.toml|requirements\.txt|(handlers|streaming)/\w+\.py)")
    assert all(map(top.fullmatch, files)), files
    kept_out = [
        ".git/config",
        ".env",
        ".venv/bin/python",
        "tests/image.py",
        "key.pem",
        "history.db",
    ]
    kept_out += ["handlers/__pycache__/chat.pyc", "deploy/compose.yaml", "Dockerfile", ".ci/run"]
    assert not [path for path in kept_out if in_context(PurePath(path))]


def test_nothing_is_forgotten() -> None:
    """Every directory of the repository is in the image, or is known to be none of its business."""
    known = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    paths = [PurePath(line) for line in known.stdout.splitlines()]
    top = {path.parts[0] for path in paths if len(path.parts) > 1 and path.parts[0][0] != "."}
    assert top - OUTSIDE == {name for name in top if in_context(PurePath(name))}


def test_what_it_copies_exists() -> None:
    """Each source is in the context, or in a stage that there is."""
    stages = set()
    for name, flags, rest in instructions():
        if name == "FROM":
            stages.add(rest.partition(" AS ")[2])
        elif name == "COPY" and flags:
            assert flags[0].removeprefix("--from=") in stages
        elif name == "COPY":
            source = rest.split()[0]
            assert source == "." or ((ROOT / source).exists() and in_context(PurePath(source)))


def test_what_it_installs_is_what_the_code_imports(app: Path) -> None:
    """Each package is in requirements.txt, but for two that are part of aiohttp's own interface,
    and for uvloop and traces, which are a choice. PyJWT brings its cryptography.
    """
    required = re.findall(r"^([\w-]+)", (app / "requirements.txt").read_text(), re.MULTILINE)
    imported = set()
    for path in app.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    own = {
        "app",
        "handlers",
        "streaming",
        "multidict",
        "yarl",
        "uvloop",
        "opentelemetry",
        "cryptography",
    }
    named = {name.replace("-", "_").replace("PyJWT", "jwt") for name in required}
    assert imported - own - sys.stdlib_module_names == named
    steps = " ".join(rest for name, _, rest in instructions() if name == "RUN")
    assert "--requirement /app/requirements.txt" in steps


# --- how it starts ------------------------------------------------------------------------------


def test_its_user_is_nobody() -> None:
    """A number, which an orchestrator can see not to be root's, and no root at the end."""
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", IMAGE.user)


def test_its_environment() -> None:
    """It listens to those outside the container, and sets nothing else of the server's."""
    ours = {name: value for name, value in IMAGE.env.items() if name.startswith("RIVULET_")}
    assert ours == {"RIVULET_SERVER__HOST": "0.0.0.0"}
    loaded = load(None, {**IMAGE.env, "RIVULET_SERVER__HOST": "127.0.0.1"})
    assert loaded == Config()
    (exposed,) = (rest for name, _, rest in instructions() if name == "EXPOSE")
    assert exposed == str(loaded.server.port)


def test_it_is_started_as_it_is_told() -> None:
    """In the README as in the Dockerfile, at the port that it has, and with time to drain."""
    commands = re.findall(r"^#     (docker .*)", DOCKERFILE, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert f"\n{command}\n" in README
    told = re.search(r" --stop-timeout (\d+) --publish 127.0.0.1:(\d+):(\d+) ", commands[1])
    assert told is not None
    assert int(told[1]) > Config().server.drain + 2 * CUT_WAIT
    assert int(told[2]) == int(told[3]) == Config().server.port


async def test_it_starts_and_tells_its_health(app: Path) -> None:
    """With the environment alone, without a home, and writing nothing where it lies. The check
    succeeds exactly as long as the server answers.
    """
    port, before = closed_port(), listed(app)
    assert healthy(app, port) == 1
    with started(app, port) as process:
        assert healthy(app, port) == 0
        async with asked(f"http://127.0.0.1:{port}", CHAT, "demo:rate=1000") as answer:
            assert (await see(CHAT, answer)).ending == "finished"
        assert process.stop() == 0
    assert healthy(app, port) == 1
    assert listed(app) == before


async def test_another_server_is_not_healthy(app: Path) -> None:
    """One that answers, and not with 200."""
    async with in_process(web.Application()) as url:
        assert await asyncio.to_thread(healthy, app, int(url.rpartition(":")[2])) == 1


def test_a_file_may_say_the_port(app: Path) -> None:
    """One that is mounted over config.toml: the check asks there."""
    port = closed_port()
    (app / "config.toml").write_text(f"[server]\nport = {port}\n")
    with started(app, None):
        assert healthy(app, None) == 0
