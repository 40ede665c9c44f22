"""Stop is a call: it closes the upstream's connection within 100 ms, and everyone reading sees that
the answer was cancelled (design, section 4).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson
import pytest

import app as rivulet
from handlers.keys import GENERATIONS
from streaming.config import Config, Generation, Model
from streaming.generation import Key
from tests.behaviour import expected
from tests.clients import (
    DONE,
    KINDS,
    OLD_KINDS,
    PROMPT,
    Kind,
    Seen,
    asked,
    attach,
    attached,
    body_of,
    named,
    see,
    start,
    status,
    stop,
    whole,
)
from tests.inside import in_process
from tests.processes import Server, UpstreamProcess, until
from tests.readers import Sse, ask
from tests.sockets import black_hole

StartServer = Callable[..., Server]
CONTENT, CHAT, NATIVE, OPENAI = Kind("content"), Kind("chat"), Kind("native"), Kind("openai")
LONG = "tokens=5000,rate=100"
SLOW = 1.0  # seconds; the promise is 0.1, which the median of many must keep on a busy machine


async def begun(url: str, stream_id: str) -> None:
    """Returns when some of the answer's text is there."""
    async with attached(url, stream_id, CONTENT) as answer:
        async for message in answer.items(Sse()):
            if "content" in message.json():
                return


async def closed_after(upstream: UpstreamProcess, model: str, called: float) -> float:
    """Seconds from a call until the upstream saw its connection to `model` closed."""
    (request,) = await upstream.requests(model, closed=True)
    assert request["closed_by"] == "client"
    return float(request["closed_at"] - called)


def check_cancelled(kind: Kind, seen: Seen) -> None:
    """That this client saw the ending of wire.md, section 1, for a cancelled generation."""
    assert seen.status == 200, kind
    assert seen.ended == ("cut" if kind.cuts else "end"), kind
    assert seen.ending == ("" if kind.framing == "text" else "cancelled"), kind
    assert DONE not in seen.items or kind.dialect == "tool", kind
    if kind.dialect == "content" and kind.framing != "text":
        said = next(item for item in reversed(seen.items) if item != DONE)
        assert (said["error"], said["code"]) == ("Stopped", "cancelled")


async def test_it_closes_the_upstream_at_once(
    relay_server: Server, upstream: UpstreamProcess
) -> None:
    """Within 100 ms of the call; half of the calls come before the first token."""
    url, measured = relay_server.url, []
    for number in range(24):
        model = named(LONG if number % 2 else "headers_delay=60" if number % 4 else "delay=60")
        async with asked(url, CONTENT, model) as answer:
            stream_id = answer.headers["x-stream-id"]
            await upstream.requests(model)
            if number % 2:
                await begun(url, stream_id)
            called = time.monotonic()
            assert (await stop(url, stream_id)).status == 200
            measured.append(await closed_after(upstream, model, called))
            check_cancelled(CONTENT, await see(CONTENT, answer))
    print(f"median {statistics.median(measured):.4f} s, worst {max(measured):.4f} s")
    assert max(measured) <= SLOW
    assert statistics.median(measured) <= 0.1


@pytest.mark.parametrize("words", [LONG, "delay=60", "headers_delay=60"])
async def test_everyone_reading_sees_it(
    relay_server: Server, upstream: UpstreamProcess, words: str
) -> None:
    """All readers, in every dialect and framing, get the same text and the cancelled ending; those
    of the openai dialect that still wait for their status get 409. So does who attaches later.
    """
    url, model = relay_server.url, named(words)
    async with asked(url, CONTENT, model) as first:
        stream_id = first.headers["x-stream-id"]
        await upstream.requests(model)
        kinds = KINDS + OLD_KINDS
        readers = [asyncio.create_task(attach(url, stream_id, kind)) for kind in kinds]
        if words == LONG:
            await begun(url, stream_id)
        await stop(url, stream_id)
        own, seen = await see(CONTENT, first), await asyncio.gather(*readers)
        check_cancelled(CONTENT, own)
    assert expected(f"up:{words}", PROMPT).startswith(own.text)
    later = await asyncio.gather(*(attach(url, stream_id, kind) for kind in kinds))
    for kind, each in zip(kinds * 2, seen + later, strict=True):
        assert each.text == own.text
        if kind.dialect == "openai" and not own.text:
            assert (each.status, each.code) == (409, "cancelled")
        else:
            check_cancelled(kind, each)


async def test_the_status_tells(relay_server: Server) -> None:
    """It says cancelled, with an estimate of the usage that is marked as one; *chat* and *native*
    say the same in the stream.
    """
    url = relay_server.url
    async with asked(url, CHAT, named(LONG)) as answer:
        stream_id = answer.headers["x-stream-id"]
        assert (await status(url, stream_id))["state"] == "running"
        await begun(url, stream_id)
        await stop(url, stream_id)
        seen = await see(CHAT, answer)
    said = await status(url, stream_id)
    assert said["state"] == "cancelled"
    assert said["usage"]["estimated"] is True
    assert said["usage"]["completion_tokens"] == -(-len(seen.text) // 4)
    assert said["usage"]["prompt_tokens"] == -(-len(PROMPT) // 4)
    assert said["started"] <= said["finished"]
    assert seen.items[-1]["metadata"]["usage"] == said["usage"]
    ending = (await attach(url, stream_id, NATIVE)).items[-1]
    assert (ending["type"], ending["data"]["usage"]) == ("cancelled", said["usage"])


async def test_twice_and_at_once(relay_server: Server, upstream: UpstreamProcess) -> None:
    """However often it is called, each call is 200 and there is one ending."""
    url, model = relay_server.url, named(LONG)
    async with asked(url, NATIVE, model) as answer:
        stream_id = answer.headers["x-stream-id"]
        await begun(url, stream_id)
        calls = await asyncio.gather(*(stop(url, stream_id) for _ in range(20)))
        calls.append(await stop(url, stream_id))
        seen = await see(NATIVE, answer)
    assert {call.status for call in calls} == {200}
    assert sum(item["type"] == "cancelled" for item in seen.items) == 1
    assert len(upstream.log(model)) == 1


async def test_after_the_end(relay_server: Server) -> None:
    """A finished answer stays finished, and a failed one failed."""
    url = relay_server.url
    for words, state in (("tokens=5", "finished"), ("error_event=2", "failed")):
        seen = await start(url, CONTENT, named(words))
        before = await status(url, seen.stream_id)
        assert (await stop(url, seen.stream_id)).status == 200
        assert await status(url, seen.stream_id) == before
        assert before["state"] == state
        assert (await attach(url, seen.stream_id, CONTENT)).text == seen.text


async def test_a_resumed_stream(relay_server: Server, upstream: UpstreamProcess) -> None:
    """An answer whose first reader was cut is stopped just so, and who resumed it sees it."""
    url, model = relay_server.url, named(LONG)
    parser = Sse()
    async with asked(url, CHAT, model) as answer:
        stream_id = answer.headers["x-stream-id"]
        await answer.read(parser, cut_after=2000)
    headers = {"Last-Event-ID": parser.last_event_id}
    async with ask("POST", f"{url}/api/chat/stream", headers=headers) as resumed:
        assert resumed.headers["x-stream-id"] == stream_id
        called = time.monotonic()
        await stop(url, stream_id)
        check_cancelled(CHAT, await see(CHAT, resumed))
    assert await closed_after(upstream, model, called) <= SLOW
    assert len(upstream.log(model)) == 1


def connecting(port: int) -> int:
    """How many sockets of this machine wait for an answer from this port (proc(5), SYN_SENT)."""
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(int(row[2].partition(":")[2], 16) == port and row[3] == "02" for row in rows)


async def test_while_connecting(server: StartServer) -> None:
    """A host that does not answer is not waited for, and its socket is closed."""
    with black_hole() as port:
        others = connecting(port)
        model = {"name": "m", "base_url": f"http://127.0.0.1:{port}/v1"}
        url = server(model=model, generation={"connect_timeout": 60}).url
        async with asked(url, CONTENT, "m") as answer:
            await until(lambda: connecting(port) > others)
            called = time.monotonic()
            await stop(url, answer.headers["x-stream-id"])
            await until(lambda: connecting(port) == others)
            check_cancelled(CONTENT, await see(CONTENT, answer))
            assert time.monotonic() - called <= SLOW


async def test_while_it_waits_for_another_try(
    server: StartServer, upstream: UpstreamProcess
) -> None:
    """Stopped between two tries, there is no other try."""
    config = {"backoff": 2.0, "backoff_max": 60.0, "retries": 5}
    url = server(model={"name": "m", "base_url": upstream.base}, generation=config).url

    async def stopped(words: str) -> str:
        model = named(words)
        async with asked(url, CONTENT, model) as answer:
            await upstream.requests(model, closed=True)
            called = time.monotonic()
            await stop(url, answer.headers["x-stream-id"])
            check_cancelled(CONTENT, await see(CONTENT, answer))
            assert time.monotonic() - called <= SLOW
        return model

    faults = ("status=500", "status=429,retry_after=25", "first_error")
    models = await asyncio.gather(*map(stopped, faults))
    await asyncio.sleep(2.5)  # longer than the first wait: nothing shows that nothing comes
    for model in models:
        assert len(upstream.log(model)) == 1


async def test_somebody_elses(relay_server: Server, upstream: UpstreamProcess) -> None:
    """A foreign stream is answered like an unknown one, and runs on."""
    url, model = relay_server.url, named("tokens=60,rate=60")
    ada, eve = {"X-User-Id": "ada"}, {"X-User-Id": "eve"}

    async def refused(stream_id: str) -> dict[str, Any]:
        path = f"{url}/api/v1/streams/{stream_id}/stop"
        async with ask("POST", path, headers=eve) as answer:
            error: dict[str, Any] = (await answer.json())["error"]
            assert answer.status == 404
        return {name: value for name, value in error.items() if name != "request_id"}

    async with asked(url, CONTENT, model, headers=ada) as answer:
        foreign = await refused(answer.headers["x-stream-id"])
        assert foreign == await refused("0" * 32) == await refused("nonsense")
        seen = await see(CONTENT, answer)
    assert (seen.ending, seen.text) == ("finished", expected(model, PROMPT))


async def test_whoever_is_allowed_to(relay_server: Server) -> None:
    """Its owner stops it from any connection, over HTTP/1.0 too, with nobody reading."""
    url = relay_server.url
    async with asked(url, OPENAI, named(LONG), headers={"X-User-Id": "ada"}) as answer:
        stream_id = answer.headers["x-stream-id"]
        path = f"{url}/api/v1/streams/{stream_id}/stop?user_id=ada"
        async with ask("POST", path, http="1.0") as call:
            assert (await call.json())["state"] == "cancelled"
        check_cancelled(OPENAI, await see(OPENAI, answer))
    async with asked(url, CHAT, named(LONG)) as answer:
        stream_id = answer.headers["x-stream-id"]
    await stop(url, stream_id)
    assert (await status(url, stream_id))["state"] == "cancelled"


@pytest.mark.parametrize("path", ["/api/v1/generate", "/v1/chat/completions"])
async def test_an_answer_in_one_piece(upstream: UpstreamProcess, path: str) -> None:
    """It is 409 with the text so far. (Its stream id leaves with the answer, so the application
    runs in this process, where the test finds the generation by its idempotency key.)
    """
    config = Config(
        model=Model(name="up:", base_url=upstream.base), generation=Generation(linger=5)
    )
    model = named(LONG)
    body = orjson.dumps(body_of(path, model=model), option=orjson.OPT_SORT_KEYS)
    key = Key(f"POST {path} anonymous", "key k", sha256(body).digest())
    application = rivulet.build(config)
    async with in_process(application) as url:
        asking = asyncio.create_task(whole(url, path, model, headers={"Idempotency-Key": "k"}))
        generations = application[GENERATIONS]
        await until(lambda: generations.running)
        running = await generations.started(key)
        assert running is not None
        await until(lambda: len(running.text()) > 100)
        await stop(url, running.id)
        seen = await asking
    assert (seen.status, seen.code, seen.ending) == (409, "cancelled", "cancelled")
    assert len(seen.text) > 100
    assert expected(model, PROMPT).startswith(seen.text)
