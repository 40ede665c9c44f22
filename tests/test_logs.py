"""Logs: what is slow, what has failed, what has closed; and no secret, whatever goes wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tokens
from tests.clients import Kind, named, start, whole
from tests.people import on_socket, request
from tests.processes import Server, UpstreamProcess, until
from tests.raw_socket import dialled, frame
from tests.readers import ask, connect
from tests.redis_server import RedisServer
from tests.test_app import run

StartServer = Callable[..., Server]
CHAT = Kind("chat")
SECRET = "s3cret"


def lines(server: Server, event: str, **fields: Any) -> list[dict[str, Any]]:
    """The lines of this event with these fields."""
    return [line for line in server.log_lines(event) if fields.items() <= line.items()]


async def line(server: Server, event: str, **fields: Any) -> dict[str, Any]:
    """The one such line, as soon as it is there."""
    await until(lambda: lines(server, event, **fields))
    (found,) = lines(server, event, **fields)
    return found


async def test_a_stream_tells_its_first_token(relay_server: Server) -> None:
    """Its line has the stream's id, which is also the answer's, and the seconds until it spoke."""
    seen = await start(relay_server.url, CHAT, named("tokens=2,delay=0.2"))
    said = await line(relay_server, "request", stream_id=seen.stream_id)
    assert said["request_id"] == seen.headers["x-request-id"]
    assert 0.2 <= said["first_token"] <= said["seconds"]
    assert (said["user"], said["level"]) == ("anonymous", "info")


async def test_what_is_slow_is_a_warning(server: StartServer) -> None:
    """A request, and a first token, after five seconds; a stream that has spoken may last. Also
    where requests leave no lines.
    """
    quiet, model = server(server={"access_log": False}), "demo:delay=5.1,rate=100,tokens=2"
    streamed, long, _ = await asyncio.gather(
        start(quiet.url, CHAT, model),
        start(quiet.url, CHAT, "demo:rate=10,tokens=53"),
        whole(quiet.url, "/api/v1/generate", model),
    )
    late = await line(quiet, "first token was late", stream_id=streamed.stream_id)
    assert late["level"] == "warning" and 5.1 < late["seconds"] < 8
    assert late["request_id"] == streamed.headers["x-request-id"]
    slow = await line(quiet, "request")
    assert (slow["level"], slow["path"]) == ("warning", "/api/v1/generate")
    assert long.ending == "finished" and long.stream_id not in "".join(quiet.stderr)


async def test_a_failed_generation_is_a_warning(relay_server: Server) -> None:
    """With the code and the upstream's status; never its words, which may be anything."""
    seen = await start(relay_server.url, CHAT, named("status=418"))
    said = await line(relay_server, "generation failed", stream_id=seen.stream_id)
    assert (said["level"], said["code"], said["status"]) == ("warning", "upstream_rejected", 418)


async def test_a_socket_leaves_a_line_when_it_closes(demo_server: Server) -> None:
    """With the code of whoever was first, 1006 where nobody said one, and how long it lasted."""
    for code in (1001, 1006):
        id = f"closed-{code}"
        headers = {"X-Request-Id": id}
        async with dialled(demo_server.url, "/ws/lines", headers=headers) as socket:
            await socket.hear("joined")
            await asyncio.sleep(0.1)
            if code != 1006:
                await socket.send(frame(8, code.to_bytes(2)))
                await socket.ended()
        said = await line(demo_server, "socket closed", request_id=id)
        assert said["code"] == code and 0.1 <= said["seconds"] < 30
        assert (await line(demo_server, "request", request_id=id))["path"] == "/ws/lines"


# --- secrets ------------------------------------------------------------------------------------

HANDSHAKE = (
    f"Upgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Version: 13\r\n"
    f"Cookie: rivulet_token={SECRET}\r\nSec-WebSocket-Protocol: bearer, {SECRET}\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
# Each is answered with an error, or breaks a protocol: what it says is not to be repeated.
RAW = (
    f"GET /health?token={SECRET} HTTP/9.9\r\n\r\n",
    f"GET /health?token={SECRET}\x01 HTTP/1.1\r\n\r\n",
    f"GET /nowhere?ticket={SECRET} HTTP/1.1\r\nHost: localhost\r\n\r\n",
    f"GET http://user:{SECRET}@host:99999/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    f"GET /health HTTP/1.1\r\nAuthorization : Bearer {SECRET}\r\n\r\n",
    f"GET /health HTTP/1.1\r\nX-API-Key: {SECRET}\x00\r\n\r\n",
    f"GET /health HTTP/1.1\r\nCookie: {SECRET * 2000}\r\n\r\n",
    f"GET /{'x' * 70_000}?{SECRET} HTTP/1.1\r\nHost: localhost\r\n\r\n",
    f"POST /stream HTTP/1.1\r\nHost: localhost\r\nContent-Length: {SECRET}\r\n\r\n",
    f"POST /stream HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n{SECRET}\r\n",
    f"POST /stream HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Length: 6\r\n\r\n{SECRET}",
    f"GET /ws?ticket={SECRET} HTTP/1.1\r\nHost: localhost\r\n{HANDSHAKE}\xff\xff{SECRET}",
    f"GET /echo?ticket={SECRET} HTTP/1.1\r\nHost: localhost\r\n{HANDSHAKE}\xff\xff{SECRET}",
)


async def test_no_secret_is_logged(
    server: StartServer, upstream: UpstreamProcess, redis_server: Callable[..., RedisServer]
) -> None:
    """Of a client, of the upstream, of Redis: wherever one can be, and whatever goes wrong."""
    redis = redis_server(requirepass=SECRET)
    running = server(
        model={"name": "up:", "base_url": upstream.base, "api_key": f"sk-{SECRET}"},
        redis={"url": redis.url.replace("//", f"//:{SECRET}@"), "lease": 1.0},
        upstreams=[
            {"name": "gone", "base_url": f"http://127.0.0.1:1/{SECRET}", "models": ["gone"],
             "api_key": SECRET}
        ],
        generation={"retries": 0},
    )  # fmt: skip
    headers = {
        "Authorization": f"Bearer {SECRET}",
        "X-API-Key": SECRET,
        "api-key": SECRET,
        "Cookie": f"rivulet_token={SECRET}",
        "Idempotency-Key": SECRET,
    }
    for text in RAW:
        async with connect(running.url) as connection:
            connection.writer.write(text.encode("latin-1"))
            await asyncio.wait_for(connection.reader.read(1), 30)
    for words in ("status=401", "status=500", "drop", "reset", "bad_json", "tokens=2"):
        await start(running.url, CHAT, named(words), headers={**headers, "Idempotency-Key": words})
    await whole(running.url, "/v1/chat/completions", "gone", headers=headers)
    for body in ({"prompt": 1}, [SECRET], SECRET, {SECRET: SECRET}):
        async with ask("POST", f"{running.url}/stream", headers=headers, json_body=body) as answer:
            assert answer.status in (400, 422)
    async with on_socket(running.url, "/ws", ticket=SECRET) as socket:
        assert (await socket.call("authenticate", token=SECRET))["type"] == "authenticated"
        assert (await socket.call(SECRET))["type"] == "error"
        await socket.send_text(SECRET)
        await socket.hear("error")
        redis.kill()
        await until(lambda: running.log_lines("Redis is away"))
        assert (await socket.call("message", room="x", content=SECRET))["type"] == "error"
    redis.options["requirepass"] = f"other-{SECRET}"
    redis.start()
    status, _ = await request(
        running.url, "POST", "/api/v1/rooms/x/messages", {"content": SECRET}, headers=headers
    )
    assert status == 503
    assert running.stop() == 0
    assert len(running.log_lines("generation failed")) == 6
    assert len(running.log_lines("Error handling request from 127.0.0.1")) > 5
    assert not [text for text in running.stderr + running.stdout if SECRET in text]


async def test_no_token_is_told(
    server: StartServer, tmp_path: Path, redis_server: Callable[..., RedisServer]
) -> None:
    """Keys, JWTs and tickets, good and bad, wherever one can be: neither a line of the log has them
    nor an answer, but for the one that gives a ticket out.
    """
    redis = redis_server(requirepass=SECRET)
    jwks, keys = tmp_path / "jwks.json", tmp_path / "keys.toml"
    jwks.write_text(json.dumps({"keys": [tokens.jwk("ES256")]}))
    keys.write_text(f'[[keys]]\nkey = "{SECRET}-file"\nuser = "operator"\nservice = true\n')
    signing = f"{SECRET}-of-more-than-16-characters"
    auth = {"jwt_secret": signing, "jwt_key": str(jwks), "keys_file": str(keys)}
    running = server(
        auth={"mode": "token", **auth},
        redis={"url": redis.url.replace("//", f"//:{SECRET}@"), "lease": 1.0},
        env={"RIVULET_AUTH__KEYS": json.dumps([{"key": f"{SECRET}-key", "user": "ann"}])},
    )
    good = [tokens.token("ann", signing), f"{SECRET}-key", f"{SECRET}-file",
            tokens.token("ann", tokens.pair("ES256")[0], "ES256")]  # fmt: skip
    bad = [tokens.token("ann"), tokens.token("ann", signing, exp=1), f"{SECRET}.{SECRET}.{SECRET}",
           SECRET, SECRET * 2000, tokens.token("ann", signing, sub=None)]  # fmt: skip
    secrets, told = {SECRET}, [b""]
    secrets |= {each.rpartition(".")[2] for each in good + bad}

    async def hear(path: str, headers: dict[str, str], method: str = "GET") -> int:
        async with ask(method, running.url + path, headers=headers) as answer:
            told.append(repr(answer.headers).encode())
            async for piece in answer.pieces():
                told.append(piece)
                break  # some go on for ever
            return answer.status

    for each in good + bad:
        named = {"X-API-Key": each}, {"api-key": each}, {"Cookie": f"rivulet_token={each}"}
        for headers in ({"Authorization": f"Bearer {each}"}, *named):
            if len(each) > 8000:
                continue  # too long for a header: by a frame, below
            for path in (
                "/v1/models", "/metrics", f"/nowhere?token={each}", "/stream?model=demo:fail",
                "/api/v1/rooms/x/events", "/api/v1/rooms/conv:bob:1/events",
            ):  # fmt: skip
                assert (await hear(path, headers) == 401) is (each in bad)
    async with on_socket(running.url, "/ws/x") as socket:
        frames = [await socket.call("authenticate", token=each) for each in [*bad, *good[:2]]]
        frames += await socket.so_far()
        told += [json.dumps(each).encode() for each in frames]
    for path in ("/v1/models", "/api/v1/rooms/x/events", "/stream?prompt=Hi", "/echo", "/nowhere"):
        own = {"Authorization": f"Bearer {good[0]}"}
        _, given = await request(running.url, "POST", "/api/v1/tickets", headers=own)
        secrets.add(given["ticket"])
        join = "&" if "?" in path else "?"
        assert await hear(f"{path}{join}ticket={given['ticket']}", {}) != 401
        assert await hear(f"/v1/models?x&%74icket={given['ticket']}", {}) in (200, 401)
        async with on_socket(running.url, "/ws/x", ticket=given["ticket"]) as socket:
            told += [json.dumps(each).encode() for each in await socket.rest()]
    keys.write_text(f'keys = [{{"{SECRET}" = 1, "{SECRET}" = 2}}]')
    jwks.write_text(f'{{"keys": ["{SECRET}"]}}')
    await until(lambda: len(running.log_lines("file not used")) == 2)
    redis.kill()
    await until(lambda: running.log_lines("Redis is away"))
    assert await hear(f"/v1/models?ticket={SECRET}", {}) == 503
    assert await hear("/api/v1/tickets", own, "POST") == 503
    assert running.stop() == 0
    lines = [line.encode() for line in running.stderr + running.stdout]
    assert not [line for line in lines + told if any(each.encode() in line for each in secrets)]


async def test_what_a_library_warns_of_is_a_line(server: StartServer) -> None:
    """As all that is said on stderr."""
    running = server(auth={"mode": "token", "jwt_secret": "16-of-characters"})
    with pytest.warns(match="HMAC key"):
        signed = tokens.bearer(tokens.token(key="16-of-characters"))
    assert (await request(running.url, "GET", "/v1/models", headers=signed))[0] == 200
    await line(running, "request", status=200)
    (warned,) = (each for each in running.log_lines() if "HMAC key" in each["event"])
    assert warned["level"] == "warning" and not running.log_lines("")


@pytest.mark.parametrize("address", [f"redis://:{SECRET}/x@127.0.0.1:1", f"redis://u:{SECRET}#@h"])
def test_a_bad_address_is_refused_without_its_password(address: str) -> None:
    """It is split where the password has a character that is not escaped, and said so."""
    done = run("--port", "0", RIVULET_REDIS__URL=address)
    assert done.returncode in (1, 2) and "redis.url" in done.stderr.lower().replace("__", ".")
    assert SECRET not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
