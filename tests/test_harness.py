"""The tests' own tools do what they say: the front, the browser, Node.js, processes, hooks.

The upstream and the readers have files of their own: test_harness_upstream.py, _readers.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests import readers
from tests.browser import Browser, PageError
from tests.front import Front
from tests.js import run_js
from tests.processes import ROOT, Server, UpstreamProcess, toml
from tests.readers import PROMPT, ask, ask_model, question
from tests.sockets import black_hole, closed_port
from tests.upstream import expected

CHAT = "/v1/chat/completions"


# --- the front, the browser, node ---------------------------------------------------------------


async def test_a_front_cuts_and_remembers(
    upstream: UpstreamProcess, front: Callable[[str], Any]
) -> None:
    """A cut is for one request; the next of that path passes. Others are not touched."""
    before: Front = await front(upstream.url)
    before.cut(CHAT, 300, 600, rst=True)
    for ended, size in (("cut", 300), ("cut", 600), ("end", None)):
        async with ask("POST", before.url + CHAT, json_body=question("up:tokens=10")) as response:
            await response.body()
        assert response.ended == ended
        assert size is None or len(before.to(CHAT)[-1].response) == size
        async with ask("GET", before.url + "/v1/models") as response:
            assert response.status == 200
    assert [asked.cut for asked in before.to(CHAT)] == [True, True, False]
    assert before.to(CHAT)[0].headers["content-type"] == "application/json"
    before.cut(CHAT, b"[DO")
    async with ask("POST", before.url + CHAT, json_body=question("up:tokens=10")) as response:
        assert (await response.body()).endswith(b"\n\ndata: [DO")


async def test_a_client_that_leaves_the_front_leaves_the_server(
    upstream: UpstreamProcess, front: Callable[[str], Any]
) -> None:
    before: Front = await front(upstream.url)
    model = "up:id=front-leaves,stall"
    async with ask("POST", before.url + CHAT, json_body=question(model)) as response:
        await anext(response.pieces())
    (entry,) = await upstream.requests(model, closed=True)
    assert entry["closed_by"] == "client"


@asynccontextmanager
async def numbers() -> AsyncIterator[tuple[str, list[str | None]]]:
    """An SSE server: 1 to 5, each with its id; goes on after the last id; 204 past the end."""
    seen: list[str | None] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        last = request.headers.get("Last-Event-ID")
        seen.append(last)
        if last == "5":
            return web.Response(status=204)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"retry: 20\n\n")
        for number in range(int(last or 0) + 1, 6):
            await response.write(f"id: {number}\ndata: {number}\n\n".encode())
            await asyncio.sleep(0.02)
        return response

    app = web.Application()
    app.router.add_route("*", "/numbers", handle)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", seen
    finally:
        await runner.cleanup()


async def test_chromium_runs_a_page(browser: Browser, front: Callable[[str], Any]) -> None:
    """Its EventSource reconnects after a cut with its last id, and is stopped by 204. What a script
    throws arrives here."""
    async with numbers() as (url, seen):
        before: Front = await front(url)
        before.cut("/numbers", b"data: 2\n\n")
        got = await browser.run(
            before,
            """
            return await new Promise((resolve) => {
              const got = [], source = new EventSource(given.path);
              source.onmessage = (e) => got.push(e.data);
              source.onerror = () => source.readyState === 2 && resolve(got);
            });
            """,
            path="/numbers",
        )
        assert got == list("12345")
        assert seen[0] is None
        assert seen[-1] == "5"
        assert len(seen) == 3
        with pytest.raises(PageError, match="no luck"):
            await browser.run(before, "throw new Error('no luck')")


@pytest.mark.parametrize(
    ("cut_after", "wanted"),
    [(b"data: 2\n\n", "12345"), (b"data: 2\n", "1345"), (b"id: 2\n", "1345"), (b"id: 2", "12345")],
)
async def test_fetch_event_source_takes_an_id_at_its_line(
    browser: Browser, front: Callable[[str], Any], cut_after: bytes, wanted: str
) -> None:
    """It sends its POST again after a cut. Unlike `EventSource` it takes an id as soon as its line
    is there, not with its block: what is cut between the two is lost to it."""
    async with numbers() as (url, _):
        before: Front = await front(url)
        before.cut("/numbers", cut_after)
        got = await browser.run(
            before,
            """
            const got = [];
            await fetchEventSource("/numbers", {
              method: "POST", body: "{}", onmessage: (e) => e.data && got.push(e.data),
            });
            return got;
            """,
        )
    assert got == list(wanted)
    assert [asked.method for asked in before.to("/numbers")] == ["POST", "POST"]
    assert before.to("/numbers")[1].headers["last-event-id"] == (
        "1" if cut_after == b"id: 2" else "2"
    )


async def test_node_eventsource(front: Callable[[str], Any]) -> None:
    async with numbers() as (url, seen):
        before: Front = await front(url)
        before.cut("/numbers", b"data: 2\n\n")
        result = await run_js("eventsource.mjs", before.url + "/numbers", {})
    assert [message["data"] for message in result["messages"]] == list("12345")
    assert [message["id"] for message in result["messages"]] == list("12345")
    assert result["ended"] == "closed"
    assert result["opens"] == 2
    assert seen[-1] == "5"


async def test_node_openai_sdk(upstream: UpstreamProcess) -> None:
    """The stock SDK against the upstream itself: what it makes of each is the measure."""

    async def sdk(command: str, model: str = "", **request: Any) -> Any:
        messages = [{"role": "user", "content": PROMPT}]
        request = {"model": model, "messages": messages, **request}
        return await run_js("openai_sdk.mjs", command, upstream.base, request)

    include = {"stream_options": {"include_usage": True}}
    streamed, plain, tools, models, refused, midway, cut = await asyncio.gather(
        sdk("stream", "up:tokens=5", **include),
        sdk("plain", "up:tokens=5"),
        sdk("tools", "up:tool"),
        sdk("models"),
        sdk("stream", "up:status=429"),
        sdk("stream", "up:error_event"),
        sdk("stream", "up:reset"),
    )
    assert streamed["text"] == expected("up:tokens=5", PROMPT)
    assert streamed["finish_reason"] == "stop"
    assert streamed["usage"]["completion_tokens"] == 5
    assert streamed["error"] is None
    assert plain["completion"]["choices"][0]["message"]["content"] == streamed["text"]
    call = tools["completion"]["choices"][0]["message"]["tool_calls"][0]
    assert json.loads(call["function"]["arguments"])["city"] == "Oslo"
    assert models["models"] == ["up-1", "up-2"]
    assert refused["error"]["class"] == "RateLimitError"
    assert refused["error"]["status"] == 429
    assert refused["error"]["code"] == "code_429"
    assert midway["text"]
    assert midway["error"]["class"] == "APIError"
    assert cut["text"]
    assert cut["error"]["class"]


# --- processes and pytest -----------------------------------------------------------------------


async def test_ports_that_do_not_answer(http: aiohttp.ClientSession) -> None:
    """One refuses at once; in the other connecting takes for ever."""
    with pytest.raises(aiohttp.ClientConnectorError):
        await http.get(f"http://127.0.0.1:{closed_port()}/")
    with black_hole() as port:
        timeout = aiohttp.ClientTimeout(sock_connect=0.3)
        with pytest.raises(aiohttp.ConnectionTimeoutError):
            await http.get(f"http://127.0.0.1:{port}/", timeout=timeout)


def test_a_process_can_be_looked_at() -> None:
    process = UpstreamProcess()
    try:
        assert process.rss() > 2**20
        assert process.cpu() > 0
        assert process.files() > 3
    finally:
        assert process.stop() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


async def test_a_server_of_ones_own(
    server: Callable[..., Server], upstream: UpstreamProcess
) -> None:
    """It takes configuration, answers, logs JSON, and ends well on SIGTERM."""
    started = server(model={"name": "up:tokens=4", "base_url": upstream.base, "api_key": "sk-own"})
    model = "up:id=own,tokens=4"
    async with ask_model(started.url, model, stream=False) as response:
        assert response.status == 200
    assert upstream.log(model)[0]["authorization"] == "Bearer sk-own"
    assert started.log_lines("listening")[0]["url"] == started.url
    assert started.url == f"http://127.0.0.1:{started.port}"
    assert started.stop() == 0


async def test_a_server_that_is_shared(demo_server: Server, relay_server: Server) -> None:
    for shared, model in ((demo_server, "demo:tokens=3"), (relay_server, "up:tokens=3")):
        async with ask_model(shared.url, model) as response:
            assert (await response.read(readers.Sse()))[-1].data == "[DONE]"


def test_a_server_that_does_not_start_says_why(server: Callable[..., Server]) -> None:
    with pytest.raises(RuntimeError, match="nonsense"):
        server(nonsense={"a": 1})


def test_a_process_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="did not start"):
        UpstreamProcess()


def test_configuration_is_written_as_toml() -> None:
    config = {
        "model": {"name": 'a"b\u2028', "rate": 1.5, "on": True},
        "upstreams": [{"models": ["x", "y"]}, {}],
    }
    assert tomllib.loads("\n".join(toml(config))) == config


@pytest.mark.parametrize(("ci", "code"), [("true", 1), ("", 0)])
def test_a_skip_is_a_failure_under_ci(tmp_path: Path, ci: str, code: int) -> None:
    (tmp_path / "test_one.py").write_text(
        "import pytest\n@pytest.mark.skip(reason='lazy')\ndef test_a(): pass\ndef test_b(): pass\n"
    )
    (tmp_path / "test_two.py").write_text(
        "import pytest\npytest.skip('lazier', allow_module_level=True)\n"
    )
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", "pyproject.toml"),
            *("--continue-on-collection-errors", str(tmp_path)),
        ],
        cwd=ROOT,
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode != 0) == bool(code), run.stdout + run.stderr
    if code:
        assert "lazy" in run.stdout
        assert "lazier" in run.stdout
