"""Drain: what SIGTERM does to answers that run, to clients that wait, and to the process."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.behaviour import expected
from tests.clients import (
    JSON_PATHS,
    KINDS,
    OLD_KINDS,
    PROMPT,
    Kind,
    asked,
    named,
    see,
    start,
    whole,
)
from tests.processes import Server, UpstreamProcess, until
from tests.readers import Sse, ask, connect
from tests.sdk import client_of
from tests.sdk import whole as sdk_whole

CHAT = Kind("chat")
StartServer = Callable[..., Server]


@pytest.fixture
def serve(server: StartServer, upstream: UpstreamProcess) -> Callable[..., Server]:
    """Starts a server before the upstream with every fault; drain: its window in seconds."""

    def start(drain: float, **more: Any) -> Server:
        model = {"name": "up:", "base_url": upstream.base}
        return server(model=model, server={"drain": drain}, **more)

    return start


def terminate(server: Server, number: int = signal.SIGTERM) -> None:
    server.child.send_signal(number)


async def gone(server: Server) -> None:
    """Waits for its end, which must be an orderly one."""
    await until(lambda: server.child.poll() is not None)
    server.stop()
    assert server.child.returncode == 0
    assert all(line["event"] for line in server.log_lines()), server.stderr
    assert not any("exception" in line for line in server.log_lines())


def listens(server: Server) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", server.port)) == 0


async def test_running_answers_finish_within_the_window(
    serve: Callable[..., Server], upstream: UpstreamProcess
) -> None:
    """Streams of every kind, and answers in one piece, end whole; no new client gets in meanwhile.
    When the last has ended the process is gone, long before the window is over.
    """
    server, model = serve(60.0), named("tokens=60,rate=40")
    streams = [asyncio.ensure_future(start(server.url, kind, model)) for kind in KINDS + OLD_KINDS]
    wholes = [asyncio.ensure_future(whole(server.url, path, model)) for path in JSON_PATHS]
    await upstream.requests(model, len(streams) + len(wholes))
    began = time.monotonic()
    terminate(server)
    await until(lambda: not listens(server))
    assert server.child.poll() is None
    for seen in [await each for each in streams + wholes]:
        assert seen.text == expected(model, PROMPT)
        assert (seen.ending, seen.ended) == ("finished", "end")
    await gone(server)
    assert time.monotonic() - began < 30


async def test_an_idle_server_goes_at_once(serve: Callable[..., Server]) -> None:
    """Connections that are kept alive do not hold it."""
    server = serve(60.0)
    async with connect(server.url) as connection:
        answer = await connection.request("GET", "/health")
        await answer.body()
        began = time.monotonic()
        terminate(server)
        assert await connection.leftover() == b""
        await gone(server)
        assert time.monotonic() - began < 30


async def test_past_the_window_streams_are_cut(
    serve: Callable[..., Server], upstream: UpstreamProcess
) -> None:
    """Whatever the client, it sees an answer that did not end: the exact beginning, no ending, and
    a connection that was cut. The model's is closed.
    """
    server, model = serve(0.5), named("tokens=5000,rate=50")
    kinds = KINDS + OLD_KINDS
    streams = [asyncio.ensure_future(start(server.url, kind, model)) for kind in kinds]
    await until(lambda: sum(e["tokens_sent"] > 5 for e in upstream.log(model)) == len(kinds))
    terminate(server)
    for seen in [await each for each in streams]:
        assert seen.status == 200
        assert seen.text
        assert expected(model, PROMPT).startswith(seen.text)
        assert (seen.ending, seen.ended) == ("", "cut")
    await gone(server)
    log = await upstream.requests(model, len(kinds), closed=True)
    assert {entry["closed_by"] for entry in log} == {"client"}


async def test_a_process_that_is_killed(
    serve: Callable[..., Server], upstream: UpstreamProcess
) -> None:
    """Without any drain, too, no client takes what it has for whole, on HTTP/1.0 neither."""
    server, model = serve(60.0), named("tokens=5000,rate=50")
    kinds = KINDS + OLD_KINDS
    streams = [asyncio.ensure_future(start(server.url, kind, model)) for kind in kinds]
    await until(lambda: sum(e["tokens_sent"] > 5 for e in upstream.log(model)) == len(kinds))
    terminate(server, signal.SIGKILL)
    for seen in [await each for each in streams]:
        assert seen.text
        assert (seen.ending, seen.ended) == ("", "cut")
    await upstream.requests(model, len(kinds), closed=True)


async def test_clients_come_back_spread_over_the_window(serve: Callable[..., Server]) -> None:
    """Each `EventSource` is told another time to come back, so that not all do at once."""
    server, model, window = serve(1.0), named("tokens=5000,rate=50"), 1000
    opened: list[str] = []

    async def retry_of(path: str) -> int | None:
        parser = Sse()
        async with ask("GET", server.url + path) as answer:
            opened.append(path)
            items = [item async for item in answer.items(parser)]
            assert items
            assert answer.ended == "cut"
        return parser.retry

    async with asked(server.url, CHAT, model) as first:
        path = f"/api/v1/streams/{first.headers['x-stream-id']}/events"
        paths = [path] * 40 + ["/api/stream?interval=60"] * 5
        reading = [asyncio.ensure_future(retry_of(each)) for each in paths]
        await until(lambda: len(opened) == len(paths))
        terminate(server)
        told = [retry for retry in await asyncio.gather(*reading) if retry is not None]
    assert len(told) == len(paths)
    assert all(0 <= retry <= window for retry in told)
    assert len(set(told)) > 20
    assert max(told) - min(told) > window / 4
    await gone(server)


async def test_who_waits_for_an_answer_is_told_to_come_back(
    serve: Callable[..., Server], upstream: UpstreamProcess
) -> None:
    """Where nothing has gone out yet there is a status: 503, with `Retry-After`."""
    server, model = serve(0.3), named("delay=60")
    wholes = [asyncio.ensure_future(whole(server.url, path, model)) for path in JSON_PATHS]
    held = asyncio.ensure_future(start(server.url, Kind("openai"), model))
    async with client_of(server) as client:
        sdk = asyncio.ensure_future(sdk_whole(client, model))
        await upstream.requests(model, len(wholes) + 2)
        terminate(server)
        for seen in [await each for each in [*wholes, held]]:
            assert (seen.status, seen.code) == (503, "shutting_down")
            assert int(seen.headers["retry-after"]) >= 1
        with pytest.raises(openai.InternalServerError) as caught:
            await sdk
    assert caught.value.status_code == 503
    await gone(server)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
async def test_another_sigterm_does_no_harm(serve: Callable[..., Server], first: int) -> None:
    """Ctrl-C drains as SIGTERM does, and while it does so SIGTERM changes nothing: answers end
    whole.
    """
    server, model = serve(60.0), named("tokens=60,rate=40")
    async with asked(server.url, CHAT, model) as answer:
        terminate(server, first)
        await until(lambda: not listens(server))
        for _ in range(3):
            await asyncio.sleep(0.1)
            terminate(server)
        seen = await see(CHAT, answer)
    assert seen.text == expected(model, PROMPT)
    assert (seen.ending, seen.ended) == ("finished", "end")
    await gone(server)


async def test_a_second_ctrl_c_gives_up_the_drain(serve: Callable[..., Server]) -> None:
    """The process goes at once, without a traceback; a stream that runs is cut."""
    server = serve(60.0)
    async with asked(server.url, CHAT, named("tokens=5000,rate=50")) as answer:
        terminate(server, signal.SIGINT)
        await until(lambda: not listens(server))
        await until(lambda: server.log_lines("draining"))
        terminate(server, signal.SIGINT)
        seen = await see(CHAT, answer)
    assert (seen.ending, seen.ended) == ("", "cut")
    await until(lambda: server.child.poll() is not None)
    assert not any("Traceback" in line for line in server.stderr)


async def test_a_stalled_reader_does_not_hold_the_process(serve: Callable[..., Server]) -> None:
    """One that takes nothing is not waited for longer than a few seconds."""
    server = serve(0.3, limits={"prompt_chars": 2_000_000, "body_bytes": 8_000_000})
    body = {"prompt": "x" * 1_000_000, "model": named("echo=1000,rate=50000,stall_end")}
    async with connect(server.url, receive_buffer=2048) as connection:
        answer = await connection.request("POST", "/stream", json_body=body)
        assert answer.status == 200
        began = time.monotonic()
        terminate(server)
        await gone(server)
        assert time.monotonic() - began < 20
        await answer.body()
        assert answer.ended == "cut"
