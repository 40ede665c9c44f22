"""Compression of WebSocket frames (RFC 7692): off unless it is switched on, and then one frame for
all who read a room, whatever was sent to each before.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from aiohttp import ClientSession
from hypothesis import given
from hypothesis import strategies as st

from streaming.encoders import deflated_frame, text_frame
from tests.processes import Server
from tests.properties import property_test
from tests.raw_socket import TEXT, Frame, RawSocket, dialled, frame

OFFER = {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"}
LONG = "word " * 1000


@pytest.fixture(scope="module")
def deflating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with compression switched on."""
    config = {"delivery": {"compression": True}}
    process = Server(tmp_path_factory.mktemp("deflating"), config)
    yield process
    process.stop()


def inflated(found: Frame) -> Any:
    """What a frame says; a compressed one by itself, with nothing that was sent before it."""
    if not found.rsv:
        return found.json()
    assert found.rsv == 4
    return orjson.loads(zlib.decompress(found.payload + b"\0\0\xff\xff\x03\0", -15))


async def message(socket: RawSocket) -> Frame:
    """The next frame that is a message."""
    while (found := await socket.receive()) is not None:
        if found.opcode == TEXT and inflated(found)["type"] == "message":
            return found
    raise EOFError


async def test_off_by_default(demo_server: Server) -> None:
    """A client that offers it gets none."""
    async with dialled(demo_server.url, "/ws/plain", headers=OFFER) as socket:
        assert "sec-websocket-extensions" not in socket.headers
        await socket.say(content=LONG)
        assert (await message(socket)).rsv == 0


async def test_one_frame_serves_all(deflating: Server) -> None:
    """The bytes are the same for a newcomer and for one who has had much before."""
    async with dialled(deflating.url, "/ws/room", headers=OFFER) as old:
        assert old.headers["sec-websocket-extensions"].startswith("permessage-deflate")
        for number in range(20):
            await old.say(content=f"{number} {LONG}")
            told = await message(old)
            assert inflated(told)["content"] == f"{number} {LONG}"
            assert told.rsv == 4 and len(told.payload) < 300
        async with dialled(deflating.url, "/ws/room", headers=OFFER) as new:
            assert inflated(await new.receive() or pytest.fail("it ended"))["type"] == "joined"
            await old.say(content=LONG)
            assert await message(old) == await message(new)


@pytest.mark.parametrize(
    "offer", ["", "x-other", "permessage-deflate; server_max_window_bits=10"], ids=str
)
async def test_who_cannot_take_it_gets_plain_frames(deflating: Server, offer: str) -> None:
    """In the same room as one who can: no offer, another one, and a window smaller than ours."""
    headers = {"Sec-WebSocket-Extensions": offer} if offer else {}
    async with (
        dialled(deflating.url, "/ws/mixed", headers=headers) as plain,
        dialled(deflating.url, "/ws/mixed", headers=OFFER) as able,
    ):
        await plain.say(content=LONG)
        told, same = await message(plain), await message(able)
        assert (told.rsv, same.rsv) == (0, 4)
        assert inflated(told) == inflated(same)


@pytest.mark.parametrize("compress", [0, 9, 12, 15])
async def test_a_stock_client(deflating: Server, http: ClientSession, compress: int) -> None:
    """aiohttp's, with each window: compressed frames go both ways, its own with context."""
    url = f"{deflating.url}/ws/stock-{compress}"
    async with http.ws_connect(url, compress=compress) as socket:
        assert (await socket.receive_json())["type"] == "joined"
        for number in range(50):
            await socket.send_json({"content": f"{number} {LONG}"})
            told = [await socket.receive_json() for _ in range(2)]
            (content,) = [each["content"] for each in told if each["type"] == "message"]
            assert content == f"{number} {LONG}"


async def test_a_frame_that_unpacks_to_too_much(deflating: Server) -> None:
    """Ends with 1009, and what it unpacks to is never there as a whole."""
    deflate = zlib.compressobj(wbits=-15)
    bomb = deflate.compress(b" " * 200 * 2**20) + deflate.flush(zlib.Z_SYNC_FLUSH)
    assert len(bomb) < 250_000
    async with dialled(deflating.url, "/ws/bomb", headers=OFFER) as socket:
        before = deflating.rss()
        await socket.send(frame(TEXT, bomb[:-4], rsv=4))
        assert await socket.ended() == 1009
        assert deflating.rss() < before + 16 * 2**20


@property_test
@given(st.text() | st.text().map(lambda text: text * 100))
def test_a_frame_is_never_longer_than_the_plain_one(text: str) -> None:
    """What does not shrink goes out as it is."""
    payload = text.encode()
    made, plain = deflated_frame(payload), text_frame(payload)
    assert len(made) <= len(plain)
    if made[0] == 0x81:
        assert made == plain
    else:
        assert made[0] == 0xC1
        size = made[1] if made[1] < 126 else 0
        start = 2 if size else 4 if made[1] == 126 else 10
        assert zlib.decompress(made[start:] + b"\0\0\xff\xff\x03\0", -15) == payload
