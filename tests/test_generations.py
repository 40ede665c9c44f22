"""A generation runs on its own: readers come and go, share it, and find it for a while after its
end (design, section 4).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from tests.behaviour import TOOL, expected
from tests.clients import (
    DONE,
    JSON_PATHS,
    KINDS,
    OLD_KINDS,
    PROMPT,
    Kind,
    asked,
    attach,
    attached,
    body_of,
    named,
    once,
    see,
    start,
    status,
    stop,
    whole,
)
from tests.processes import Server, UpstreamProcess
from tests.readers import Ndjson, Sse, ask, connect

StartServer = Callable[..., Server]
CONTENT, CHAT, NATIVE, OPENAI = Kind("content"), Kind("chat"), Kind("native"), Kind("openai")
LONG = "tokens=5000,rate=100"
SOON = 1.0  # seconds in which a busy machine does what should take milliseconds


def relaying(upstream: UpstreamProcess, **generation: Any) -> dict[str, Any]:
    """The configuration of a server whose default model is the upstream."""
    return {
        "server": {"drain": 0},
        "model": {"name": "up:", "base_url": upstream.base},
        "generation": generation,
    }


# --- linger -------------------------------------------------------------------------------------


async def test_nobody_reading(server: StartServer, upstream: UpstreamProcess) -> None:
    """An answer that nobody has read for `linger` seconds is cancelled, upstream too."""
    url, model = server(**relaying(upstream, linger=1.0)).url, named(LONG)
    async with asked(url, CHAT, model) as answer:
        await answer.read(Sse(), cut_after=1000)
    left = time.monotonic()
    (request,) = await upstream.requests(model, closed=True)
    assert request["closed_by"] == "client"
    assert 0.9 <= request["closed_at"] - left <= 1.0 + SOON
    stream_id = answer.headers["x-stream-id"]
    said = await once(url, stream_id, "state", "cancelled")
    assert said["usage"]["estimated"] is True
    ending = (await attach(url, stream_id, NATIVE)).items[-1]
    assert (ending["type"], ending["data"]["reason"]) == ("cancelled", "abandoned")


async def test_coming_back_in_time(server: StartServer, upstream: UpstreamProcess) -> None:
    """A reader that comes back within `linger` keeps the answer running, however long it takes."""
    url, model = server(**relaying(upstream, linger=1.0)).url, named("tokens=150,rate=50")
    parser = Sse()
    async with asked(url, CHAT, model) as answer:
        items = [message.json() for message in await answer.read(parser, cut_after=2000)]
    await asyncio.sleep(0.3)
    headers = {"Last-Event-ID": parser.last_event_id}
    async with ask("POST", f"{url}/api/chat/stream", headers=headers) as resumed:
        seen = await see(CHAT, resumed)
    before = "".join(item["content"] for item in items)
    assert (seen.ending, before + seen.text) == ("finished", expected(model, PROMPT))
    assert len(upstream.log(model)) == 1


async def test_one_reader_is_enough(server: StartServer, upstream: UpstreamProcess) -> None:
    """It runs as long as anybody reads it, or waits for it in one piece."""
    url, model = server(**relaying(upstream, linger=0.3)).url, named("tokens=80,rate=40")
    waiting = asyncio.create_task(whole(url, JSON_PATHS[0], model))
    async with asked(url, CHAT, model) as answer:
        stream_id = answer.headers["x-stream-id"]
        staying = asyncio.create_task(attach(url, stream_id, Kind("native", "ndjson")))
        await answer.read(Sse(), cut_after=1000)
    assert (await staying).text == expected(model, PROMPT)
    assert (await waiting).text == expected(model, PROMPT)


async def test_going_before_the_first_token(
    relay_server: Server, upstream: UpstreamProcess
) -> None:
    """Disconnect is not stop, also before there is anything to read: who comes back finds all."""
    url, model = relay_server.url, named("delay=0.5,tokens=30")
    async with asked(url, CHAT, model) as answer:
        pass
    seen = await attach(url, answer.headers["x-stream-id"], CHAT)
    assert (seen.ending, seen.text) == ("finished", expected(model, PROMPT))
    assert len(upstream.log(model)) == 1


@pytest.mark.parametrize("rst", [False, True], ids=["fin", "rst"])
@pytest.mark.parametrize("words", [LONG, "delay=60", "headers_delay=60"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "in one piece"])
async def test_openai_clients_cannot_come_back(
    relay_server: Server, upstream: UpstreamProcess, stream: bool, words: str, rst: bool
) -> None:
    """When the client of `/v1/chat/completions` goes, the upstream's connection closes at once."""
    path, model = "/v1/chat/completions", named(words)
    body = body_of(path, model=model, stream=stream)
    asking = asyncio.create_task(_ask_and_leave(relay_server.url + path, body, rst))
    await upstream.requests(model)
    await asyncio.sleep(0.05)  # midway for some, waiting for others
    left = time.monotonic()
    asking.cancel()
    (request,) = await upstream.requests(model, closed=True)
    assert request["closed_by"] == "client"
    assert request["closed_at"] - left <= SOON


async def _ask_and_leave(url: str, body: dict[str, Any], rst: bool) -> None:
    async with connect(url) as connection:
        try:
            answer = await connection.request("POST", "/v1/chat/completions", json_body=body)
            await answer.body()
        finally:
            connection.cut(rst)


# --- what is kept -------------------------------------------------------------------------------


async def test_retention(server: StartServer, upstream: UpstreamProcess) -> None:
    """After its end an answer can be read for `retention` seconds, then its id is unknown: 404, and
    410 to who resumes.
    """
    url = server(**relaying(upstream, retention=1.5)).url
    seen = await start(url, NATIVE, named("tokens=5"))
    ended, stream_id = time.monotonic(), seen.stream_id
    assert (await attach(url, stream_id, CHAT)).text == seen.text
    await once(url, stream_id, "status", 404)
    assert time.monotonic() - ended >= 1.0
    await check_gone(url, stream_id)


async def check_gone(url: str, stream_id: str) -> None:
    """That this id is answered like an unknown one, everywhere."""
    assert (await status(url, stream_id))["status"] == 404
    assert (await stop(url, stream_id)).status == 404
    assert (await attach(url, stream_id, NATIVE)).status == 404
    headers = {"Last-Event-ID": f"{stream_id}-1"}
    for path in ("/stream", "/api/chat/stream", "/v1/chat/completions"):
        async with ask("POST", url + path, headers=headers) as answer:
            assert answer.status == 410
            assert (await answer.json())["error"]["code"] == "gone"


async def test_retained_bytes(server: StartServer, upstream: UpstreamProcess) -> None:
    """Past `retained_bytes` the answers that ended first go before their time."""
    url = server(**relaying(upstream, retained_bytes=150_000)).url
    ended = [await start(url, CONTENT, named("tokens=1000")) for _ in range(8)]  # 25 kB or so each
    held = [(await status(url, seen.stream_id))["status"] == 200 for seen in ended]
    assert held == sorted(held)  # the oldest are gone, the newest are there
    assert 2 <= sum(held) <= 6
    await check_gone(url, ended[0].stream_id)
    assert (await attach(url, ended[-1].stream_id, CHAT)).text == ended[-1].text


async def test_nothing_retained(server: StartServer, upstream: UpstreamProcess) -> None:
    """What runs is held whatever the bound, and who reads it reads it to its end."""
    url, model = server(**relaying(upstream, retained_bytes=0)).url, named("tokens=50,rate=100")
    async with asked(url, CONTENT, model) as answer:
        stream_id = answer.headers["x-stream-id"]
        kinds = KINDS + OLD_KINDS
        readers = await asyncio.gather(*(attach(url, stream_id, kind) for kind in kinds))
        assert (await see(CONTENT, answer)).text == expected(model, PROMPT)
    assert {seen.text for seen in readers} == {expected(model, PROMPT)}
    await check_gone(url, stream_id)


# --- readers ------------------------------------------------------------------------------------


async def test_many_readers_one_call(relay_server: Server, upstream: UpstreamProcess) -> None:
    """Readers of every kind, from the start and from midway, see the same text of one call."""
    url, model = relay_server.url, named("tokens=200,rate=200,u2028")
    text = expected(model, PROMPT)
    async with asked(url, CHAT, model) as answer:
        stream_id = answer.headers["x-stream-id"]
        readers = []
        for _ in range(3):
            readers += [asyncio.create_task(attach(url, stream_id, k)) for k in KINDS + OLD_KINDS]
            await asyncio.sleep(0.2)
        assert (await see(CHAT, answer)).text == text
        seen = await asyncio.gather(*readers)
    for each in seen:
        assert (each.ending, each.ended, each.text) == ("finished", "end", text)
    assert len(upstream.log(model)) == 1


async def test_thirty_at_once(relay_server: Server, upstream: UpstreamProcess) -> None:
    """Answers that run at once do not touch each other."""
    kinds = KINDS * 2
    models = [named(f"tokens={100 + i},rate=200") for i in range(len(kinds))]
    runs = (start(relay_server.url, k, m) for k, m in zip(kinds, models, strict=True))
    for model, seen in zip(models, await asyncio.gather(*runs), strict=True):
        assert (seen.ending, seen.text) == ("finished", expected(model, PROMPT))
        assert len(upstream.log(model)) == 1


async def test_the_log(relay_server: Server) -> None:
    """*native* says everything: parts begin and end, offsets rise from 1 without a hole but where
    deltas were merged, tool arguments come whole, and there is one ending.
    """
    seen = await start(relay_server.url, NATIVE, named("reasoning=3,tokens=5,tool=1"))
    items = seen.items
    assert [item["type"] for item in items if item["type"] != "delta"] == [
        "started",
        *["part_started", "part_finished"] * 3,
        "finished",
    ]
    offsets = [int(item["id"].rpartition("-")[2]) for item in items]
    assert all(a < b for a, b in pairwise(offsets))
    assert {item["id"].rpartition("-")[0] for item in items} == {seen.stream_id}
    parts = {
        item["data"]["part"]: item["data"] for item in items if item["type"] == "part_finished"
    }
    assert [parts[number]["kind"] for number in range(3)] == ["reasoning", "text", "tool_call"]
    assert (parts[2]["name"], parts[2]["arguments"]) == TOOL
    assert items[-1]["data"]["finish_reason"] == "tool_calls"
    everything = await attach(relay_server.url, seen.stream_id, NATIVE)
    assert everything.items[-1]["id"] == items[-1]["id"]


async def test_the_status(relay_server: Server) -> None:
    """`GET /api/v1/streams/{id}` says where the answer stands."""
    url, model = relay_server.url, named("tokens=20,rate=40")
    async with asked(url, CHAT, model, conversation_id="c-1") as answer:
        stream_id = answer.headers["x-stream-id"]
        running = await status(url, stream_id)
        seen = await see(CHAT, answer)
    assert running["position"].startswith(f"{stream_id}-")
    assert (running["state"], running["finished"], running["usage"]) == ("running", None, None)
    ended = await status(url, stream_id)
    assert {**ended, "started": "", "finished": "", "position": ""} == {
        "status": 200,
        "stream_id": stream_id,
        "state": "finished",
        "position": "",
        "model": model,
        "conversation_id": "c-1",
        "finish_reason": "stop",
        "usage": seen.items[-1]["metadata"]["usage"],
        "error": None,
        "started": "",
        "finished": "",
    }
    assert running["started"] == ended["started"] < ended["finished"]
    assert (await status(url, "0" * 32))["status"] == 404


# --- bounds -------------------------------------------------------------------------------------


async def test_too_long(server: StartServer, upstream: UpstreamProcess) -> None:
    """An answer past `max_bytes` fails as `too_long`, upstream too; what came by then stands."""
    url, words = server(**relaying(upstream, max_bytes=1000)).url, "tokens=5000,rate=500"
    kinds = KINDS + OLD_KINDS
    models = [named(words) for _ in kinds]
    runs = [start(url, kind, model) for kind, model in zip(kinds, models, strict=True)]
    for kind, seen in zip(kinds, await asyncio.gather(*runs), strict=True):
        assert 500 < len(seen.text) < 20_000  # the bound is on memory: not all of it is text
        assert expected(f"up:{words}", PROMPT).startswith(seen.text)
        assert seen.ended == ("cut" if kind.cuts else "end")
        assert seen.code == ("" if kind.framing == "text" else "too_long")
    seen = await whole(url, JSON_PATHS[0], named(words))
    assert (seen.status, seen.code) == (502, "too_long")
    (request,) = await upstream.requests(models[0], closed=True)
    assert request["closed_by"] == "client"


async def test_too_many(server: StartServer, upstream: UpstreamProcess) -> None:
    """One more than `max_running` is told 503 and when to come back, in any shape."""
    url = server(**relaying(upstream, max_running=2)).url
    async with asked(url, CHAT, named(LONG)) as one, asked(url, CHAT, named(LONG)):
        refused = [await start(url, kind, named("tokens=5")) for kind in (CONTENT, CHAT, OPENAI)]
        refused += [await whole(url, path, named("tokens=5")) for path in JSON_PATHS]
        for seen in refused:
            assert (seen.status, seen.code) == (503, "overloaded")
            assert int(seen.headers["retry-after"]) > 0
        await stop(url, one.headers["x-stream-id"])
        assert (await start(url, CONTENT, named("tokens=5"))).ending == "finished"


# --- usage --------------------------------------------------------------------------------------


async def test_usage_is_always_asked(relay_server: Server, upstream: UpstreamProcess) -> None:
    """The upstream is asked for usage whatever the client wants, who sees it only where it asked;
    its other stream options go on untouched.
    """
    for asks in (None, {}, {"include_usage": False, "other": 1}, {"include_usage": True}):
        model, more = named("tokens=5"), {} if asks is None else {"stream_options": asks}
        seen = await start(relay_server.url, OPENAI, model, **more)
        (request,) = upstream.log(model)
        assert request["body"]["stream_options"] == {**(asks or {}), "include_usage": True}
        usages = [item["usage"] for item in seen.items if item != DONE and "usage" in item]
        empty = [item for item in seen.items if item != DONE and not item["choices"]]
        if asks and asks["include_usage"]:
            assert usages == [{"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}]
            assert seen.items[-2] == empty[0]
        else:
            assert not usages
            assert not empty
        said = await status(relay_server.url, seen.stream_id)
        assert said["usage"]["completion_tokens"] == 5
        assert "estimated" not in said["usage"]


async def test_usage_that_is_not_told(relay_server: Server) -> None:
    """An upstream that gives none gets an estimate, marked as such."""
    seen = await start(relay_server.url, CHAT, named("tokens=20,usage=0"))
    usage = seen.items[-1]["metadata"]["usage"]
    assert usage["estimated"] is True
    assert usage["completion_tokens"] == -(-len(seen.text) // 4)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert (await status(relay_server.url, seen.stream_id))["usage"] == usage


# --- coalescing and merging ---------------------------------------------------------------------


async def test_tokens_gather(server: StartServer, upstream: UpstreamProcess) -> None:
    """The first token goes out at once, later ones gather for `flush_interval` at most."""
    interval, rate, tokens = 0.5, 100, 200
    url = server(**relaying(upstream, flush_interval=interval)).url
    model = named(f"tokens={tokens},rate={rate},delay=0.3")
    async with asked(url, CONTENT, model) as answer:
        came = [
            (time.monotonic(), message.json()["content"].count(" "))
            async for message in answer.items(Sse())
            if message.data != DONE
        ]
    (request,) = upstream.log(model)
    first = request["first_token_at"]
    assert came[0][1] == 1
    assert came[0][0] - first <= interval / 2  # not held for the interval
    assert sum(count for _, count in came) == tokens
    assert len(came) <= tokens / rate / interval + 3
    late, said = [], 0
    for moment, count in came:
        late.append(moment - (first + said / rate))  # since its oldest token was sent
        said += count
    print(f"median lateness {statistics.median(late):.3f} s, worst {max(late):.3f} s")
    assert statistics.median(late) <= interval + 0.1
    assert max(late) <= interval + SOON


async def test_the_end_is_not_held(server: StartServer, upstream: UpstreamProcess) -> None:
    """The end of an answer of one token goes out at once, and of a longer one with its last."""
    url = server(**relaying(upstream, flush_interval=1.0)).url
    for words, longest in (("tokens=1", 0.9), ("tokens=30,rate=100", 0.3 + 1.0 + 0.5)):
        model = named(words)
        seen = await start(url, CONTENT, model)
        took = time.monotonic() - upstream.log(model)[0]["first_token_at"]
        assert (seen.ending, seen.text) == ("finished", expected(model, PROMPT))
        assert took <= longest


async def test_a_replay_is_merged(relay_server: Server) -> None:
    """A finished answer of 10,000 tokens is read again in at most two chunks and 1.1 times the
    bytes of its text.
    """
    url, model = relay_server.url, named("tokens=10000")
    seen = await start(url, CONTENT, model)
    assert seen.text == expected(model, PROMPT)
    async with attached(url, seen.stream_id, Kind("content", "ndjson")) as answer:
        chunks = [chunk async for chunk in answer.pieces()]
    print(f"{len(chunks)} chunks, {sum(map(len, chunks)) / len(seen.text):.4f} of the text")
    assert len(chunks) <= 2
    assert sum(map(len, chunks)) <= 1.1 * len(seen.text.encode())
    parser = Ndjson()
    assert "".join(item["content"] for c in chunks for item in parser.feed(c)) == seen.text
