"""The application as a part of another: mounted under a prefix, with the middlewares, the routes,
the limits and the end of the one around it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from app import build
from streaming import config
from streaming.config import Config
from tests.clients import (
    JSON_PATHS,
    KINDS,
    OLD_KINDS,
    Kind,
    asked,
    attach,
    body_of,
    once,
    see,
    start,
    stop,
    whole,
)
from tests.endpoints import RESUMABLE, resuming
from tests.inside import in_process
from tests.people import TRANSPORTS, empty, joined, members, new_room, on_socket, publish, request
from tests.processes import until
from tests.readers import ask

CHAT = Kind("chat")
FAST = "demo:rate=1000"


class House:
    """An application around ours, which is at `prefix` in it. passed: the status and path of each
    request as its own middleware has seen it; over: what it has cleaned up.
    """

    def __init__(self, cfg: Config, prefix: str = "/ai") -> None:
        self.prefix = prefix
        self.passed: list[tuple[int, str]] = []
        self.over: list[str] = []
        self.app = web.Application(middlewares=[self._watch])
        self.app.router.add_get("/", self._page)
        self.app.router.add_get("/v1/none", self._page)
        self.app.on_response_prepare.append(self._sign)
        self.inner = build(cfg)
        self.app.add_subapp(prefix, self.inner)
        self.app.on_cleanup.append(self._clean)

    @web.middleware
    async def _watch(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.headers.get("X-Refuse"):
            refusal = web.StreamResponse(status=418)
            await refusal.prepare(request)
            return refusal
        response: web.StreamResponse = await handler(request)
        await asyncio.sleep(0.001)  # a middleware may wait after the handler, too
        self.passed.append((response.status, request.path))
        return response

    async def _sign(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-House"] = "ours"

    async def _page(self, request: web.Request) -> web.Response:
        return web.Response(text="page")

    async def _clean(self, app: web.Application) -> None:
        self.over.append("house")


@pytest.fixture(params=[False, True], ids=["as aiohttp runs it", "with cancellation"])
def cancels(request: pytest.FixtureRequest) -> bool:
    """Whether handlers are cancelled when their client goes; aiohttp does so only if it is told."""
    return bool(request.param)


@asynccontextmanager
async def running(house: House, cancels: bool = False) -> AsyncIterator[str]:
    """Runs it as its owner does: the URL of our part."""
    runner = web.AppRunner(house.app, shutdown_timeout=5, handler_cancellation=cancels)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}{house.prefix}"
    finally:
        await runner.cleanup()


async def told(url: str, method: str, path: str, **request: Any) -> tuple[int, Any, Any]:
    """The status, body and content type of an answer to a request with an id of its own."""
    headers = {"X-Request-Id": "r1", **request.pop("headers", {})}
    async with ask(method, url + path, headers=headers, **request) as answer:
        body = await answer.body()
        assert answer.headers["x-request-id"] == "r1"
        return answer.status, body, answer.headers.get("content-type")


# --- what is served -----------------------------------------------------------------------------


async def test_answers_of_every_kind(cancels: bool) -> None:
    """Streamed in each dialect and framing, over both versions of HTTP, and in one piece."""
    async with running(House(Config()), cancels) as url:
        for kind in KINDS + OLD_KINDS:
            seen = await start(url, kind, FAST)
            assert seen.text
            assert (seen.ending, seen.ended) == ("finished", "end")
        for path in JSON_PATHS:
            assert (await whole(url, path, FAST)).ending == "finished"


async def test_resume_and_stop(cancels: bool) -> None:
    """On each endpoint that resumes, from a position; by the stream's id; and stop stops."""
    async with running(House(Config()), cancels) as url:
        full = await start(url, CHAT, FAST)
        native = await attach(url, full.stream_id, Kind("native"), after=5)
        assert native.text
        assert full.text.endswith(native.text)
        for endpoint in RESUMABLE:
            async with resuming(url, endpoint, f"{full.stream_id}-5") as answer:
                again = await see(Kind(endpoint.dialect, endpoint.framing), answer)
            assert (again.status, again.text) == (200, native.text)
        async with asked(url, CHAT, "demo:rate=20,tokens=5000") as answer:
            assert (await stop(url, answer.headers["x-stream-id"])).status == 200
            assert (await see(CHAT, answer)).ending == "cancelled"


async def test_rooms(cancels: bool) -> None:
    """On each transport: what is said, by REST, on a socket and by a model, reaches all; and who
    goes is gone, at the next heartbeat at the latest.
    """
    cfg = Config(rooms=config.Rooms(grace=0), delivery=config.Delivery(heartbeat=0.2))
    async with running(House(cfg), cancels) as url:
        room = new_room()
        async with AsyncExitStack() as stack:
            people = [
                await stack.enter_async_context(joined(url, room, each, each))
                for each in TRANSPORTS
            ]
            assert (await publish(url, room, {"content": "by REST"}))[0] == 201
            await people[0].say(content="on a socket")
            for person in people:
                assert (await person.hear("message"))["content"] == "by REST"
                assert (await person.hear("message"))["content"] == "on a socket"
            await people[0].say("generate", message="Hi", model=FAST)
            ends = [await person.hear("stream_end") for person in people]
            assert ends[0]["content"]
            assert ends[0] == ends[1] == ends[2]
            assert sorted(await members(url, room)) == sorted(TRANSPORTS)
        await empty(url, room)


async def test_who_goes_does_not_read_on(cancels: bool) -> None:
    """An answer whose only reader has gone is cancelled after `linger`."""
    cfg = Config(generation=config.Generation(linger=0.1))
    async with running(House(cfg), cancels) as url:
        async with asked(url, CHAT, "demo:rate=20,tokens=20000") as answer:
            stream_id = answer.headers["x-stream-id"]
        await once(url, stream_id, "state", "cancelled")


async def test_the_limit_of_a_body_is_ours() -> None:
    """Not the one of the application around, which is lower by default."""
    padded = b'{"prompt": "Hi", "model": "demo:rate=1000"%s}'
    async with running(House(Config(limits=config.Limits(body_bytes=2_000_000)))) as url:
        for path in ("/stream", "/api/v1/generate"):
            assert (await told(url, "POST", path, body=padded % (b" " * 1_500_000)))[0] == 200
            status, body, _ = await told(url, "POST", path, body=padded % (b" " * 2_500_000))
            assert (status, b"2000000 bytes" in body) == (413, True)


@pytest.mark.parametrize("prefix", ["/ai", "/v1", "/a/b"])
async def test_errors_are_what_they_are_alone(prefix: str) -> None:
    """Status and body are those of the application by itself, under `/v1/` OpenAI's."""
    cfg = Config(generation=config.Generation(backoff=0.01))
    async with running(House(cfg, prefix)) as url, in_process(build(cfg)) as alone:
        for method, path, body in REFUSED:
            request: dict[str, Any] = {"json_body": body} if body is not None else {}
            wrong = await told(alone, method, path, **request)
            assert wrong[0] >= 400
            assert await told(url, method, path, **request) == wrong
        key = {"Idempotency-Key": "k1"}
        for body, status in ({"prompt": "Hi", "model": FAST}, 200), ({"prompt": "No"}, 422):
            answer = await told(url, "POST", "/api/v1/generate", headers=key, json_body=body)
            assert answer[0] == status


REFUSED: list[tuple[str, str, Any]] = [
    ("GET", "", None),
    ("GET", "/nowhere", None),
    ("GET", "/v1/nowhere", None),
    ("GET", "/v1/models/none", None),
    ("POST", "/health", {}),
    ("DELETE", "/v1/models", None),
    ("POST", "/stream", {}),
    ("POST", "/api/v1/generate", []),
    ("POST", "/api/v1/generate", {"prompt": "Hi", "model": "demo:fail=before"}),
    ("POST", "/v1/chat/completions", {"messages": []}),
    ("POST", "/v1/chat/completions", body_of("/v1/", model="demo:fail=before", stream=True)),
    ("GET", "/api/v1/streams/none", None),
    ("GET", "/ws/room", None),
]


# --- the one around -----------------------------------------------------------------------------


async def test_what_is_around_stays_as_it_is(cancels: bool) -> None:
    """Its routes and its errors are its own. Its middlewares and signals see our requests too, and
    may wait, and may answer themselves; a WebSocket goes on when they are through with it.
    """
    house = House(Config())
    async with running(house, cancels) as url:
        outside = url.removesuffix("/ai")
        for path, status in ("/", 200), ("/v1/none", 200), ("/nowhere", 404), ("/aim/health", 404):
            async with ask("GET", outside + path) as answer:
                assert (answer.status, "x-request-id" in answer.headers) == (status, False)
                assert not (await answer.body()).startswith(b"{")
        house.passed.clear()
        async with ask("GET", f"{url}/health", headers={"X-Refuse": "1"}) as answer:
            assert (answer.status, answer.headers["x-house"]) == (418, "ours")
        async with ask("GET", f"{url}/health") as answer:
            assert (answer.status, answer.headers["x-house"]) == (200, "ours")
        async with on_socket(url) as socket:
            await until(lambda: len(house.passed) == 2)
            assert (await socket.call("ping"))["type"] == "pong"
        assert house.passed == [(200, "/ai/health"), (101, "/ai/ws")]


async def test_two_in_one_house() -> None:
    """Each under its prefix, and neither knows the other's streams."""
    house = House(Config())
    house.app.add_subapp("/other", build(Config()))
    async with running(house) as url:
        seen = await start(url, CHAT, FAST)
        assert (await attach(url, seen.stream_id, CHAT)).text == seen.text
        other = url.removesuffix("/ai") + "/other"
        assert (await attach(other, seen.stream_id, CHAT)).code == "not_found"


async def test_it_drains_with_the_house(cancels: bool, tmp_path: Path) -> None:
    """Answers that end within the window are whole, a WebSocket is told to come back, the rest is
    cut; then the history is closed, and all that before the house is cleaned up.
    """
    kept = config.History(path=str(tmp_path / "history.db"))
    house = House(Config(server=config.Server(drain=2.0), history=kept))
    async with AsyncExitStack() as stack:
        async with running(house, cancels) as url:
            enter = stack.enter_async_context
            short = await enter(asked(url, CHAT, "demo:rate=40,tokens=40"))
            long = await enter(asked(url, CHAT, "demo:rate=5,tokens=5000"))
            socket, room = await enter(on_socket(url)), await enter(joined(url, "r", None, "sse"))
            answers = [asyncio.create_task(see(CHAT, each)) for each in (short, long)]
            leaving = asyncio.create_task(socket.rest())
        assert house.over == ["house"]
        short_seen, long_seen = [await each for each in answers]
        assert (short_seen.ending, short_seen.ended) == ("finished", "end")
        assert (long_seen.ending, long_seen.ended) == ("", "cut")
        await leaving
        assert socket.code == 1012
        await room.rest()
        assert room.answer.ended == "cut"
    async with running(House(Config(history=kept))) as url:  # nobody holds the file any more
        assert (await request(url, "GET", "/ready"))[0] == 200
