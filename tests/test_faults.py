"""Every fault of an upstream, seen by every kind of client (design, section 4).

The text before a fault is exact. Each fault has its own error code. Nobody takes a cut answer for a
whole one: a dialect with a form for errors says the error, the others are cut.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from aiohttp import web

import app
from handlers.answers import deliver
from streaming.config import Config
from streaming.dialects import Dialect
from streaming.encoders import NDJSON, encoder
from streaming.events import JSON, Event
from streaming.log import Cursor, Log
from tests.behaviour import answer, expected
from tests.clients import (
    DONE,
    JSON_PATHS,
    KINDS,
    OLD_KINDS,
    PROMPT,
    Kind,
    Seen,
    attach,
    named,
    start,
    status,
    whole,
)
from tests.inside import in_process
from tests.processes import Server, UpstreamProcess
from tests.readers import ask
from tests.sockets import black_hole, closed_port

StartServer = Callable[..., Server]
CONTENT = Kind("content")
OPENAI = Kind("openai")
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Fault(NamedTuple):
    """What the upstream does and what becomes of it. status: of an answer in one piece. openai:
    status under /v1/, where it differs. tries: requests that the upstream sees. before: tokens that
    come before it.
    """

    words: str
    code: str
    status: int
    openai: int = 0
    tries: int = 1
    before: int = 0
    retry_after: str | None = None

    def __str__(self) -> str:
        return self.words

    @property
    def text(self) -> str:
        return "".join(answer(PROMPT, self.before))

    def check(self, kind: Kind, seen: Seen) -> None:
        """That this client saw what design section 4 says."""
        if kind.dialect == "openai" and not self.before:
            self.check_json(seen, self.openai or self.status)
            usual = "invalid_request_error" if seen.status < 500 else "server_error"
            assert seen.items[0]["error"].get("type") in (TYPES.get(seen.status, usual), None)
            return
        assert (seen.status, seen.text) == (200, self.text), kind
        assert seen.ended == ("cut" if kind.cuts else "end"), kind
        if kind.framing != "text":
            assert (seen.ending, seen.code) == ("failed", self.code), kind
        else:
            assert seen.ending == "", kind  # told nothing, so that the cut says it
        assert DONE not in seen.items or kind.dialect == "tool", kind

    def check_json(self, seen: Seen, status: int) -> None:
        assert (seen.status, seen.code, seen.ended) == (status, self.code, "end")
        assert seen.headers.get("retry-after") == self.retry_after


BEFORE = [  # the first token
    Fault("status=401", "upstream_unauthorized", 502, openai=401),
    Fault("status=403", "upstream_unauthorized", 502, openai=403),
    Fault("status=400", "upstream_rejected", 400),
    Fault("status=404", "upstream_rejected", 404),
    Fault("status=422", "upstream_rejected", 422),
    Fault("status=429", "upstream_rate_limited", 429, tries=3),
    Fault("status=429,retry_after=0.1", "upstream_rate_limited", 429, tries=3, retry_after="1"),
    Fault("status=429,retry_after=40", "upstream_rate_limited", 429, retry_after="40"),
    Fault("status=500", "upstream_failed", 502, tries=3),
    Fault("status=503,retry_after=40", "upstream_failed", 502, retry_after="40"),
    Fault("first_error", "upstream_failed", 502, tries=3),
    Fault("error_event=0", "upstream_failed", 502, tries=3),
    Fault("bad_json=0", "upstream_invalid", 502, tries=3),
    Fault("end_clean=0", "upstream_cut", 502, tries=3),
    Fault("reset=0", "upstream_cut", 502, tries=3),
    Fault("drop=0", "upstream_cut", 502, tries=3),
    Fault("tokens=0,finish=,end_clean=0,no_done", "upstream_cut", 502, tries=3),
]
MIDWAY = [
    Fault("reset=7,rate=100", "upstream_cut", 502, before=7),
    Fault("reset=7", "upstream_cut", 502, before=7),
    Fault("drop=7,rate=100", "upstream_cut", 502, before=7),
    Fault("drop=7", "upstream_cut", 502, before=7),
    Fault("end_clean=7", "upstream_cut", 502, before=7),
    Fault("end_clean=1", "upstream_cut", 502, before=1),
    Fault("end_clean=7,close", "upstream_cut", 502, before=7),
    Fault("bad_json=7", "upstream_invalid", 502, before=7),
    Fault("bad_json=7,split", "upstream_invalid", 502, before=7),
    Fault("error_event=7", "upstream_failed", 502, before=7),
    Fault("error_event=7,crlf,comments", "upstream_failed", 502, before=7),
]


Cases = dict[Kind, tuple[str, Seen]]


async def every_kind(url: str, words: str, kinds: list[Kind] = KINDS + OLD_KINDS) -> Cases:
    """What a client of each kind saw, each of a generation of its own, with its model's name."""
    names = [named(words) for _ in kinds]
    seen = await asyncio.gather(*(start(url, k, n) for k, n in zip(kinds, names, strict=True)))
    return dict(zip(kinds, zip(names, seen, strict=True), strict=True))


async def every_path(url: str, words: str) -> dict[str, tuple[str, Seen]]:
    """The same for answers in one piece."""
    names = [named(words) for _ in JSON_PATHS]
    seen = await asyncio.gather(*(whole(url, p, n) for p, n in zip(JSON_PATHS, names, strict=True)))
    return dict(zip(JSON_PATHS, zip(names, seen, strict=True), strict=True))


async def check_fault(url: str, fault: Fault) -> list[str]:
    """That every client sees this fault, and so does every one that attaches afterwards. Returns
    some of the names of the models that were asked.
    """
    streams, pieces = await asyncio.gather(
        every_kind(url, fault.words), every_path(url, fault.words)
    )
    for kind, (_, seen) in streams.items():
        fault.check(kind, seen)
    for path, (_, seen) in pieces.items():
        fault.check_json(seen, (path.startswith("/v1/") and fault.openai) or fault.status)
        assert seen.text == fault.text
    stream_id = streams[CONTENT][1].stream_id
    said = await status(url, stream_id)
    assert (said["state"], said["error"]["code"]) == ("failed", fault.code)
    assert said["usage"]["estimated"] is True
    again = await asyncio.gather(*(attach(url, stream_id, kind) for kind in streams))
    for kind, seen in zip(streams, again, strict=True):
        fault._replace(openai=0).check(kind, seen)  # an attaching client speaks to us alone
    return [name for name, _ in (*streams.values(), *pieces.values())][::7]


@pytest.mark.parametrize("fault", BEFORE, ids=str)
async def test_before_the_first_token(
    relay_server: Server, upstream: UpstreamProcess, fault: Fault
) -> None:
    """A failure before the first token is tried again where that may help, and then told: in the
    stream, or by its status to who asked for one piece and to clients of the openai dialect.
    """
    models = await check_fault(relay_server.url, fault)
    for model in models:
        assert len(upstream.log(model)) == fault.tries, model


@pytest.mark.parametrize("fault", MIDWAY, ids=str)
async def test_midway(relay_server: Server, upstream: UpstreamProcess, fault: Fault) -> None:
    """A failure after the first token is told after all the text that came before it, and never
    tried again: that would repeat text.
    """
    models = await check_fault(relay_server.url, fault)
    for model in models:
        assert len(upstream.log(model)) == 1, model


async def test_nobody_listens(server: StartServer) -> None:
    """Refused connections are `upstream_unreachable`."""
    config = {"name": "m", "base_url": f"http://127.0.0.1:{closed_port()}/v1"}
    url = server(model=config, generation={"backoff": 0.01}).url
    await check_fault(url, Fault("", "upstream_unreachable", 502))


async def test_connecting_takes_too_long(server: StartServer) -> None:
    """A host that does not answer is given up after `connect_timeout`."""
    with black_hole() as port:
        config = {"name": "m", "base_url": f"http://127.0.0.1:{port}/v1"}
        url = server(model=config, generation={"connect_timeout": 0.2, "retries": 0}).url
        await check_fault(url, Fault("", "connect_timeout", 504))


FIRST_TOKEN = Fault("", "first_token_timeout", 504)
IDLE = Fault("", "idle_timeout", 504, before=7)
TIMEOUTS = {
    "no headers": ("first_token_timeout=0.5", FIRST_TOKEN._replace(words="headers_delay=60")),
    "no token": ("first_token_timeout=0.5", FIRST_TOKEN._replace(words="delay=60")),
    "only a role": ("first_token_timeout=0.5", FIRST_TOKEN._replace(words="delay=60,role_first")),
    "only comments": ("first_token_timeout=0.5", FIRST_TOKEN._replace(words="delay=60,comments")),
    "a stall midway": ("idle_timeout=1", IDLE._replace(words="stall=7")),
    "only comments midway": ("idle_timeout=1", IDLE._replace(words="stall=7,comments")),
}


@pytest.mark.parametrize(("limit", "fault"), TIMEOUTS.values(), ids=list(TIMEOUTS))
async def test_silence(
    server: StartServer, upstream: UpstreamProcess, limit: str, fault: Fault
) -> None:
    """Silence before the first token and between two tokens is limited, and what is no token does
    not count as one. The upstream's connection is closed.
    """
    key, _, seconds = limit.partition("=")
    generation: dict[str, Any] = {key: float(seconds), "retries": 0}
    url = server(model={"name": "m", "base_url": upstream.base}, generation=generation).url
    models = await check_fault(url, fault)
    for model in models:
        (request,) = await upstream.requests(model, closed=True)
        assert request["closed_by"] == "client"


async def test_an_answer_takes_too_long(server: StartServer, upstream: UpstreamProcess) -> None:
    """`total_timeout` ends an answer however lively it is; what had come by then stands."""
    config = {"name": "m", "base_url": upstream.base}
    url = server(model=config, generation={"total_timeout": 3.0}).url
    fault = Fault("tokens=1000,rate=20", "total_timeout", 504, before=1)
    all_of_it = expected(f"up:{fault.words}", PROMPT)
    streams, pieces = await asyncio.gather(
        every_kind(url, fault.words), every_path(url, fault.words)
    )
    for kind, (_, seen) in streams.items():
        assert all_of_it.startswith(seen.text)
        assert 1 <= seen.text.count(" ") <= 100
        fault.check(kind, replace(seen, text=fault.text))
    for _, seen in pieces.values():
        fault.check_json(seen, fault.status)
        assert all_of_it.startswith(seen.text)


@pytest.mark.parametrize("words", ["delay=60", "stall=3", "status=429,retry_after=20"])
async def test_total_goes_before_the_others(
    server: StartServer, upstream: UpstreamProcess, words: str
) -> None:
    """Where it is the shortest, `total_timeout` is what ends silence before the first token, or
    between two, and the wait before another attempt.
    """
    config = {"name": "m", "base_url": upstream.base}
    url = server(model=config, generation={"total_timeout": 0.5}).url
    kind = next(kind for kind in KINDS if kind.dialect == "native" and kind.framing == "sse")
    ((_, seen),) = (await every_kind(url, words, [kind])).values()
    assert (seen.ending, seen.code) == ("failed", "total_timeout")


async def test_a_whole_answer_is_whole(server: StartServer, upstream: UpstreamProcess) -> None:
    """Once the model has said that it is done, `total_timeout` fails nothing: what was still waited
    for is its count of tokens.
    """
    config = {"name": "m", "base_url": upstream.base}
    url = server(model=config, generation={"total_timeout": 1.0}).url
    for _, seen in (await every_kind(url, "tokens=3,stall_end")).values():
        assert seen.text == expected("up:tokens=3,stall_end", PROMPT)
        assert seen.ending in ("finished", "")
        assert seen.ended == "end"


async def test_an_empty_answer_is_whole(server: StartServer, upstream: UpstreamProcess) -> None:
    """Also one without a word: nothing more than its count of tokens is waited for."""
    config = {"name": "m", "base_url": upstream.base}
    url = server(model=config, generation={"first_token_timeout": 30.0}).url
    begun = time.monotonic()
    seen = await start(url, Kind("chat"), named("tokens=0,stall_end"))
    assert (seen.ending, seen.text) == ("finished", "")
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize("words", ["delay=1,first_error", "status=429,headers_delay=1"])
async def test_after_the_status_is_out(
    server: StartServer, upstream: UpstreamProcess, words: str
) -> None:
    """A client of the openai dialect waits for its status for `commit_after` at most: then it is
    200, and a failure is an error frame and a cut.
    """
    config = {"name": "m", "base_url": upstream.base}
    url = server(model=config, generation={"commit_after": 0.2, "retries": 0}).url
    kinds = [kind for kind in KINDS + OLD_KINDS if kind.dialect == "openai"]
    for kind, (_, seen) in (await every_kind(url, words, kinds)).items():
        assert (seen.status, seen.text, seen.ended) == (200, "", "cut"), kind
        assert seen.ending == ("" if kind.framing == "text" else "failed"), kind
        assert DONE not in seen.items


FINE = [
    "u2028",
    "u2028,split,crlf",
    "split",
    "crlf",
    "comments",
    "crlf,comments,split",
    "line=1000000",
    "no_blank",
    "no_blank,no_done",
    "no_done",
    "no_done,close",
    "stall_end",
    "late_done=0.3",
    "close",
    "batch=7",
    "role_first,delay=0.2",
    "flaky=2",
    "status=429,retry_after=0.3,then,tokens=20",
    "reset=0,then,first_error,then,tokens=20",
]


@pytest.mark.parametrize("words", FINE)
async def test_odd_but_whole(relay_server: Server, upstream: UpstreamProcess, words: str) -> None:
    """What is only unusual, or helped by another try before the first token, is a whole answer to
    every client, exact to the character.
    """
    text = expected(f"up:{words}", PROMPT)
    assert text
    streams, pieces = await asyncio.gather(
        every_kind(relay_server.url, words), every_path(relay_server.url, words)
    )
    for who, (_, seen) in (*streams.items(), *pieces.items()):
        assert (seen.status, seen.ending, seen.ended) == (200, "finished", "end"), who
        assert seen.text == text, who


async def test_retry_after_is_honoured(relay_server: Server, upstream: UpstreamProcess) -> None:
    """A 429 that says when to come back is asked again then and no sooner."""
    model = named("status=429,retry_after=1,then,tokens=5")
    begin = time.monotonic()
    seen = await start(relay_server.url, CONTENT, model)
    assert (seen.ending, seen.text) == ("finished", expected(model, PROMPT))
    first, second = upstream.log(model)
    assert 1.0 <= second["opened_at"] - first["closed_at"] < 10
    assert time.monotonic() - begin < 30


async def test_an_error_says_what_the_upstream_said(relay_server: Server) -> None:
    """The upstream's own message goes on to the client, but not that of a refused key."""
    seen = await start(relay_server.url, OPENAI, named("status=400"))
    assert "refused with 400" in seen.items[0]["error"]["message"]
    seen = await start(relay_server.url, CONTENT, named("error_event=3"))
    assert "the model fell over" in seen.items[-1]["error"]
    seen = await start(relay_server.url, OPENAI, named("status=401"))
    assert "refused our credentials" in seen.items[0]["error"]["message"]
    assert "sk-test" not in str(seen)


@pytest.mark.parametrize("http", ["1.0", "1.1"])
async def test_a_fault_of_our_own(http: str) -> None:
    """An answer that breaks in our hands is cut, and no error page gets into its body."""

    def say(event: Event) -> list[JSON] | None:
        raise RuntimeError("a bug")

    async def broken(request: web.Request) -> web.StreamResponse:
        log = Log({})
        log.append("delta", {})
        return await deliver(
            request, encoder(Dialect("x", say, "none"), NDJSON), Cursor(log, 0), {}
        )

    application = app.build(Config())
    application.router.add_get("/broken", broken)
    async with in_process(application) as url, ask("GET", f"{url}/broken", http=http) as seen:
        assert await seen.body() == b""
        assert seen.ended == "cut"
