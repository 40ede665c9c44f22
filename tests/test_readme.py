"""What the README says works: its commands run, its paths, targets, keys and links exist."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app import build
from streaming.config import Config, load
from tests.clients import Kind, asked, see
from tests.processes import ROOT, Process, Server, until
from tests.sockets import closed_port

CHAT = Kind("chat")
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])


def commands() -> list[str]:
    """The command lines of its `sh` blocks; a backslash continues one."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


CURLS = [line for line in commands() if line.startswith("curl")]


def test_it_has_a_command_that_streams() -> None:
    """The first command after starting is one `curl -N`."""
    assert commands()[0] == CURLS[0]
    assert CURLS[0].startswith("curl -N ")


@pytest.mark.parametrize("command", CURLS)
def test_its_commands_run(demo_server: Server, command: str) -> None:
    """Each `curl`, as it is written but for the port, against a server as it comes."""
    assert "http://127.0.0.1:8080" in command
    command = command.replace("http://127.0.0.1:8080", demo_server.url)
    done = subprocess.run(
        ["bash", "-c", command + " --fail --silent --show-error"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > (100 if "-N" in command else 20)


async def test_it_can_be_embedded(tmp_path: Path) -> None:
    """As the program that it prints, but for the address: it serves under the prefix, and SIGTERM
    lets an answer end.
    """
    (program,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    port = closed_port()
    file = tmp_path / "house.py"
    file.write_text(
        program.replace("run_app(house", f"run_app(house, host='127.0.0.1', port={port}")
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith("RIVULET_")}
    house = Process(
        [sys.executable, str(file)], {**env, "PYTHONPATH": ".", "PYTHONUNBUFFERED": "1"}
    )
    try:
        house.first(house.stdout, lambda line: "Running on" in line)
        async with asked(f"http://127.0.0.1:{port}/ai", CHAT, "demo:rate=20,tokens=30") as answer:
            house.child.send_signal(signal.SIGTERM)
            assert (await see(CHAT, answer)).ending == "finished"
        assert await until(lambda: house.child.poll() is not None)
    finally:
        assert house.stop() == 0


def test_its_make_targets_exist() -> None:
    """`make run`, `make test` and every other that it names."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = re.findall(r"^```.*?^```|^    .*|`[^`\n]+`", README, re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"\bmake ([a-z]+)", "\n".join(code)))
    assert {"run", "test"} <= named
    assert named <= targets


def test_its_paths_are_served() -> None:
    """Each method with its path is a route."""
    routes = {
        (route.method, route.resource.canonical if route.resource else "")
        for route in build(Config()).router.routes()
    }
    named = set(re.findall(r"(GET|POST) (/[a-z0-9/{}_.]*)", README))
    assert len(named) > 10
    assert named <= routes


def test_its_variables_are_keys() -> None:
    """Each variable that it sets is taken, with the others of its command."""
    lines = [re.findall(r"(RIVULET_[A-Z]+__[A-Z_]+)=([^\s`]+)", x) for x in README.splitlines()]
    assert any(lines)
    for named in lines:
        load(None, {name: value.replace('"$SECRET"', "s" * 32) for name, value in named})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link, in every page of documentation."""
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
