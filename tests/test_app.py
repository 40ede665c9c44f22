"""`app.py`: its command line, its log, and its application inside another."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from app import build
from streaming.config import Config
from tests.clients import KINDS, PROMPT, Kind, asked, named, see, start, stop
from tests.inside import in_process
from tests.processes import ROOT, Process, Server, UpstreamProcess, listening, until
from tests.readers import DataLines, ask
from tests.sdk import client_of, said, stream

StartServer = Callable[..., Server]
CHAT = Kind("chat")


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """app.py with these arguments, to its end."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RIVULET_", "OPENAI_"))}
    return subprocess.run(
        [sys.executable, str(ROOT / "app.py"), *arguments],
        cwd=ROOT,
        env=inherited | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def get(url: str, **request: Any) -> Any:
    """The JSON at this URL."""
    async with ask("GET", url, **request) as answer:
        return await answer.json()


# --- the command line ---------------------------------------------------------------------------


def test_check_config_runs_nothing(tmp_path: Path) -> None:
    """Status 0 and a word on stdout for a good configuration, the one in the repository included;
    2 and the reason on stderr, naming the key and the nearest one, for another.
    """
    assert run("--check-config").returncode == 0
    file = tmp_path / "rivulet.toml"
    file.write_text("[server]\nport = 9000\n")
    good = run("--config", str(file), "--check-config")
    assert (good.returncode, good.stderr) == (0, "")
    assert "good" in good.stdout
    file.write_text("[server]\nprot = 9000\n")
    bad = run("--config", str(file), "--check-config")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "server.prot: unknown key; the nearest known one is server.port\n"
    bad = run("--check-config", RIVULET_REDIS__URL="redis://127.0.0.1:port")
    assert (bad.returncode, bad.stdout) == (2, "") and "redis.url" in bad.stderr


@pytest.mark.parametrize(
    ("arguments", "env", "named"),
    [
        ((), {"RIVULET_SERVER__PORT": "eighty"}, "RIVULET_SERVER__PORT"),
        ((), {"RIVULET_SERVER__LOOP": "trio"}, "asyncio"),
        (("--port", "70000"), {}, "server.port"),
        (("--config", "/nowhere/rivulet.toml"), {}, "/nowhere/rivulet.toml"),
    ],
)
def test_a_bad_configuration_does_not_start(
    arguments: tuple[str, ...], env: dict[str, str], named: str
) -> None:
    """Status 2, and one line that names what is wrong, without a traceback."""
    refused = run(*arguments, **env)
    assert refused.returncode == 2
    assert named in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_a_port_in_use() -> None:
    """Status 1, and one line that names the address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = run("--port", str(port))
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"cannot listen on 127.0.0.1:{port}: ")
    assert len(refused.stderr.splitlines()) == 1


def test_an_unknown_option() -> None:
    """Status 2, and how it is used."""
    refused = run("--prot", "9000")
    assert refused.returncode == 2
    for option in ("--config", "--host", "--port", "--check-config"):
        assert option in refused.stderr


async def test_it_runs_as_it_comes_from_anywhere(tmp_path: Path) -> None:
    """No configuration, no key, another directory: with port 0 the log says where, and the demo
    model answers.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RIVULET_", "OPENAI_"))}
    command = f"cd {tmp_path} && exec {sys.executable} {ROOT}/app.py --port 0"
    process = Process(["sh", "-c", command], env)
    try:
        url = process.first(process.stderr, listening)
        assert await get(f"{url}/health") == {"status": "healthy"}
        assert (await start(url, CHAT, "demo:rate=1000")).ending == "finished"
    finally:
        assert process.stop() == 0
    assert process.stdout == []


async def test_each_layer_goes_before_the_one_below(server: StartServer) -> None:
    """The file, over it the environment, over that the command line."""
    file = {"model": {"name": "from-file"}, "server": {"host": "127.0.0.9", "drain": 1.0}}
    env = {"RIVULET_MODEL__NAME": "demo:rate=500", "RIVULET_SERVER__HOST": "127.0.0.8"}
    running = server(**file, env=env, arguments=("--host", "127.0.0.2"))
    assert running.url.startswith("http://127.0.0.2:")
    models = await get(f"{running.url}/v1/models")
    assert [model["id"] for model in models["data"]] == ["demo:rate=500"]


def test_ipv6(server: StartServer) -> None:
    """An address with colons stands in brackets where it is part of an URL. A machine without IPv6
    says so.
    """
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        assert run("--host", "::1", "--port", "0").stderr.startswith("cannot listen on ::1:0: ")
        return
    running = server(arguments=("--host", "::1"))
    assert running.url == f"http://[::1]:{running.port}"
    with urllib.request.urlopen(f"{running.url}/health", timeout=30) as answer:
        assert json.load(answer) == {"status": "healthy"}


def loads(process: Process, library: str) -> bool:
    """Whether it has a library of this name in its memory."""
    return library in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_either_event_loop(server: StartServer, upstream: UpstreamProcess, loop: str) -> None:
    """Streams, stops, failures and the end are the same on both."""
    model = {"name": "up:", "base_url": upstream.base}
    running = server(model=model, server={"loop": loop})
    assert loads(running, "uvloop") == (loop == "uvloop")
    for http in ("1.0", "1.1"):
        for kind in KINDS:
            seen = await start(running.url, kind._replace(http=http), named("tokens=20"))
            assert (seen.ending, seen.ended) == ("finished", "end")
        for kind in (Kind("content", "text", http), Kind("openai", "sse", http)):
            seen = await start(running.url, kind, named("tokens=20,reset"))
            assert seen.ending != "finished"
            assert seen.ended == "cut"
    async with client_of(running) as client:
        assert said(await stream(client, "up:tokens=5"))
    model_name = named("tokens=5000,rate=50")
    async with asked(running.url, CHAT, model_name) as answer:
        await stop(running.url, answer.headers["x-stream-id"])
        assert (await see(CHAT, answer)).ending == "cancelled"
    assert running.stop() == 0
    assert all(line["event"] for line in running.log_lines())


# --- the log ------------------------------------------------------------------------------------


async def test_one_line_a_request(demo_server: Server) -> None:
    """JSON with id, method, path, status and duration, also for a stream and for a refusal; never
    the query, nor anything else that could be a secret.
    """
    secret = "s3cret-of-the-test"
    paths = {"/health": 200, "/nowhere": 404, "/stream": 200, "/api/v1/streams/none": 404}
    headers = {"Authorization": f"Bearer {secret}"}
    names = {}
    for path in paths:
        url = f"{demo_server.url}{path}?prompt={secret}&model=demo:rate=1000"
        async with ask("GET", url, headers=headers) as answer:
            await answer.body()
            names[answer.headers["x-request-id"]] = path

    def lines() -> list[dict[str, Any]]:
        return [line for line in demo_server.log_lines("request") if line["request_id"] in names]

    await until(lambda: len(lines()) == len(paths))
    for line in lines():
        path = names[line["request_id"]]
        assert (line["method"], line["path"], line["status"]) == ("GET", path, paths[path])
        assert line["seconds"] >= 0
        assert line["level"] == "info"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert secret not in "\n".join(demo_server.stderr)


async def test_a_request_id_is_taken_or_made(demo_server: Server) -> None:
    """On every answer, and in the error's body. One that could break a log or a header is replaced
    by one that is made.
    """
    async with ask(
        "GET", f"{demo_server.url}/health", headers={"X-Request-Id": "a:1.b-2_c"}
    ) as answer:
        assert answer.headers["x-request-id"] == "a:1.b-2_c"
    made = set()
    for path in ("/health", "/nowhere", "/stream?model=demo:rate=1000,tokens=2"):
        async with ask("GET", demo_server.url + path) as answer:
            body = await answer.body()
            made.add(answer.headers["x-request-id"])
        if answer.status == 404:
            assert json.loads(body)["error"]["request_id"] == answer.headers["x-request-id"]
    assert len(made) == 3
    for bad in ("", "a b", "é", "x" * 200, 'a"b'):
        async with ask("GET", f"{demo_server.url}/health", headers={"X-Request-Id": bad}) as answer:
            assert re.fullmatch("[0-9a-f]{16}", answer.headers["x-request-id"])


async def test_the_access_log_can_be_switched_off(server: StartServer) -> None:
    """Then requests leave no line; what goes wrong still would."""
    quiet = server(server={"access_log": False})
    assert await get(f"{quiet.url}/health") == {"status": "healthy"}
    assert quiet.stop() == 0
    assert quiet.log_lines("request") == []
    assert quiet.log_lines("draining")


async def test_keys_stay_out_of_the_log(server: StartServer, upstream: UpstreamProcess) -> None:
    """The upstream's key goes to the upstream and nowhere else, also where it refuses."""
    key = "sk-0123456789-of-the-test"
    model = {"name": "up:", "base_url": upstream.base, "api_key": key}
    running, name = server(model=model), named("status=401")
    seen = await start(running.url, CHAT, name)
    assert seen.code == "upstream_unauthorized"
    assert upstream.log(name)[0]["authorization"] == f"Bearer {key}"
    assert running.stop() == 0
    assert key not in "\n".join([*running.stderr, *running.stdout, json.dumps(seen.items)])


# --- inside another -----------------------------------------------------------------------------


async def test_the_application_runs_in_a_test_client() -> None:
    """`build` gives an aiohttp application like any other."""
    async with TestClient(TestServer(build(Config()))) as client:
        response = await client.get("/health")
        assert await response.json() == {"status": "healthy"}
        body = {"prompt": PROMPT, "model": "demo:rate=1000"}
        response = await client.post("/api/v1/ai/generate/stream", json=body)
        items = DataLines().feed(await response.read())
        assert items[-1] == "[DONE]"
        assert PROMPT in "".join(json.loads(item)["content"] for item in items[:-1])


async def test_two_applications_share_nothing() -> None:
    """Neither streams nor conversations of one are known to the other."""
    async with in_process(build(Config())) as one, in_process(build(Config())) as other:
        seen = await start(one, CHAT, "demo:rate=1000")
        path = f"/api/v1/streams/{seen.stream_id}"
        assert (await get(one + path))["state"] == "finished"
        assert (await get(other + path))["error"]["code"] == "not_found"
