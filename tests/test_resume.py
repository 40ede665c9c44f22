"""Coming back to an answer: a position resumes it, everywhere alike, and never starts another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.clients import DIALECTS, DONE, MEDIA, PROMPT, Kind, named, see, status, stop
from tests.endpoints import ENDPOINTS, GETS, RESUMABLE, Endpoint, asking, resuming, url_of
from tests.processes import Server, UpstreamProcess
from tests.readers import DataBlocks, Ndjson, Sse, ask
from tests.upstream import expected

WHOLE = (
    Endpoint("POST", "/api/v1/generate", "prompt", "content"),
    Endpoint("POST", "/api/v1/ai/generate", "prompt", "content"),
)
STREAM = Endpoint("POST", "/stream", "prompt", "content")
BY = ("header", "query")

each_endpoint = pytest.mark.parametrize("endpoint", [*ENDPOINTS, *WHOLE], ids=str)


class Ended:
    """An answer that has ended: where one may come back to, and what is left to read there.

    middle, last: positions after some of its text, and after its end.
    """

    def __init__(self, stream_id: str, model: str, middle: str, last: str, rest: str) -> None:
        self.stream_id, self.model = stream_id, model
        self.middle, self.last, self.rest = middle, last, rest


async def ended(url: str, endpoint: Endpoint = STREAM, user: str = "anonymous") -> Ended:
    """Asks there, and reads to the end."""
    model, headers = named("tokens=30,rate=500,u2028"), {"X-User-Id": user}
    async with asking(url, endpoint, model=model, headers=headers) as answer:
        stream_id = answer.headers["x-stream-id"]
        await answer.body()
    said = await status(url, stream_id, **headers)
    assert said["state"] == "finished"
    # After the first token, which waits for no other: what is left is at least one delta.
    native = url_of(url, f"/api/v1/streams/{stream_id}/events", format="ndjson", starting_after=3)
    async with ask("GET", native, headers=headers) as answer:
        rest = "".join(e["data"].get("content", "") for e in await answer.read(Ndjson()))
    assert 0 < len(rest) < len(expected(model, PROMPT))
    return Ended(stream_id, model, f"{stream_id}-3", said["position"], rest)


# --- it goes on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("by", BY)
@each_endpoint
async def test_a_position_resumes(
    relay_server: Server, upstream: UpstreamProcess, endpoint: Endpoint, by: str
) -> None:
    """In the header or in the query, with the body of the first request, another, none, or one that
    is no JSON: the rest of the answer in the endpoint's dialect and framing, and no model is asked.
    """
    there = await ended(relay_server.url, endpoint if endpoint in ENDPOINTS else STREAM)
    bodies = [b"", b"{", b'{"prompt":"another"}', b'{"message":7}', b'{"messages":[]}']
    for body in bodies if endpoint.method == "POST" else bodies[:1]:
        async with resuming(relay_server.url, endpoint, there.middle, by=by, body=body) as answer:
            assert answer.status == 200
            assert answer.headers["content-type"] == MEDIA[endpoint.framing]
            assert answer.headers["x-stream-id"] == there.stream_id
            seen = await see(Kind(endpoint.dialect, endpoint.framing), answer)
        assert seen.text == there.rest
        assert (seen.items[-1] == DONE) is (endpoint.done and endpoint.framing == "sse")
    assert len(upstream.log(there.model)) == 1


async def test_the_same_request_again(relay_server: Server, upstream: UpstreamProcess) -> None:
    """fetch-event-source sends its POST again as it was, with the header: no second answer."""
    for endpoint in RESUMABLE:
        model = named("tokens=100,rate=500")
        async with asking(
            relay_server.url, endpoint, query={"format": "sse"}, model=model
        ) as answer:
            first, parser = [], Sse()
            async for piece in answer.pieces(cut_after=1500):
                first += parser.feed(piece)
        async with asking(
            relay_server.url,
            endpoint,
            query={"format": "sse"},
            headers={"Last-Event-ID": parser.last_event_id},
            model=model,
        ) as answer:
            seen = await see(Kind(endpoint.dialect), answer)
        assert first
        assert seen.text
        assert expected(model, PROMPT).endswith(seen.text)
        assert len(upstream.log(model)) == 1


@pytest.mark.parametrize("framing", MEDIA)
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_attaching_from_a_position(relay_server: Server, dialect: str, framing: str) -> None:
    """`starting_after` is an offset or a whole position; `Last-Event-ID` counts more."""
    there = await ended(relay_server.url)
    events = Endpoint("GET", f"/api/v1/streams/{there.stream_id}/events", "", dialect)
    query = {"dialect": dialect, "format": framing}
    for after, last_event_id in (("3", ""), (there.middle, ""), ("1", there.middle)):
        async with resuming(
            relay_server.url, events, last_event_id, query={**query, "starting_after": after}
        ) as answer:
            seen = await see(Kind(dialect, framing), answer)
        assert (seen.text, seen.ending) == (there.rest, "finished")


async def test_on_another_endpoint(relay_server: Server) -> None:
    """A position is good on every endpoint, in the dialect of that endpoint."""
    there = await ended(relay_server.url, ENDPOINTS[6])
    for endpoint in ENDPOINTS:
        if endpoint.path == "/api/chat/stream":
            continue
        async with resuming(relay_server.url, endpoint, there.middle) as answer:
            seen = await see(Kind(endpoint.dialect, endpoint.framing), answer)
        assert seen.text == there.rest


async def test_before_the_first_token(relay_server: Server, upstream: UpstreamProcess) -> None:
    """A client that is cut before the first token comes back to the same answer."""
    for endpoint in (endpoint for endpoint in RESUMABLE if endpoint.dialect != "tool"):
        model = named("tokens=20,delay=0.3")
        async with asking(
            relay_server.url, endpoint, query={"format": "sse"}, model=model
        ) as answer:
            parser = Sse()
            async for piece in answer.pieces():
                parser.feed(piece)
                if parser.last_event_id:
                    break
        assert parser.last_event_id == f"{answer.headers['x-stream-id']}-1"
        async with resuming(relay_server.url, endpoint, parser.last_event_id) as answer:
            seen = await see(Kind(endpoint.dialect, endpoint.framing), answer)
        assert seen.text == expected(model, PROMPT)
        assert len(upstream.log(model)) == 1


# --- nothing is left ----------------------------------------------------------------------------


@pytest.mark.parametrize("framing", MEDIA)
@each_endpoint
async def test_nothing_left(relay_server: Server, endpoint: Endpoint, framing: str) -> None:
    """After the end a GET gets 204, which stops an `EventSource`; a POST 200 and an empty body."""
    there = await ended(relay_server.url)
    for by in BY:
        async with resuming(
            relay_server.url, endpoint, there.last, by=by, query={"format": framing}
        ) as answer:
            assert answer.status == (204 if endpoint.method == "GET" else 200)
            assert await answer.body() == b""
            assert answer.headers["cache-control"] == "no-store"
            assert answer.headers["x-stream-id"] == there.stream_id


async def test_nothing_left_to_attach_to(relay_server: Server) -> None:
    """The same of a stream's own address, also by `starting_after`."""
    there = await ended(relay_server.url)
    path = f"/api/v1/streams/{there.stream_id}/events"
    for query in ({"last_event_id": there.last}, {"starting_after": there.last}):
        for dialect in DIALECTS:
            async with ask(
                "GET", url_of(relay_server.url, path, dialect=dialect, **query)
            ) as answer:
                assert (answer.status, await answer.body()) == (204, b"")


async def test_after_the_last_data(relay_server: Server) -> None:
    """What is left after the last data is the ending where the dialect has one, else nothing."""
    for endpoint in RESUMABLE:
        there = await ended(relay_server.url, endpoint)
        before = f"{there.stream_id}-{int(there.last.rpartition('-')[2]) - 1}"
        query = {"format": "ndjson"}
        async with resuming(relay_server.url, endpoint, before, query=query) as answer:
            items = await answer.read(Ndjson())
        if endpoint.dialect == "content":
            assert (answer.status, items) == (204 if endpoint.method == "GET" else 200, [])
        else:
            assert [item["type"] for item in items] == [
                {"chat": "end", "tool": "done"}[endpoint.dialect]
            ]
        async with resuming(relay_server.url, endpoint, before, query={"format": "sse"}) as answer:
            assert answer.status == 200
            if endpoint.dialect == "content":
                assert await answer.read(DataBlocks()) == [DONE] * endpoint.done


async def test_a_failure_is_said_again(relay_server: Server) -> None:
    """A failed answer ends as a failure, each time it is resumed: no 204 before that was said."""
    for endpoint in RESUMABLE:
        async with asking(relay_server.url, endpoint, model="up:end_clean=5") as answer:
            stream_id = answer.headers["x-stream-id"]
            await answer.body()
        position = (await status(relay_server.url, stream_id))["position"]
        before = f"{stream_id}-{int(position.rpartition('-')[2]) - 1}"
        async with resuming(relay_server.url, endpoint, before) as answer:
            seen = await see(Kind(endpoint.dialect, endpoint.framing), answer)
        assert (seen.ending, seen.code) == ("failed", "upstream_cut")
        for last in (before, position):  # text has no word for it, so it is cut each time
            async with resuming(
                relay_server.url, endpoint, last, query={"format": "text"}
            ) as answer:
                assert await answer.body() == b""
                assert (answer.status, answer.ended) == (200, "cut")


# --- it cannot ----------------------------------------------------------------------------------


async def refusals(url: str, last_event_id: str, **headers: str) -> list[tuple[int, Any]]:
    """What every endpoint, and a stream's own address, answers to this position."""
    found = []
    async with asking(url, STREAM, model="up:", headers=headers) as answer:
        await answer.body()
        path = f"/api/v1/streams/{answer.headers['x-stream-id']}/events"
    for endpoint in (*ENDPOINTS, *WHOLE, Endpoint("GET", path, "", "native")):
        for by in BY:
            async with resuming(url, endpoint, last_event_id, by=by, headers=headers) as answer:
                error = (await answer.json())["error"]
                assert error.pop("request_id") == answer.headers["x-request-id"]
                assert answer.headers["cache-control"] == "no-store"
                found.append((answer.status, error))
    return found


async def test_what_cannot_be_resumed(relay_server: Server) -> None:
    """A position that is unknown, malformed, ahead of its stream or somebody else's is 410, all
    alike, on every endpoint.
    """
    there = await ended(relay_server.url, user="ann")
    foreign = await refusals(relay_server.url, there.middle, **{"X-User-Id": "bob"})
    ours, theirs = foreign[0], foreign[8 * 2]
    assert ours[0] == theirs[0] == 410
    assert (ours[1]["code"], ours[1]["param"]) == ("gone", "Last-Event-ID")
    assert {**ours[1], "type": "invalid_request_error"} == theirs[1]
    ahead = f"{there.stream_id}-{int(there.last.rpartition('-')[2]) + 1}"
    others = [
        "0" * 32 + "-3", ahead, f"{there.stream_id}-99999999999999999999", there.stream_id,
        f"{there.stream_id}-", f"{there.stream_id}--1", f"{there.stream_id}-x", "7", "-",
        "x" * 4000,
        f"{there.stream_id}-1 ".replace("-", "\u2013"), "api_stream_count-3",
    ]  # fmt: skip
    for other in others:
        assert await refusals(relay_server.url, other, **{"X-User-Id": "ann"}) == foreign, other


async def test_a_position_of_another_stream(relay_server: Server) -> None:
    """A stream's own address takes no position of another stream, also of the same user's; that of
    a stream which is gone, or never was, takes none.
    """
    one, other = await ended(relay_server.url), await ended(relay_server.url)
    for id, position in ((one.stream_id, other.middle), ("0" * 32, "0" * 32 + "-3")):
        path = f"/api/v1/streams/{id}/events"
        async with ask("GET", url_of(relay_server.url, path, last_event_id=position)) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (410, "gone")


async def test_an_expired_position(
    server: Callable[..., Server], upstream: UpstreamProcess
) -> None:
    """After `retention` seconds an answer is gone, and its position is like any unknown one."""
    model = {"name": "up:", "base_url": upstream.base}
    process = server(model=model, generation={"retention": 0.2})
    async with asking(process.url, STREAM, model="up:") as answer:
        stream_id = answer.headers["x-stream-id"]
        await answer.body()
    while (await status(process.url, stream_id))["status"] != 404:
        pass
    assert await refusals(process.url, f"{stream_id}-1") == await refusals(process.url, "7")
    assert (await refusals(process.url, f"{stream_id}-1"))[0][0] == 410


async def test_no_refusal_starts_anything(relay_server: Server, upstream: UpstreamProcess) -> None:
    """A request with a position that cannot be resumed asks no model, whole as it otherwise is."""
    model = named("tokens=3")
    for endpoint in (*ENDPOINTS, *WHOLE):
        async with asking(
            relay_server.url, endpoint, model=model, headers={"Last-Event-ID": "0" * 32 + "-3"}
        ) as answer:
            assert answer.status == 410
    async with asking(relay_server.url, STREAM, model=model) as answer:
        await answer.body()
    assert len(upstream.log(model)) == 1


# --- whose it is --------------------------------------------------------------------------------


@pytest.mark.parametrize("by", BY)
async def test_a_foreign_stream_is_an_unknown_one(relay_server: Server, by: str) -> None:
    """By `X-User-Id` or `user_id`: another user gets the same answer for a stream that is not
    theirs and for none, and does not stop it. To its owner both ways of saying who count alike.
    """

    async def asked(user: str, method: str, path: str) -> tuple[int, Any]:
        headers = {"X-User-Id": user} if by == "header" else {}
        query = {} if by == "header" else {"user_id": user}
        async with ask(method, url_of(relay_server.url, path, **query), headers=headers) as answer:
            said = await answer.json()
            said = said["error"] or said
            return answer.status, {k: v for k, v in said.items() if k != "request_id"}

    ann = {"X-User-Id": "ann \N{SNOWMAN}"}
    async with asking(relay_server.url, STREAM, model=named("delay=60"), headers=ann) as answer:
        path = f"/api/v1/streams/{answer.headers['x-stream-id']}"
        unknown = f"/api/v1/streams/{'0' * 32}"
        for user in ("bob", "ann", "anonymous"):
            for method, action in (("GET", ""), ("GET", "/events"), ("POST", "/stop")):
                refused = await asked(user, method, path + action)
                assert refused[0] == 404
                assert refused == await asked(user, method, unknown + action)
        assert (await asked("ann \N{SNOWMAN}", "GET", path))[1]["state"] == "running"
        stopped = await asked("ann \N{SNOWMAN}", "POST", path + "/stop")
        assert (stopped[0], stopped[1]["state"]) == (200, "cancelled")


async def test_stop_may_be_repeated(relay_server: Server) -> None:
    """Stop is 200 however often it is called, also after the end; 404 for an unknown stream."""
    there = await ended(relay_server.url)
    for _ in range(3):
        assert (await stop(relay_server.url, there.stream_id)).status == 200
    assert (await status(relay_server.url, there.stream_id))["state"] == "finished"
    assert (await stop(relay_server.url, "0" * 32)).status == 404


@pytest.mark.parametrize("endpoint", GETS, ids=str)
async def test_head_with_a_position(relay_server: Server, endpoint: Endpoint) -> None:
    """HEAD stays 405, position or not."""
    there = await ended(relay_server.url)
    for by in BY:
        async with resuming(
            relay_server.url, endpoint._replace(method="HEAD"), there.middle, by=by
        ) as answer:
            assert answer.status == 405
            assert await answer.connection.leftover() == b""
