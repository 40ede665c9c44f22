"""Origin, Host and CORS: which pages may use the server, and what their browsers are told."""

from __future__ import annotations

import json

import pytest

from handlers.origin import names_loopback
from tests.processes import Server
from tests.readers import ask
from tests.tokens import token

LISTED = "http://localhost:3000"  # as config.toml has it
UPGRADE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
FOREIGN = (
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:3001"},
    {"Origin": "http://localhost:3000.evil.example"},
    {"Origin": "https://localhost:3000"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
)
# What starts, publishes, stops, moderates, or tells something.
ASKED = (
    ("POST", "/api/v1/generate", {"prompt": "Hi"}),
    ("GET", "/stream?prompt=Hi", None),
    ("GET", "/chat?prompt=Hi", None),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("POST", "/api/v1/streams/x/stop", None),
    ("POST", "/api/v1/rooms/lobby/messages", {"content": "Hi"}),
    ("GET", "/api/v1/rooms/lobby/messages", None),
    ("GET", "/api/v1/rooms/lobby/events", None),
    ("DELETE", "/api/v1/rooms/lobby", None),
    ("POST", "/api/v1/disconnect", {"user": "ann"}),
    ("POST", "/api/v1/sse/publish", {"user_id": "ann", "channel": "c", "event": "e"}),
    ("POST", "/api/v1/tickets", None),
    ("GET", "/ws", None),
    ("GET", "/ws/lobby", None),
    ("GET", "/echo", None),
)


async def code_of(url: str, asked: tuple[str, str, object], headers: dict[str, str]) -> str:
    """The code of the error that it gets, or its status."""
    method, path, body = asked
    if path.startswith("/ws") or path == "/echo":
        headers = {**UPGRADE, **headers}
    async with ask(method, url + path, headers=headers, json_body=body, keep_alive=True) as answer:
        if answer.status != 403:
            return str(answer.status)
        assert answer.headers["cache-control"] == "no-store"
        code: str = json.loads(await answer.body())["error"]["code"]
        return code


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: f"{asked[0]} {asked[1]}")
async def test_a_foreign_page_may_not(
    demo_server: Server, guarded: Server, asked: tuple[str, str, object]
) -> None:
    """In every mode, whatever else it has: a good cookie, perhaps."""
    cookie = {"Cookie": f"rivulet_token={token('ann')}"}
    for headers in FOREIGN:
        assert await code_of(demo_server.url, asked, headers) == "origin_not_allowed"
        assert await code_of(guarded.url, asked, {**headers, **cookie}) == "origin_not_allowed"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": LISTED},
        {"Origin": LISTED, "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ],
)
async def test_others_may(guarded: Server, headers: dict[str, str]) -> None:
    """A listed page, the server's own, a person's address bar, and what is no browser."""
    own = {"Authorization": f"Bearer {token('ann')}"}
    asked = "POST", "/api/v1/rooms/lobby/messages", {"content": "Hi"}
    assert await code_of(guarded.url, asked, {**headers, **own}) == "201"
    page = {"Origin": guarded.url}
    assert await code_of(guarded.url, asked, {**page, **own}) == "201"
    assert await code_of(guarded.url, ("GET", "/ws/lobby", None), {**page, **own}) == "101"


# --- CORS ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/stream", "/api/v1/rooms/lobby/messages", "/no/such/path"])
async def test_a_preflight(demo_server: Server, guarded: Server, path: str) -> None:
    """Is answered without credentials, for a listed origin only, and remembered."""
    asks = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,last-event-id,authorization",
    }
    for url in (demo_server.url, guarded.url):
        async with ask("OPTIONS", url + path, headers={**asks, "Origin": LISTED}) as answer:
            assert answer.status == 204
            assert answer.headers["access-control-allow-origin"] == LISTED
            assert answer.headers["access-control-allow-credentials"] == "true"
            assert "DELETE" in answer.headers["access-control-allow-methods"]
            assert "last-event-id" in answer.headers["access-control-allow-headers"]
            assert int(answer.headers["access-control-max-age"]) > 0
        async with ask("OPTIONS", url + path, headers={**asks, **FOREIGN[0]}) as answer:
            assert answer.status == 403
            assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/chat?prompt=Hi&model=demo:tokens=2", 200),  # a stream
        ("/api/v1/rooms/lobby/presence", 200),
        ("/chat", 422),
        ("/api/v1/streams/none", 404),
        ("/no/such/path", 404),
        ("/v1/chat/completions", 405),
        ("/health", 200),
    ],
)
async def test_every_answer_says_who_may_read_it(
    demo_server: Server, path: str, status: int
) -> None:
    """Streams and errors too; and what not to make of it. A page that is not listed is told
    nothing.
    """
    async with ask("GET", demo_server.url + path, headers={"Origin": LISTED}) as answer:
        assert answer.status == status
        assert answer.headers["access-control-allow-origin"] == LISTED
        assert answer.headers["access-control-allow-credentials"] == "true"
        exposed = answer.headers["access-control-expose-headers"]
        assert {"X-Stream-Id", "X-Conversation-Id"} <= set(exposed.split(", "))
        assert answer.headers["vary"] == "Origin"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    async with ask("GET", demo_server.url + path) as answer:
        assert "access-control-allow-origin" not in answer.headers
        assert answer.headers["vary"] == "Origin"


async def test_204_says_so_too(demo_server: Server) -> None:
    """It ends an `EventSource`, of a page on another origin as well."""
    url = f"{demo_server.url}/chat?prompt=Hi&model=demo:tokens=2"
    async with ask("GET", url) as answer:
        last = json.loads((await answer.body()).splitlines()[-1])["id"]
        stream_id = answer.headers["x-stream-id"]
    async with ask("POST", f"{demo_server.url}/api/v1/streams/{stream_id}/stop") as answer:
        position = json.loads(await answer.body())["position"]
    assert last
    headers = {"Origin": LISTED, "Last-Event-ID": position}
    async with ask("GET", url, headers=headers) as answer:
        assert answer.status == 204
        assert answer.headers["access-control-allow-origin"] == LISTED


# --- Host ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", "200"),
        ("LocalHost:8080", "200"),
        ("app.localhost:1", "200"),
        ("127.0.0.1", "200"),
        ("127.8.9.1:80", "200"),
        ("[::1]:80", "200"),
        ("localhost.", "200"),
        ("evil.example", "host_not_allowed"),
        ("localhost.evil.example", "host_not_allowed"),
        ("127.0.0.1.evil.example", "host_not_allowed"),
        ("evil.example:8080", "host_not_allowed"),
        ("10.0.0.1", "host_not_allowed"),
        ("[::2]", "host_not_allowed"),
        ("0.0.0.0", "host_not_allowed"),
    ],
)
async def test_open_mode_answers_to_loopback_names(
    demo_server: Server, guarded: Server, host: str, status: str
) -> None:
    """A page whose own name has come to mean this machine is of the same origin as the server. With
    tokens that gives it nothing.
    """
    assert names_loopback(host) is (status == "200")
    asked = "GET", "/api/v1/rooms/lobby/presence", None
    same = {"Host": host, "Origin": f"http://{host}"}
    assert await code_of(demo_server.url, asked, same) == status
    own = {"Authorization": f"Bearer {token('ann')}"}
    assert await code_of(guarded.url, asked, {**same, **own}) == "200"
    async with ask("GET", f"{demo_server.url}/health", headers={"Host": host}) as answer:
        assert answer.status == 200  # a load balancer asks by address
