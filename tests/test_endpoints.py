"""Every generation endpoint in every framing, over both versions of HTTP: text, headers, ids.

A server in front of an upstream that says exactly what it was told to.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.clients import DIALECTS, DONE, MEDIA, PROMPT, Kind, named, see, status, stop
from tests.endpoints import ENDPOINTS, Endpoint, asking, url_of
from tests.processes import Server, UpstreamProcess
from tests.readers import Answer, Ndjson, Sse, ask, connect
from tests.upstream import expected

AXIOS = "application/json, text/plain, */*"  # what axios sends unless it is told what to send
HTTPS = ("1.1", "1.0")
WORDS = "tokens=40,rate=400"

each_endpoint = pytest.mark.parametrize("endpoint", ENDPOINTS, ids=str)
each_framing = pytest.mark.parametrize("framing", MEDIA)
each_http = pytest.mark.parametrize("http", HTTPS)


def stream_headers(answer: Answer, framing: str) -> None:
    """The headers that every stream has."""
    charset = "; charset=utf-8" if framing == "text" else ""
    assert answer.headers["content-type"] == MEDIA[framing] + charset
    assert answer.headers["cache-control"] == "no-cache, no-transform"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-request-id"]


# --- text and headers ---------------------------------------------------------------------------


@each_http
@each_framing
@each_endpoint
async def test_an_answer_streams(
    relay_server: Server, endpoint: Endpoint, framing: str, http: str
) -> None:
    """The exact text, line separators and an emoji in it, then the end as this client knows it.

    Over HTTP/1.1 it is chunked; over HTTP/1.0 never, and the end of the connection ends it.
    """
    model, accept = f"up:{WORDS},u2028", {"Accept": MEDIA[framing]}
    async with asking(relay_server.url, endpoint, model=model, headers=accept, http=http) as answer:
        assert answer.status == 200
        stream_headers(answer, framing)
        assert ("transfer-encoding" in answer.headers) is (http == "1.1")
        assert "content-length" not in answer.headers
        assert answer.headers["connection"] == "close"
        assert re.fullmatch(r"[A-Za-z0-9_]{16,64}", answer.headers["x-stream-id"])
        seen = await see(Kind(endpoint.dialect, framing, http), answer)
        assert await answer.connection.leftover() == b""
    assert seen.text == expected(model, PROMPT)
    assert seen.ended == "end"
    assert (seen.items[-1] == DONE) is (framing == "sse" and endpoint.done)
    assert DONE not in seen.items[:-1]
    said = await status(relay_server.url, seen.stream_id)
    assert said["state"] == "finished"
    assert said["model"] == model
    assert said["usage"]["completion_tokens"] == 40


@each_endpoint
async def test_the_default_framing(relay_server: Server, endpoint: Endpoint) -> None:
    """Without a wish, with `*/*`, and with what axios always sends, the endpoint's own framing."""
    for accept in (None, "*/*", AXIOS, "text/html", "text/plain, */*"):
        headers = {} if accept is None else {"Accept": accept}
        async with asking(relay_server.url, endpoint, headers=headers, model="up:") as answer:
            stream_headers(answer, endpoint.framing)
            seen = await see(Kind(endpoint.dialect, endpoint.framing), answer)
        assert seen.text == expected("up:", PROMPT)


@each_endpoint
async def test_a_framing_is_asked_for(relay_server: Server, endpoint: Endpoint) -> None:
    """By `format=`, by a media type there, or by `Accept`, where the better quality counts; the
    query counts more than the header.
    """
    wishes: list[tuple[str, dict[str, str], dict[str, str]]] = [
        ("ndjson", {"format": "ndjson"}, {}),
        ("sse", {"format": "sse"}, {"Accept": MEDIA["ndjson"]}),
        ("text", {"format": "text/plain"}, {}),
        ("ndjson", {"format": "application/x-ndjson"}, {"Accept": MEDIA["sse"]}),
        ("sse", {}, {"Accept": "application/x-ndjson;q=0.5, text/event-stream"}),
        ("ndjson", {}, {"Accept": "Application/X-NDJSON; charset=utf-8, text/event-stream;q=0.9"}),
        ("text", {}, {"Accept": "text/plain;q=0.3"}),
        ("ndjson", {}, {"Accept": "application/x-ndjson, */*;q=0.1"}),
    ]
    for framing, query, headers in wishes:
        async with asking(
            relay_server.url, endpoint, query=query, headers=headers, model="up:"
        ) as answer:
            stream_headers(answer, framing)
            seen = await see(Kind(endpoint.dialect, framing), answer)
        assert seen.text == expected("up:", PROMPT), (query, headers)


@each_endpoint
async def test_the_model_may_be_in_the_query(
    relay_server: Server, upstream: UpstreamProcess, endpoint: Endpoint
) -> None:
    """`?model=` names the model where the body names none; the body's counts more."""
    model, other = named("tokens=3"), named("tokens=4")
    async with asking(relay_server.url, endpoint, query={"model": model}) as answer:
        await answer.body()
    assert len(upstream.log(model)) == 1
    if endpoint.method == "POST":
        async with asking(
            relay_server.url, endpoint, query={"model": model}, model=other
        ) as answer:
            await answer.body()
        assert (len(upstream.log(model)), len(upstream.log(other))) == (1, 1)


@each_endpoint
async def test_a_connection_serves_again(relay_server: Server, endpoint: Endpoint) -> None:
    """After a whole stream the same connection takes the next request, with nothing in between."""
    async with asking(relay_server.url, endpoint, keep_alive=True, model="up:") as answer:
        for _ in range(3):
            seen = await see(Kind(endpoint.dialect, endpoint.framing), answer)
            assert seen.text == expected("up:", PROMPT)
            answer = await answer.connection.request(
                endpoint.method,
                url_of("", endpoint.path, **({} if endpoint.method == "POST" else endpoint.asks())),
                json_body=endpoint.asks() if endpoint.method == "POST" else None,
            )
        await answer.body()
        answer = await answer.connection.request("GET", "/health")
        assert await answer.json() == {"status": "healthy"}


async def test_a_default_question(relay_server: Server, upstream: UpstreamProcess) -> None:
    """`GET /stream` without a prompt asks one of its own."""
    model = named("tokens=3")
    async with ask("GET", url_of(relay_server.url, "/stream", model=model)) as answer:
        seen = await see(Kind("content", "ndjson"), answer)
    (request,) = upstream.log(model)
    (message,) = request["body"]["messages"]
    assert message["role"] == "user"
    assert seen.text == expected(model, message["content"])


@pytest.mark.parametrize("takes", ["message", "messages"])
async def test_conversation_answers_name_their_conversation(
    relay_server: Server, takes: str
) -> None:
    """`X-Conversation-Id` is the one that was sent; to a message without one, a new one."""
    endpoint = Endpoint("POST", "/api/chat/stream", takes, "chat")
    async with asking(relay_server.url, endpoint, model="up:", conversation_id="c/1:~") as answer:
        assert answer.headers["x-conversation-id"] == "c/1:~"
    if takes == "message":
        names = set()
        for _ in range(3):
            async with asking(relay_server.url, endpoint, model="up:") as answer:
                names.add(answer.headers["x-conversation-id"])
                (start, *_) = [m.json() for m in await answer.read(Sse())]
                assert start["conversation_id"] == answer.headers["x-conversation-id"]
        assert len(names) == 3


@pytest.mark.parametrize("path", ["/stream", "/chat", "/api/stream"])
async def test_head_starts_nothing(
    relay_server: Server, upstream: UpstreamProcess, path: str
) -> None:
    """HEAD on a GET that streams is 405, and asks no model."""
    model = named("tokens=3")
    async with ask("HEAD", url_of(relay_server.url, path, prompt="hi", model=model)) as answer:
        assert answer.status == 405
        assert "GET" in answer.headers["allow"]
        assert "HEAD" not in answer.headers["allow"]
        assert await answer.connection.leftover() == b""
    async with ask("GET", url_of(relay_server.url, "/stream", prompt="hi", model=model)) as answer:
        await answer.body()
    assert len(upstream.log(model)) == 1


# --- ids ----------------------------------------------------------------------------------------


@asynccontextmanager
async def held_back(url: str, endpoint: Endpoint, framing: str) -> AsyncIterator[Answer]:
    """An answer whose first token is a long time coming; it is stopped on leaving."""
    async with asking(url, endpoint, query={"format": framing}, model=named("delay=60")) as answer:
        yield answer
        await stop(url, answer.headers["x-stream-id"])


@pytest.mark.parametrize("endpoint", [e for e in ENDPOINTS if e.dialect != "openai"], ids=str)
async def test_a_position_at_once(relay_server: Server, endpoint: Endpoint) -> None:
    """Over SSE the headers and the opening comment come before the first token, and a position: in
    *content* as a block of nothing else, in *chat* with the start; *tool* has none to say yet.
    """
    async with held_back(relay_server.url, endpoint, "sse") as answer:
        first = b""
        want = {"tool": b": stream\n\n", "content": b"-1\n\n", "chat": b"\n\ndata: "}
        async for piece in answer.pieces():
            first += piece
            if first.count(b"\n\n") > (endpoint.dialect != "tool"):
                break
        id = f"{answer.headers['x-stream-id']}-1".encode()
    said = first.removeprefix(b": stream\n\n")
    assert said != first, want
    match endpoint.dialect:
        case "content":
            assert said == b"id: %b\n\n" % id
        case "chat":
            assert said.startswith(b'id: %b\ndata: {"type":"start",' % id)
        case "tool":
            assert said == b""


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=str)
async def test_ids_over_sse(relay_server: Server, endpoint: Endpoint) -> None:
    """*chat* and *tool* say `id:` before `data:` in one block. *content* says it in a block of its
    own after each block of data, `[DONE]` too. *openai* says none.
    """
    async with asking(
        relay_server.url, endpoint, query={"format": "sse"}, model=f"up:{WORDS}"
    ) as answer:
        id = rb"id: %b-\d+\n" % answer.headers["x-stream-id"].encode()
        body = await answer.body()
    blocks = [block + b"\n" for block in body.split(b"\n\n") if block]
    data, done = rb"data: \{.+\}\n", rb"data: \[DONE\]\n"
    if endpoint.dialect != "openai":
        assert blocks.pop(0) == b": stream\n"
    match endpoint.dialect:
        case "content":
            last = done if endpoint.done else rb""
            shape = rb"%b(%b%b)+(%b)%b" % (id, data, id, last, id)
        case "chat":
            shape = rb"(%b%b)+" % (id, data)
        case "tool":
            shape = rb"(%b%b)+%b" % (id, data, done)
        case _:
            shape = rb"(%b)+%b" % (data, done)
    assert re.fullmatch(shape, b"".join(blocks)), body
    assert all(block.count(b"\n") == 1 for block in blocks) or endpoint.dialect in ("chat", "tool")


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=str)
async def test_ids_in_ndjson(relay_server: Server, endpoint: Endpoint) -> None:
    """Every object ends with `"id"`, rising; *openai*'s have only their own."""
    async with asking(
        relay_server.url, endpoint, query={"format": "ndjson"}, model=f"up:{WORDS}"
    ) as answer:
        stream_id, items = answer.headers["x-stream-id"], await answer.read(Ndjson())
    assert items
    if endpoint.dialect == "openai":
        assert {item["id"] for item in items} == {f"chatcmpl-{stream_id}"}
        return
    assert {list(item)[-1] for item in items} == {"id"}
    epochs, offsets = zip(*(item["id"].rsplit("-", 1) for item in items), strict=True)
    assert set(epochs) == {stream_id}
    assert list(map(int, offsets)) == sorted(set(map(int, offsets)))


@pytest.mark.parametrize("framing", ["sse", "ndjson"])
async def test_native(relay_server: Server, framing: str) -> None:
    """The log itself: type, time, data, id; over SSE `event:` and `id:` say the same before it."""
    async with asking(relay_server.url, ENDPOINTS[3], model=f"up:{WORDS}") as answer:
        await answer.body()
        stream_id = answer.headers["x-stream-id"]
    path = f"/api/v1/streams/{stream_id}/events"
    async with ask("GET", url_of(relay_server.url, path, format=framing)) as answer:
        stream_headers(answer, framing)
        assert answer.headers["x-stream-id"] == stream_id
        if framing == "sse":
            messages = await answer.read(Sse())
            items = [message.json() for message in messages]
            assert [(m.event, m.id) for m in messages] == [(i["type"], i["id"]) for i in items]
        else:
            items = await answer.read(Ndjson())
    assert [item["type"] for item in items] == [
        "started", "part_started", "delta", "part_finished", "finished",
    ]  # fmt: skip
    assert {tuple(item) for item in items} == {("type", "time", "data", "id")}
    assert {item["data"]["stream_id"] for item in items} == {stream_id}
    assert items[2]["data"]["content"] == expected(f"up:{WORDS}", PROMPT)
    assert items[-1]["data"]["finish_reason"] == "stop"


@each_framing
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_attaching_in_any_dialect(relay_server: Server, dialect: str, framing: str) -> None:
    """An answer is read again in every dialect and framing, whatever it was asked in."""
    async with asking(relay_server.url, ENDPOINTS[3], model=f"up:{WORDS}") as answer:
        stream_id = answer.headers["x-stream-id"]
        await answer.body()
    path = f"/api/v1/streams/{stream_id}/events"
    asked = url_of(relay_server.url, path, dialect=dialect, format=framing)
    async with ask("GET", asked) as answer:
        stream_headers(answer, framing)
        seen = await see(Kind(dialect, framing), answer)
    assert (seen.text, seen.ending) == (expected(f"up:{WORDS}", PROMPT), "finished")


# --- answers in one piece -----------------------------------------------------------------------


@each_http
@pytest.mark.parametrize("path", ["/api/v1/generate", "/api/v1/ai/generate"])
async def test_an_answer_in_one_piece(relay_server: Server, path: str, http: str) -> None:
    """JSON: the exact text, the model's own count of tokens, and nothing else."""
    model = f"up:{WORDS},u2028"
    async with ask(
        "POST", relay_server.url + path, http=http, json_body={"prompt": PROMPT, "model": model}
    ) as answer:
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/json"
        said = await answer.json()
        stream_id = answer.headers["x-stream-id"]
    assert said == {"text": expected(model, PROMPT), "tokens": 40}
    assert (await status(relay_server.url, stream_id))["state"] == "finished"


async def test_the_length_may_be_limited(relay_server: Server) -> None:
    """`max_tokens` goes to the model."""
    for path in ("/api/v1/generate", "/api/v1/ai/generate"):
        body: dict[str, Any] = {"prompt": PROMPT, "model": "up:tokens=40", "max_tokens": 7}
        async with ask("POST", relay_server.url + path, json_body=body) as answer:
            said = await answer.json()
        assert said["tokens"] == 7
        assert said["text"] == "".join(expected("up:tokens=40", PROMPT).partition("6 ")[:2])


async def test_content_without_done_where_it_did_not_end_well(relay_server: Server) -> None:
    """*content* says the error and its code last, and no `[DONE]`."""
    content = [endpoint for endpoint in ENDPOINTS if endpoint.dialect == "content"]
    for endpoint in content:
        async with asking(
            relay_server.url, endpoint, query={"format": "sse"}, model="up:end_clean=5"
        ) as answer:
            *_, last = await answer.read(Sse())
        assert last.json() == {"error": last.json()["error"], "code": "upstream_cut"}


async def test_what_a_stream_is(relay_server: Server) -> None:
    """The status of a stream: state, position, model, usage, when it began and ended."""
    endpoint = Endpoint("POST", "/api/chat/stream", "message", "chat")
    async with held_back(relay_server.url, endpoint, "sse") as answer:
        stream_id = answer.headers["x-stream-id"]
        said = await status(relay_server.url, stream_id)
        assert (said["state"], said["finished"], said["usage"]) == ("running", None, None)
        assert said["position"] == f"{stream_id}-1"
        assert said["conversation_id"] == answer.headers["x-conversation-id"]
    said = await status(relay_server.url, stream_id)
    assert said["state"] == "cancelled"
    assert said["position"] == f"{stream_id}-2"
    assert said["usage"]["estimated"] is True
    assert said["started"] <= said["finished"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", said["finished"])


async def test_the_models(relay_server: Server) -> None:
    """`GET /v1/models` lists the default; `/v1/models/{name}` is one of the list."""
    async with connect(relay_server.url) as connection:
        listed = await (await connection.request("GET", "/v1/models")).json()
        assert listed["object"] == "list"
        assert [row["id"] for row in listed["data"]] == ["up:"]
        answer = await connection.request("GET", "/v1/models/up:")
        assert json.loads(await answer.body()) == listed["data"][0]
