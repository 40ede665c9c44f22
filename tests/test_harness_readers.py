"""The tests' readers read as such clients do, and say how an answer ended."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import readers
from tests.processes import UpstreamProcess
from tests.readers import Broken, ask, ask_model
from tests.sockets import rst

CHAT = "/v1/chat/completions"


STREAM = (
    "\ufeff: hello\r\rid: 1\nevent: note\ndata: a\u2028b\ndata:c\r\n\r\n"
    'id: x\0y\ndata: {"d": 1}\n\n'
    "id: 7\n\nretry: 1500\nretry: 1x\nnonsense\ndata\n\nevent: lost\n\ndata: no blank line\n"
).encode()


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_sse_is_read_as_the_standard_says(cuts: list[int]) -> None:
    """Whatever pieces it comes in: BOM, LF, CR and CR LF, ids that stay, blocks of an id alone."""
    parser = readers.Sse()
    places = [0, *sorted(cuts), len(STREAM)]
    messages = []
    for start, end in itertools.pairwise(places):
        messages += parser.feed(STREAM[start:end])
    assert messages == [
        ("1", "note", "a\u2028b\nc"),
        ("1", "message", '{"d": 1}'),
        ("7", "message", ""),
    ]
    assert parser.last_event_id == "7"
    assert parser.retry == 1500
    assert parser.comments == ["hello"]


def test_naive_sse_readers() -> None:
    """Lines: all that start with `data: `. Blocks: an id in the data's block breaks them."""
    good = b'data: {"a": "\xe2\x80\xa8"}\n\n: ping\n\nid: 4\n\ndata: [DONE]\n\ndata: ha'
    wanted = ['{"a": "\u2028"}', "[DONE]"]
    for parser in (readers.DataLines(), readers.DataBlocks()):
        found: list[str] = []
        for i in range(len(good)):
            found += parser.feed(good[i : i + 1])
        assert found == wanted
    for bad in (b"id: 1\ndata: a\n\n", b"data: a\ndata: b\n\n", b"data:a\n\n", b"data: a\n: b\n\n"):
        with pytest.raises(Broken):
            readers.DataBlocks().feed(bad)
    assert readers.DataLines().feed(b"id: 1\ndata: a\n\n") == ["a"]


def test_naive_json_readers() -> None:
    """Lines: a blank one breaks them. Braces: so does a brace inside a string or an object."""
    assert readers.Ndjson().feed(b'{"a": "}"}\n{"b": {}}\n{"half') == [{"a": "}"}, {"b": {}}]
    for bad in (b"\n", b'{"a": 1}\n\n', b"[1]\n", b"data: 1\n"):
        with pytest.raises(Broken):
            readers.Ndjson().feed(bad)
    assert readers.Braces().feed(b'{"a": "\\u007d"}\n{"b": 1}\n') == [{"a": "}"}, {"b": 1}]
    for bad in (b'{"a": "}"}\n', b'{"a": {"b": 1}}\n'):
        with pytest.raises(Broken):
            readers.Braces().feed(bad)


def test_text_waits_for_the_rest_of_a_character() -> None:
    parser = readers.Text()
    assert [parser.feed(bytes([byte])) for byte in "é!".encode()] == [[], ["é"], ["!"]]


@asynccontextmanager
async def replying(raw: bytes, with_rst: bool = False) -> AsyncIterator[str]:
    """The URL of a server that answers anything with these bytes and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        await writer.drain()
        if with_rst:
            rst(writer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/"


@pytest.mark.parametrize(
    ("raw", "with_rst", "found", "ended"),
    [
        (b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n", False, b"abc", "end"),
        (b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n", False, b"abc", "cut"),
        (b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n", True, b"ab", "cut"),
        (b"Content-Length: 3\r\n\r\nabc", False, b"abc", "end"),
        (b"Content-Length: 4\r\n\r\nabc", False, b"abc", "cut"),
        (b"\r\nabc", False, b"abc", "end"),
        (b"\r\nabc", True, b"abc", "cut"),
    ],
)
async def test_an_answer_says_how_it_ended(
    raw: bytes, with_rst: bool, found: bytes, ended: str
) -> None:
    async with (
        replying(b"HTTP/1.1 200 OK\r\n" + raw, with_rst) as url,
        ask("GET", url) as response,
    ):
        assert await response.body() == found
        assert response.ended == ended


@pytest.mark.parametrize("raw", [b"zz\r\n", b"1\r\nabc\r\n", b"0\r\ndata: x\r\n\r\n"])
async def test_broken_chunks(raw: bytes) -> None:
    """No size, more bytes than said, something after the last chunk; chunks to HTTP/1.0."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with replying(head + raw) as url, ask("GET", url) as response:
        with pytest.raises(Broken):
            await response.body()
    async with replying(head + b"0\r\n\r\n") as url, ask("GET", url, http="1.0") as response:
        with pytest.raises(Broken):
            await response.body()


@pytest.mark.parametrize("rst", [False, True])
async def test_a_reader_cuts_after_so_many_bytes(upstream: UpstreamProcess, rst: bool) -> None:
    """It gets exactly so many, and the other side sees it go."""
    async with ask_model(upstream.url, "up:tokens=20") as response:
        whole = await response.body()
    for after in (0, 1, 1000, len(whole) - 100):
        model = f"up:id=cuts-{rst}-{after},tokens=20,rate=2000,stall_end"
        async with ask_model(upstream.url, model) as response:
            got = [piece async for piece in response.pieces(cut_after=after, rst=rst)]
        assert b"".join(got) == whole[:after]
        assert response.ended == "cut"
        (entry,) = await upstream.requests(model, closed=True)
        assert entry["closed_by"] == "client"
