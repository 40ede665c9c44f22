"""Bad input, on each endpoint: one shape of error, the right status, the field at fault by name.

A model is never asked, and the server answers the next request as if nothing had been.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest

from tests.clients import PROMPT, named
from tests.endpoints import url_of
from tests.processes import Server, UpstreamProcess
from tests.readers import Answer, ask
from tests.upstream import expected

KEY = "sk-bad-input"  # by which the upstream knows this server
LIMITS = {"prompt_chars": 100, "messages": 3, "body_bytes": 65536}
USER = [{"role": "user", "content": PROMPT}]


class Post(NamedTuple):
    """An endpoint with a body, and a good one for it."""

    path: str
    body: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.path} {'+'.join(self.body)}"


POSTS = (
    Post("/api/v1/generate", {"prompt": PROMPT}),
    Post("/api/v1/ai/generate", {"prompt": PROMPT}),
    Post("/api/v1/ai/generate", {"prompt": PROMPT, "stream": True}),
    Post("/api/v1/ai/generate/stream", {"prompt": PROMPT}),
    Post("/stream", {"prompt": PROMPT}),
    Post("/stream", {"messages": USER}),
    Post("/api/chat/stream", {"message": PROMPT}),
    Post("/api/chat/stream", {"messages": USER}),
    Post("/v1/chat/completions", {"messages": USER}),
    Post("/v1/chat/completions", {"messages": USER, "stream": True}),
)
each_post = pytest.mark.parametrize("post", POSTS, ids=str)


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory, upstream: UpstreamProcess) -> Iterator[Server]:
    """A server with small limits, before the upstream."""
    model = {"name": "up:", "base_url": upstream.base, "api_key": KEY}
    process = Server(tmp_path_factory.mktemp("strict"), {"model": model, "limits": LIMITS})
    yield process
    process.stop()


@pytest.fixture(autouse=True)
async def unharmed(strict: Server, upstream: UpstreamProcess) -> AsyncIterator[None]:
    """After each test: nothing broke, no model was asked, and a good question is answered."""

    def asked() -> int:
        return sum(entry["authorization"] == f"Bearer {KEY}" for entry in upstream.log())

    before = asked()
    yield
    assert asked() == before
    model = named("tokens=5")
    body = {"prompt": PROMPT, "model": model}
    async with ask("POST", f"{strict.url}/api/v1/generate", json_body=body) as answer:
        assert await answer.json() == {"text": expected(model, PROMPT), "tokens": 5}
    lines = [line for line in strict.log_lines() if line.get("level") == "error"]
    assert not [line for line in lines if line["logger"].startswith("rivulet")]


async def refused(answer: Answer, path: str) -> tuple[int, str, str | None]:
    """Status, code and field of an error, whose shape is checked."""
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    body = await answer.json()
    assert set(body) == {"error"}
    error = body["error"]
    if path.startswith("/v1/"):
        assert set(error) == {"message", "type", "param", "code", "request_id"}
        assert error["type"] == "invalid_request_error"
    else:
        assert set(error) - {"param"} == {"code", "message", "request_id"}
    assert error["request_id"] == answer.headers["x-request-id"]
    assert isinstance(error["message"], str)
    assert error["message"]
    return answer.status, error["code"], error.get("param")


@asynccontextmanager
async def get(strict: Server, path: str, **query: Any) -> AsyncIterator[Answer]:
    async with ask("GET", url_of(strict.url, path, **query)) as answer:
        yield answer


async def body_refused(strict: Server, post: Post, body: bytes) -> tuple[int, str, str | None]:
    """What a body is told."""
    async with ask("POST", strict.url + post.path, body=body) as answer:
        return await refused(answer, post.path)


async def field_refused(
    strict: Server, post: Post, field: str, value: Any
) -> tuple[int, str, str | None]:
    """What the good body is told with another value in one field (...: without it)."""
    asked = {k: v for k, v in {**post.body, field: value}.items() if v is not ...}
    return await body_refused(strict, post, json.dumps(asked).encode())


def invalid(field: str) -> tuple[int, str, str]:
    return 422, "invalid_field", field


# --- bodies -------------------------------------------------------------------------------------


@each_post
async def test_a_body_that_is_no_json(strict: Server, post: Post) -> None:
    """400 for what cannot be read: no JSON, NaN, half a surrogate pair, other bytes, too deep."""
    good = json.dumps(post.body).encode()[:-1]
    for body in (
        b"", b"{", b"prompt=hello", b"\xff\xfe\x00", good, good + b"}}",
        b"\xef\xbb\xbf" + good + b"}", good + b', "x": NaN}', good + b', "x": Infinity}',
        good + b', "x": "\\ud800"}',
        good + b', "x": "\xed\xa0\x80"}', good + b', "x": "\n"}', good + b", 'x': 1}",
        good + b', "x": ' + b"[" * 300 + b"]" * 300 + b"}",
        good + b', "x": ' + b'{"a":' * 2000 + b"1" + b"}" * 2000 + b"}",
    ):  # fmt: skip
        found = await body_refused(strict, post, body)
        assert found == (400, "bad_request", "body"), body[:100]


@each_post
async def test_a_body_that_is_no_object(strict: Server, post: Post) -> None:
    """400 for JSON that is something else."""
    for body in (b"[]", b'"prompt"', b"7", b"null", b"true", json.dumps([post.body]).encode()):
        assert await body_refused(strict, post, body) == (400, "bad_request", "body")


@each_post
async def test_a_body_that_is_too_large(strict: Server, post: Post) -> None:
    """413 for a body past `limits.body_bytes`, with its length told or in chunks."""
    large = json.dumps({**post.body, "x": "x" * 70_000}).encode()
    assert await body_refused(strict, post, large) == (413, "too_large", "body")
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(large), large)
    raw = f"POST {post.path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with ask("GET", strict.url + "/health", keep_alive=True) as answer:
        await answer.body()
        connection = answer.connection
        connection.writer.write(raw.encode() + chunks)
        await connection.writer.drain()
        head = await connection.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 413 ")


@each_post
async def test_a_body_that_is_not_what_its_headers_say(strict: Server, post: Post) -> None:
    """400 for a body that says it is compressed and is not."""
    body = json.dumps(post.body).encode()
    for encoding in ("gzip", "deflate"):
        async with ask(
            "POST", strict.url + post.path, body=body, headers={"Content-Encoding": encoding}
        ) as answer:
            assert await refused(answer, post.path) == (400, "bad_request", "body")


# --- fields -------------------------------------------------------------------------------------


@each_post
async def test_the_question(strict: Server, post: Post) -> None:
    """422 naming the field for a question that is missing, null, of another type or blank; 413 for
    one that is too long.
    """
    (field,) = {"prompt", "message", "messages"} & set(post.body)
    wanted = {"/stream": "prompt", "/api/chat/stream": "message"}.get(post.path, field)
    assert await field_refused(strict, post, field, ...) == (422, "missing_field", wanted)
    assert await field_refused(strict, post, field, None) == (422, "missing_field", wanted)
    for wrong in (7, 1.5, True, {}, {"a": 1}, "" if field == "messages" else ["a"]):
        assert await field_refused(strict, post, field, wrong) == invalid(field), wrong
    if field == "messages":
        assert await field_refused(strict, post, "messages", []) == invalid(field)
        many = [{"role": "user", "content": "a"}] * 4
        assert await field_refused(strict, post, "messages", many) == (413, "too_large", field)
        parts = [{"type": "text", "text": "x" * 51}, {"type": "image_url"}]
        long = [{"role": "user", "content": "x" * 50}, {"role": "user", "content": parts}]
        assert await field_refused(strict, post, "messages", long) == (413, "too_large", field)
    else:
        for blank in ("", " ", "\n\t\u00a0\u2003"):
            assert await field_refused(strict, post, field, blank) == invalid(field)
        assert await field_refused(strict, post, field, "é" * 101) == (413, "too_large", field)


@pytest.mark.parametrize("post", [post for post in POSTS if "messages" in post.body], ids=str)
async def test_each_message(strict: Server, post: Post) -> None:
    """422 naming the message and what is wrong in it."""
    bad: list[tuple[Any, str]] = [
        (7, ""), ("hello", ""), (None, ""), ([], ""),
        ({}, ".role"), ({"content": "a"}, ".role"), ({"role": 7, "content": "a"}, ".role"),
        ({"role": "", "content": "a"}, ".role"), ({"role": None, "content": "a"}, ".role"),
        ({"role": "user"}, ".content"), ({"role": "system", "content": ""}, ".content"),
        ({"role": "assistant", "content": 7}, ".content"),
    ]  # fmt: skip
    contents: tuple[Any, ...] = (None, 7, {}, "", " ", [], [7], ["a"])
    bad += [({"role": "user", "content": content}, ".content") for content in contents]
    for message, place in bad:
        for at in (0, 1):
            messages = [message, *USER] if at == 0 else [*USER, message]
            found = await field_refused(strict, post, "messages", messages)
            assert found == invalid(f"messages[{at}]{place}"), message


OPTIONS: tuple[tuple[str, tuple[str, ...], tuple[Any, ...]], ...] = (
    # field, the endpoints that know it, what it may not be
    ("model", tuple({post.path for post in POSTS}), (7, True, [], {}, "", " \n")),
    ("stream", ("/api/v1/ai/generate", "/v1/chat/completions"), (1, "true", "", [], {})),
    ("max_tokens", ("/api/v1/generate", "/api/v1/ai/generate/stream"),
     (0, -1, 1.5, True, "many", "", [], 10**8, 10**30, -(10**30))),
    ("n", ("/v1/chat/completions",), (0, 129, 1.5, "two", True)),
    ("stream_options", ("/v1/chat/completions",), (7, True, "include_usage", [])),
    ("conversation_id", ("/api/chat/stream",),
     (7, True, [], {}, "", " ", "a b", "a\nb", "é", "\x7f", "\u0000", "x" * 129)),
    ("room", ("/api/chat/stream",),
     (7, True, [], {}, "", " ", "a b", "a\tb", "\u0000", "conv:a:b", "user:a", "x" * 129)),
)  # fmt: skip


@each_post
async def test_the_other_fields(strict: Server, post: Post) -> None:
    """422 naming the field for what it may not be, 413 for a name that is too long."""
    for field, paths, wrongs in OPTIONS:
        if post.path not in paths:
            continue
        for wrong in wrongs:
            assert await field_refused(strict, post, field, wrong) == invalid(field), wrong
    too_long = await field_refused(strict, post, "model", "x" * 513)
    assert too_long == (413, "too_large", "model")


@each_post
async def test_what_is_wrong_around_the_body(strict: Server, post: Post) -> None:
    """A good body with a bad header or query is refused just so."""
    data = json.dumps(post.body).encode()
    for key in ("", " ", "a b", "é", "x" * 256):
        async with ask(
            "POST", strict.url + post.path, body=data, headers={"Idempotency-Key": key}
        ) as answer:
            assert await refused(answer, post.path) == invalid("Idempotency-Key"), key
    for user in ("x" * 129, "a\u2028b", "a\u200bb"):
        async with ask(
            "POST", strict.url + post.path, body=data, headers={"X-User-Id": user}
        ) as answer:
            assert await refused(answer, post.path) == (400, "bad_request", "X-User-Id")
        async with ask("POST", url_of(strict.url, post.path, user_id=user), body=data) as answer:
            assert await refused(answer, post.path) == (400, "bad_request", "X-User-Id")
    for query in ("format=%ff", "model=%ED%A0%80", "x=%C3"):
        async with ask("POST", f"{strict.url}{post.path}?{query}", body=data) as answer:
            assert await refused(answer, post.path) == (400, "bad_request", "query")
    if post.body.get("stream") or "stream" in post.path:
        for field, wrongs in STREAM_QUERY.items():
            for wrong in wrongs:
                url = url_of(strict.url, post.path, **{field: wrong})
                async with ask("POST", url, body=data) as answer:
                    assert await refused(answer, post.path) == invalid(field), wrong


# --- queries ------------------------------------------------------------------------------------


STREAM_QUERY = {
    "format": ("", "xml", "SSE", "json", "text/html"),
    "heartbeat": ("a b", "a\nb", "é", "x" * 33, ":"),
}


@pytest.mark.parametrize("path", ["/stream", "/chat"])
async def test_a_question_in_the_query(strict: Server, path: str) -> None:
    """422 for one that is empty or blank, 413 for one that is too long, 400 for no UTF-8."""
    if path == "/chat":
        async with get(strict, path) as answer:
            assert await refused(answer, path) == (422, "missing_field", "prompt")
    for blank in ("", " ", "\n\t"):
        async with get(strict, path, prompt=blank) as answer:
            assert await refused(answer, path) == invalid("prompt")
        async with get(strict, path, prompt="a", model=blank) as answer:
            assert await refused(answer, path) == invalid("model")
    for long in ("a" * 101, "é" * 10_000):
        async with get(strict, path, prompt=long) as answer:
            assert await refused(answer, path) == (413, "too_large", "prompt")
    for query in ("prompt=%ff", "prompt=a&model=%ED%A0%80"):
        async with ask("GET", f"{strict.url}{path}?{query}") as answer:
            assert await refused(answer, path) == (400, "bad_request", "query")


@pytest.mark.parametrize("path", ["/stream", "/chat", "/api/stream", "/api/v1/streams/{}/events"])
async def test_how_to_stream(demo_server: Server, strict: Server, path: str) -> None:
    """422 for a format or a heartbeat's name that there is not."""
    path = path.format(await a_stream(demo_server))
    for field, wrongs in STREAM_QUERY.items():
        for wrong in wrongs:
            async with get(demo_server, path, prompt="a", **{field: wrong}) as answer:
                assert await refused(answer, path) == invalid(field), wrong


async def a_stream(demo_server: Server) -> str:
    """The id of an answer that has ended."""
    body = {"prompt": PROMPT, "model": "demo:rate=1000,tokens=5"}
    async with ask("POST", f"{demo_server.url}/api/v1/generate", json_body=body) as answer:
        await answer.body()
        return answer.headers["x-stream-id"]


async def test_where_to_attach(demo_server: Server) -> None:
    """422 for a dialect that there is not, and a place that is not in this stream."""
    stream_id = await a_stream(demo_server)
    path = f"/api/v1/streams/{stream_id}/events"
    for dialect in ("", "Native", "ui ", "sse"):
        async with get(demo_server, path, dialect=dialect) as answer:
            assert await refused(answer, path) == invalid("dialect")
    for after in (
        "",
        "-1",
        "x",
        "1.5",
        "99",
        "1" * 30,
        f"{'0' * 32}-1",
        f"{stream_id}-99",
        "\u0661",
    ):
        async with get(demo_server, path, starting_after=after) as answer:
            assert await refused(answer, path) == invalid("starting_after"), after


async def test_how_far_to_count(demo_server: Server) -> None:
    """422 for a count or an interval that is no number, or out of range."""
    for count in ("", "-1", "x", "1.5", "1e3", "1000001", "9" * 30, "\u0661"):
        async with get(demo_server, "/api/stream", count=count) as answer:
            assert await refused(answer, "/api/stream") == invalid("count"), count
    for interval in ("", "-1", "x", "nan", "inf", "-inf", "3601", "1e9"):
        async with get(demo_server, "/api/stream", count=1, interval=interval) as answer:
            assert await refused(answer, "/api/stream") == invalid("interval"), interval


# --- paths and methods --------------------------------------------------------------------------


async def test_an_unknown_path(strict: Server) -> None:
    """404, under `/v1/` in OpenAI's words."""
    for path in ("/nope", "/api/v1/nope", "/chat/", "//chat", "/v1/nope", "/v1/", "/%00", "/%ff"):
        for method in ("GET", "POST", "DELETE"):
            async with ask(method, strict.url + path) as answer:
                assert await refused(answer, path) == (404, "not_found", None)


async def test_an_unknown_stream(strict: Server) -> None:
    """404 naming the id, whatever stands in its place."""
    for id in ("0" * 32, "x", "..%2f..%2fetc", "%00", "%ff", "x" * 4000, "a-1"):
        for method, action in (("GET", ""), ("GET", "/events"), ("POST", "/stop")):
            path = f"/api/v1/streams/{id}{action}"
            async with ask(method, strict.url + path) as answer:
                assert await refused(answer, path) == (404, "not_found", "id")


async def test_an_unknown_model_in_the_list(strict: Server) -> None:
    """404 naming the model, as OpenAI does."""
    for name in ("nope", "%2e%2e", "a/b/c"):
        path = f"/v1/models/{name}"
        async with ask("GET", strict.url + path) as answer:
            assert await refused(answer, path) == (404, "model_not_found", "model")


METHODS = {
    "/api/v1/generate": {"POST"}, "/api/v1/ai/generate": {"POST"},
    "/api/v1/ai/generate/stream": {"POST"}, "/stream": {"GET", "POST"}, "/chat": {"GET"},
    "/api/chat/stream": {"POST"}, "/v1/chat/completions": {"POST"}, "/v1/models": {"GET"},
    "/v1/models/up:": {"GET"}, "/api/v1/streams/x": {"GET"}, "/api/v1/streams/x/events": {"GET"},
    "/api/v1/streams/x/stop": {"POST"}, "/api/stream": {"GET"}, "/api/heartbeat": {"GET", "POST"},
    "/health": {"GET"}, "/ready": {"GET"}, "/metrics": {"GET"},
}  # fmt: skip


@pytest.mark.parametrize("path", METHODS)
async def test_a_wrong_method(strict: Server, path: str) -> None:
    """405, and `Allow` says which there are."""
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - METHODS[path]:
        async with ask(method, strict.url + path) as answer:
            assert await refused(answer, path) == (405, "method_not_allowed", None)
            assert set(answer.headers["allow"].split(",")) == METHODS[path]
    async with ask("HEAD", strict.url + path) as answer:
        assert answer.status == 405
        assert await answer.connection.leftover() == b""
