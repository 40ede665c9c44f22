"""Frames that are wrong: each is told what is wrong with it, and the connection stays; only what
breaks WebSocket itself, or is too large, ends it. None of it costs memory that stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import pytest
from aiohttp import ClientSession
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import SOAK
from tests.processes import Server, until
from tests.properties import property_test
from tests.raw_socket import BINARY, CLOSE, TEXT, Frame, RawSocket, dialled, frame
from tests.tokens import SECRET, token

MB = 2**20
JOINS = 100_000 if SOAK else 10_000
MOST = 1000  # rooms on one socket
ALIVE = {"type": "ping", "ref": "still here?"}
TYPES = ("authenticate", "join", "leave", "message", "send_message", "typing", "user_typing",
         "generate", "stop", "history", "presence", "ping")  # fmt: skip


@pytest.fixture
async def socket(demo_server: Server) -> AsyncIterator[RawSocket]:
    """In the room `bad`, and told so."""
    async with dialled(demo_server.url, "/ws/bad?user_id=mallory") as each:
        await each.hear("joined")
        yield each


async def answer(socket: RawSocket, text: str | bytes, opcode: int = TEXT) -> Any:
    """The error frame that this gets; nothing else comes of it, and the connection stays."""
    await socket.send(frame(opcode, text if isinstance(text, bytes) else text.encode()))
    await socket.say(**ALIVE)
    error = await socket.hear("error")
    assert await socket.hear("pong") == {"type": "pong", "ref": "still here?"}
    assert error["code"] and error["message"]
    return error


# --- what is no frame ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", " ", "{", "nope", "{'type': 'ping'}", '{"type":"ping"', '{"type":"ping"}}', "NaN", "\0",
     '{"type":"ping","n":1e}', "\ufeff{}", '{"a":' * 5000, "[" * 100_000],
)  # fmt: skip
async def test_what_is_not_json(socket: RawSocket, text: str) -> None:
    """However it is broken."""
    error = await answer(socket, text)
    assert error["code"] == "bad_request" and "JSON" in error["message"]


@pytest.mark.parametrize("text", ["null", "true", "0", '"ping"', "[]", '[{"type":"ping"}]'])
async def test_what_is_no_object(socket: RawSocket, text: str) -> None:
    """JSON, but not a frame."""
    assert "object" in (await answer(socket, text))["message"]


async def test_what_is_nested_too_deeply(socket: RawSocket) -> None:
    """It reads as JSON, but could not be told to anybody."""
    deep = '{"content":"x","data":' + "[" * 600 + "]" * 600 + "}"
    assert (await answer(socket, deep))["code"] == "bad_request"


@pytest.mark.parametrize("opcode", [BINARY], ids=["binary"])
async def test_binary_frames(socket: RawSocket, opcode: int) -> None:
    """Are refused, JSON or not."""
    for payload in (b"", b"\0\xff", json.dumps(ALIVE).encode()):
        assert "binary" in (await answer(socket, payload, opcode))["message"]


# --- frames with something wrong in them --------------------------------------------------------


@pytest.mark.parametrize(
    "type", ["", "pings", "Ping", " ping", "joined", "ack", "error", "__init__"]
)
async def test_an_unknown_type(socket: RawSocket, type: str) -> None:
    """What only the server says is unknown too; the answer names the field, and the known ones."""
    error = await answer(socket, json.dumps({"type": type, "ref": 4}))
    assert (error["code"], error["param"], error["ref"]) == ("invalid_field", "type", 4)
    assert "join" in error["message"]


@pytest.mark.parametrize("type", [None, 0, True, [], {}, ["ping"], {"type": "ping"}])
async def test_a_type_that_is_no_text(socket: RawSocket, type: object) -> None:
    """Is not looked for."""
    assert (await answer(socket, json.dumps({"type": type})))["param"] == "type"


def each(param: str, values: Iterable[object], **rest: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Frames in which this field has each of these values."""
    for value in values:
        yield {**rest, param: value}, param


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"type": "join"}, "room"),
    *each("room", (None, 1, True, [], {}, ""), type="join"),
    *each("room", (" ", "a b", "a\n", "\0", "x" * 10_000), type="join"),
    ({"type": "join", "room": "r", "last_event_id": 7}, "last_event_id"),
    ({"type": "join", "room": "r", "last_event_id": "x" * 10_000}, "last_event_id"),
    ({"type": "join", "room": "user:somebody"}, "room"),
    ({"type": "join", "room": "conv:somebody:1"}, "room"),
    ({"type": "leave", "room": "never joined"}, "room"),
    ({"type": "message"}, "content"),
    *each("content", (None, 1, True, [], {}), type="message"),
    ({"type": "message", "content": "x" * 210_000}, "content"),
    ({"type": "message", "content": "x", "room": "elsewhere"}, "room"),
    ({"type": "message", "content": "x", "room": 1}, "room"),
    ({"type": "message", "content": "x", "idempotency_key": 1}, "idempotency_key"),
    ({"type": "message", "content": "x", "idempotency_key": "k" * 300}, "idempotency_key"),
    ({"content": 1}, "content"),
    *each("typing", (None, 1, "yes", []), type="typing"),
    ({"type": "generate"}, "message"),
    ({"type": "generate", "message": 1}, "message"),
    ({"type": "generate", "message": "x", "model": 1}, "model"),
    ({"type": "generate", "messages": "x"}, "messages"),
    ({"type": "generate", "messages": [1]}, "messages"),
    ({"type": "generate", "messages": []}, "messages"),
    ({"type": "generate", "message": "x", "room": "elsewhere"}, "room"),
    ({"type": "stop"}, "stream_id"),
    ({"type": "stop", "stream_id": 1}, "stream_id"),
    ({"type": "stop", "stream_id": "unknown"}, "stream_id"),
    *each("limit", (0, -1, 10**6, "many", [], 1.5), type="history"),
    *each("before", (1, "", "x-1", "-", []), type="history"),
    ({"type": "presence", "room": "elsewhere"}, "room"),
    ({"type": "authenticate", "token": 1}, "token"),
]


@pytest.mark.parametrize(
    ("fields", "param"), WRONG, ids=lambda value: json.dumps(value)[:50].replace('"', "")
)
async def test_a_wrong_field(socket: RawSocket, fields: dict[str, Any], param: str) -> None:
    """Missing, of another type, out of range, too long: the answer names it, and echoes `ref`."""
    error = await answer(socket, json.dumps({**fields, "ref": {"n": 1}}))
    assert error["param"].partition("[")[0] == param
    assert error["ref"] == {"n": 1}
    assert len(json.dumps(error)) < 1000, "what was sent is not sent back"


async def test_half_a_surrogate_pair(socket: RawSocket) -> None:
    """JSON can spell text that no UTF-8 can carry."""
    await answer(socket, '{"type":"message","content":"\\ud800"}')


async def test_wrong_frames_do_not_hold_up_right_ones(socket: RawSocket) -> None:
    """Each gets its own answer, in their order."""
    frames = [
        frame(TEXT, b'{"type":"ping","ref":%d}' % i if i % 2 else b"nope") for i in range(200)
    ]
    await socket.send(*frames)
    for i in range(200):
        told = (await socket.receive() or pytest.fail("it ended")).json()
        assert told["type"] == ("pong" if i % 2 else "error")
        assert not i % 2 or told["ref"] == i


# --- what ends the connection -------------------------------------------------------------------


async def ended(socket: RawSocket, frames: list[bytes]) -> int:
    """The code with which the server closes; it need not take all of this first."""
    code = asyncio.create_task(socket.ended())
    with contextlib.suppress(ConnectionError):
        for each in frames:
            await socket.send(each)
    return await code


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
async def test_a_frame_of_ten_megabytes(demo_server: Server, opcode: int) -> None:
    """Ends with 1009, and is not kept while it comes."""
    before = demo_server.rss()
    async with dialled(demo_server.url, "/ws/bad") as socket:
        assert await ended(socket, [frame(opcode, b" " * 10 * MB)]) == 1009
    assert demo_server.rss() < before + 4 * MB


async def test_fragments_of_ten_megabytes(demo_server: Server) -> None:
    """Their sum counts."""
    part = b" " * 100_000
    async with dialled(demo_server.url, "/ws/bad") as socket:
        parts = [frame(TEXT if i == 0 else 0, part, fin=False) for i in range(100)]
        assert await ended(socket, parts) == 1009


async def test_a_frame_of_the_largest_size(socket: RawSocket) -> None:
    """Just below the limit it is read, and answered."""
    assert (await answer(socket, b" " * (256 * 1024 - 2)))["code"] == "bad_request"


@pytest.mark.parametrize("payload", [b"\xff", b"\xed\xa0\x80", b'{"content":"\xc3"}', b"\xf5"])
async def test_invalid_utf8(demo_server: Server, payload: bytes) -> None:
    """Ends with 1007."""
    async with dialled(demo_server.url, "/ws/bad") as socket:
        await socket.send(frame(TEXT, payload))
        assert await socket.ended() == 1007


async def test_a_broken_frame(demo_server: Server) -> None:
    """What is no WebSocket ends with 1002."""
    for broken in (frame(TEXT, b"{}", rsv=2), frame(3), frame(0, b"{}"), frame(9, b"x" * 126)):
        async with dialled(demo_server.url, "/ws/bad") as socket:
            await socket.send(broken)
            assert await socket.ended() == 1002


# --- too much of something ----------------------------------------------------------------------


async def test_very_many_joins(demo_server: Server, http: ClientSession) -> None:
    """A socket can be in so many rooms; each join beyond is refused, and costs no memory. When it
    is gone it is in none of them.
    """
    async with dialled(demo_server.url, "/ws?user_id=joiner") as socket:

        async def join(first: int, last: int) -> list[str]:
            answers = []
            for start in range(first, last, 500):
                names = range(start, min(start + 500, last))
                frames = [b'{"type":"join","room":"many-%d"}' % name for name in names]
                await socket.send(*(frame(TEXT, each) for each in frames))
                for _ in names:
                    told = (await socket.receive() or pytest.fail("it ended")).json()
                    answers.append(told.get("param", told["type"]))
            return answers

        assert await join(0, MOST) == ["joined"] * MOST
        assert await join(MOST, 2 * MOST) == ["room"] * MOST
        before = demo_server.rss()
        assert set(await join(2 * MOST, JOINS)) == {"room"}
        assert demo_server.rss() < before + 8 * MB
        await socket.say(type="leave", room="many-0")
        await socket.hear("left")
        assert await join(0, 1) == ["joined"]
    async with http.get(f"{demo_server.url}/api/v1/rooms") as found:
        names = {room["room"] for room in (await found.json())["rooms"]}
    assert f"many-{MOST - 1}" in names and f"many-{MOST}" not in names


async def test_joining_the_same_room_again_and_again(socket: RawSocket) -> None:
    """Each time it is told where it stands; it is in it once, and hears everything once."""
    for _ in range(200):
        await socket.say(type="join", room="again")
    for _ in range(200):
        assert (await socket.hear("joined"))["room"] == "again"
    await socket.say(type="message", room="again", content="once", ref=1)
    await socket.say(type="presence", room="again")
    heard: list[str] = []
    while not heard or heard[-1] != "presence":
        heard.append((await socket.receive() or pytest.fail("it ended")).json()["type"])
    heard += [each.json()["type"] for each in await rest(socket)]
    assert sorted(heard) == ["ack", "message", "presence"]


async def rest(socket: RawSocket) -> list[Frame]:
    """What comes before the answer to one more ping."""
    await socket.say(type="ping", ref="last")
    found: list[Frame] = []
    while (each := await socket.receive()) is not None:
        if b'"pong"' in each.payload:
            return found
        found.append(each)
    raise EOFError


# --- anything at all ----------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
NAMES = ("room", "content", "message", "messages", "last_event_id", "typing", "stream_id", "before",
         "limit", "token", "data", "idempotency_key", "model", "ref", "userId", "id")  # fmt: skip
MALLORY, OTHER = (token(user, exp=2**32) for user in ("mallory", "ann"))
known = st.sampled_from(["fuzz", "other", "user:mallory", MALLORY, OTHER, token("mallory", exp=1)])
fields = st.dictionaries(st.sampled_from(NAMES), values | known, max_size=5)
objects = st.builds(lambda type, rest: {"type": type, **rest}, st.sampled_from(TYPES), fields)
LARGE = ('"%s"' % ("x" * 200_001), '"%s"' % ("x" * MB), "[%s0]" % ("0," * 50_000), "9" * 5000,
         '{"a":' * 300 + "1" + "}" * 300, "[" * 30_000 + "]" * 30_000)  # fmt: skip
large = st.builds(
    lambda type, name, value: f'{{"type":"{type}","{name}":{value}}}',
    st.sampled_from(TYPES), st.sampled_from(NAMES), st.sampled_from(LARGE),
)  # fmt: skip
texts = st.one_of(
    objects.map(json.dumps), values.map(json.dumps), st.text(), fields.map(json.dumps), large
).map(lambda text: text.encode("utf-8", "replace"))
WHO: dict[str, tuple[str, dict[str, str]]] = {
    "open": ("/ws/fuzz?user_id=mallory", {}),
    "token": ("/ws/fuzz", {"Authorization": f"Bearer {MALLORY}"}),
    "unnamed": ("/ws/fuzz", {}),
}


@pytest.mark.parametrize("who", WHO)
@property_test
@given(st.lists(texts | st.binary(max_size=40).map(lambda b: b.decode("latin-1").encode())))
def test_any_frames_get_an_answer_each_or_none(who: str, frames: list[bytes]) -> None:
    """Whatever they say, the connection stays, or is closed for what is too large or not allowed;
    nothing breaks inside, and nobody else notices.
    """
    asyncio.run(fuzz(who, frames))


fuzzed: dict[bool, Server] = {}


@pytest.fixture(autouse=True, scope="module")
def fuzzed_servers(demo_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    auth = {"mode": "token", "jwt_secret": SECRET}
    guarded = Server(tmp_path_factory.mktemp("guarded"), {"auth": auth})
    fuzzed.update({True: demo_server, False: guarded})
    before = {server: len(server.log_lines()) for server in fuzzed.values()}
    yield
    for server, count in before.items():
        assert not [x for x in server.log_lines()[count:] if x.get("level", "error") == "error"]
    guarded.stop()


async def fuzz(who: str, frames: list[bytes]) -> None:
    path, headers = WHO[who]
    server = fuzzed[who == "open"]
    async with dialled(server.url, path, headers=headers) as socket, asyncio.timeout(30):
        said = [*frames, b'{"type":"ping","ref":"last"}']
        sending = asyncio.create_task(socket.send(*(frame(TEXT, each) for each in said)))
        try:
            while (found := await socket.receive()) is not None:
                if found.opcode == CLOSE:
                    assert found.code in (1009, 4401, 4403)
                    return
                told = found.json()
                assert told["type"] != "error" or told["code"] != "internal"
                if told["type"] == "pong" and told.get("ref") == "last":
                    return
        finally:
            sending.cancel()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await sending  # it may have been closed before all was said
        pytest.fail("it was cut")


async def test_rubbish_leaves_no_memory(demo_server: Server) -> None:
    """Sockets that sent a hundred thousand bad frames between them."""

    async def spoil(count: int) -> None:
        async with dialled(demo_server.url, "/ws/rubbish") as socket:
            for _ in range(count // 100):
                await socket.send(
                    *[frame(TEXT, b'{"type":"nonsense","ref":"%s"}' % (b"x" * 100))] * 100
                )
                for _ in range(100):
                    await socket.hear("error")

    count = 100_000 if SOAK else 10_000
    await spoil(2000)
    files, before = demo_server.files(), demo_server.rss()
    await asyncio.gather(*(spoil(count // 10) for _ in range(10)))
    assert demo_server.rss() < before + 8 * MB
    await until(lambda: demo_server.files() <= files)
