"""A bad day behind nginx, and behind two in a row: what was cut does not look whole, no POST is
sent twice, and the other instance takes over.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from tests.behaviour import expected
from tests.clients import DONE, KINDS, OLD_KINDS, PROMPT, Kind, asked, named, start
from tests.conftest import StartNginx, StartServer
from tests.people import new_room, on_socket
from tests.processes import Server, UpstreamProcess, until
from tests.raw_socket import dialled
from tests.readers import Sse, ask, connect
from tests.sockets import closed_port

LONG = "tokens=5000,rate=50"
CHAT, CONTENT, OPENAI = Kind("chat"), Kind("content"), Kind("openai")
Serve = Callable[..., Server]


@pytest.fixture
def serve(server: StartServer, upstream: UpstreamProcess) -> Serve:
    """Starts an instance before the upstream; drain: its window in seconds."""

    def start(drain: float = 0.1) -> Server:
        model = {"name": "up:", "base_url": upstream.base}
        return server(model=model, server={"drain": drain}, generation={"retries": 0})

    return start


async def speaking(upstream: UpstreamProcess, model: str, count: int) -> None:
    """Returns when so many answers of this model are in their midst."""
    await until(lambda: sum(e["tokens_sent"] > 5 for e in upstream.log(model)) == count)


def nowhere() -> str:
    """Where nobody listens."""
    return f"http://127.0.0.1:{closed_port()}"


# --- what was cut -------------------------------------------------------------------------------


async def test_an_instance_that_is_killed(
    nginx: StartNginx, serve: Serve, upstream: UpstreamProcess
) -> None:
    """In the midst of streams and of a WebSocket: no client takes what it has for whole. Who comes
    next is served by the other instance, without an error in between.
    """
    first, other = serve(), serve()
    way, model = nginx(first.url), named(LONG)
    streams = [asyncio.ensure_future(start(way.url, kind, model)) for kind in KINDS]
    async with dialled(way.url, f"/ws/{new_room()}") as socket:
        await speaking(upstream, model, len(streams))
        first.child.send_signal(signal.SIGKILL)
        assert await socket.ended() == 1006
    for seen in [await each for each in streams]:
        assert seen.text
        assert expected(model, PROMPT).startswith(seen.text)
        assert (seen.ending, seen.ended) == ("", "cut")
    way = nginx(first.url, other.url)
    for kind in KINDS:
        seen = await start(way.url, kind, named("tokens=20"))
        assert (seen.ending, seen.ended) == ("finished", "end")


async def test_http_1_0(nginx: StartNginx, serve: Serve, upstream: UpstreamProcess) -> None:
    """A client of HTTP/1.0 has its exact answer. When an instance is killed nginx ends its body as
    if it were whole, so only what names its own ending (objects with a type, `[DONE]`) tells.
    """
    instance, words = serve(), "tokens=50,rate=500"
    way, model = nginx(instance.url), named(LONG)
    for seen in await asyncio.gather(*(start(way.url, kind, named(words)) for kind in OLD_KINDS)):
        assert (seen.text, seen.ending) == (expected(f"up:{words}", PROMPT), "finished")
    async with connect(way.url, "1.0") as connection:
        connection.writer.write(b"GET /health HTTP/1.0\r\n\r\n")
        assert (await connection.leftover()).startswith(b"HTTP/1.1 200 ")
    streams = [asyncio.ensure_future(start(way.url, kind, model)) for kind in OLD_KINDS]
    await speaking(upstream, model, len(streams))
    instance.child.send_signal(signal.SIGKILL)
    for kind, seen in zip(OLD_KINDS, [await each for each in streams], strict=True):
        assert expected(model, PROMPT).startswith(seen.text)
        tells = kind.dialect in ("chat", "tool", "native") and kind.framing != "text"
        if tells or kind.framing == "sse":
            assert seen.ending == "", kind


@pytest.mark.parametrize("fault", ["error_event", "reset", "drop", "end_clean", "bad_json"])
async def test_a_model_that_fails_midway(nginx: StartNginx, serve: Serve, fault: str) -> None:
    """Through nginx as without it: *openai* and text are cut, *openai* after its error; the others
    say so and end.
    """
    way = nginx(serve().url)
    for kind in KINDS:
        seen = await start(way.url, kind, named(f"tokens=20,{fault}"))
        assert seen.text
        assert seen.ended == ("cut" if kind.cuts else "end"), kind
        assert seen.ending == ("" if kind.framing == "text" else "failed"), kind
        if kind.dialect == "openai":
            assert DONE not in seen.items


async def test_statuses_before_the_stream(nginx: StartNginx, serve: Serve) -> None:
    """What a stock SDK acts on comes as the server said it."""
    way = nginx(serve().url)
    seen = await start(way.url, OPENAI, named("status=429,retry_after=7"))
    assert (seen.status, seen.headers["retry-after"]) == (429, "7")
    seen = await start(way.url, OPENAI, named("status=500"))
    assert (seen.status, seen.ending) == (502, "failed")
    assert "upstream" in seen.code  # the model's failure, not nginx's
    async with ask("POST", f"{way.url}/stream", json_body={}) as answer:
        assert answer.status == 422


# --- an instance that is not there --------------------------------------------------------------


async def test_who_refuses_a_connection_is_passed_over(nginx: StartNginx, serve: Serve) -> None:
    """Nothing was sent, so a POST may go to the other instance."""
    way = nginx(nowhere(), serve().url)
    for _ in range(10):
        assert (await start(way.url, CONTENT, named("tokens=5"))).ending == "finished"


@asynccontextmanager
async def swallower() -> AsyncIterator[tuple[str, list[str]]]:
    """An instance that takes a request and dies of it: its URL, and the requests it took."""
    taken: list[str] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append((await reader.readuntil(b"\r\n")).decode().split()[0])
        writer.close()

    listener = await asyncio.start_server(take, "127.0.0.1", 0)
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", taken


async def test_a_post_is_never_sent_twice(
    nginx: StartNginx, serve: Serve, upstream: UpstreamProcess
) -> None:
    """An instance that died with a POST in its hands may have begun its answer: the client gets an
    error in the server's shape, and may ask again.
    """
    model = named("tokens=5")
    async with swallower() as (url, taken):
        way = nginx(url, serve().url)
        seen = [await start(way.url, CONTENT, model) for _ in range(10)]
    refused = [each for each in seen if each.status != 200]
    assert len(refused) == len(taken) >= 1
    for each in refused:
        assert (each.status, each.code) == (502, "unavailable")
        assert each.headers["cache-control"] == "no-store"
        assert each.headers["retry-after"]
    assert len(upstream.log(model)) == len(seen) - len(taken)


async def test_an_event_source_that_comes_back_to_nobody(nginx: StartNginx) -> None:
    """It would stop for ever at an error, so it is told to ask again; everybody else is told that
    the server is away.
    """
    way, path = nginx(nowhere()), "/api/v1/streams/x/events"
    accept = {"Accept": "text/event-stream"}
    parser = Sse()
    async with ask("GET", way.url + path, headers={**accept, "Last-Event-ID": "x-1"}) as answer:
        assert await answer.read(parser) == []
    assert (answer.status, answer.ended) == (200, "end")
    assert answer.headers["content-type"] == "text/event-stream"
    assert parser.retry and 1000 <= parser.retry <= 4000
    for headers in (accept, {"Last-Event-ID": "x-1"}):
        async with ask("GET", way.url + path, headers=headers) as answer:
            assert (await answer.json())["error"]["code"] == "unavailable"
        assert answer.status == 502


# --- SIGTERM ------------------------------------------------------------------------------------


async def test_running_answers_finish_and_new_ones_go_elsewhere(
    nginx: StartNginx, serve: Serve, upstream: UpstreamProcess
) -> None:
    """While one instance drains, its streams end whole, and no new client meets it, on connections
    that nginx has kept open to it neither.
    """
    leaving, staying = serve(60.0), serve(60.0)
    # So that nginx goes on trying the one that leaves.
    way = nginx(leaving.url, staying.url, changes={"max_fails=1": "max_fails=0"})
    models = [named("tokens=60,rate=30"), named("tokens=150,rate=30")]
    streams = [
        [asyncio.ensure_future(start(way.url, CHAT, model)) for _ in range(8)] for model in models
    ]
    for model in models:
        await speaking(upstream, model, 8)
    await asyncio.gather(*(start(way.url, CONTENT, named("tokens=5")) for _ in range(16)))
    leaving.child.send_signal(signal.SIGTERM)
    await until(lambda: leaving.log_lines("draining"))
    for model, group in zip(models, streams, strict=True):
        for _ in range(16):
            assert (await start(way.url, CONTENT, named("tokens=5"))).ending == "finished"
        assert leaving.child.poll() is None
        for seen in [await each for each in group]:
            assert (seen.text, seen.ended) == (expected(model, PROMPT), "end")
    await until(lambda: leaving.child.poll() is not None)
    assert leaving.child.returncode == 0


async def test_past_the_window_clients_are_told_to_come_back(
    nginx: StartNginx, serve: Serve, upstream: UpstreamProcess
) -> None:
    """SSE by `retry:` and a cut, WebSockets by 1012."""
    leaving = serve(0.5)
    way, model, parser = nginx(leaving.url), named(LONG), Sse()
    async with (
        asked(way.url, CHAT, model) as answer,
        on_socket(way.url, f"/ws/{new_room()}") as socket,
    ):
        await socket.hear("joined")
        await speaking(upstream, model, 1)
        leaving.child.send_signal(signal.SIGTERM)
        items = await answer.read(parser)
        await socket.rest()
    assert items and answer.ended == "cut"
    assert parser.retry is not None and 0 <= parser.retry <= 500
    assert socket.code == 1012
