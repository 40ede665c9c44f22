"""Readers that stall, and readers that are only slow, beside others.

The answers here are the prompt itself, so that they are as large as a test needs them.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from tests.clients import MEDIA, Kind, asked, attached, named, once, see, status, text_of
from tests.conftest import SOAK
from tests.processes import Server, UpstreamProcess, until
from tests.readers import Answer, Connection, Message, Sse, connect

CHAT, TEXT = Kind("chat"), Kind("content", "text")
WRITE_TIMEOUT = 3.0
HIGH_WATER = 64 * 1024
READ = 256 * 1024  # what the server takes from a log at once for a reader that catches up
MB = 2**20


@pytest.fixture(scope="module")
def impatient(
    tmp_path_factory: pytest.TempPathFactory, upstream: UpstreamProcess
) -> Iterator[Server]:
    """A server that waits for a stalled reader for a short time, and takes long prompts."""
    config = {
        "model": {"name": "up:", "base_url": upstream.base},
        "delivery": {"write_timeout": WRITE_TIMEOUT, "high_water": HIGH_WATER},
        "limits": {"prompt_chars": 16 * MB, "body_bytes": 64 * MB},
        "generation": {"max_bytes": 16 * MB},
    }
    process = Server(tmp_path_factory.mktemp("impatient"), config)
    yield process
    process.stop()


def prompt_of(size: int) -> str:
    """So many characters, of which no part looks like another."""
    return "".join(f"{i:07} " for i in range(size // 8))


@asynccontextmanager
async def answering(server: Server, prompt: str, words: str) -> AsyncIterator[str]:
    """The stream id of an answer that says the prompt; somebody reads it all the time."""
    async with asked(server.url, CHAT, named(words), message=prompt) as answer:
        reading = asyncio.ensure_future(answer.body())
        try:
            yield answer.headers["x-stream-id"]
        finally:
            reading.cancel()


async def attach_slowly(connection: Connection, stream_id: str) -> Answer:
    return await connection.request("GET", f"/api/v1/streams/{stream_id}/events?dialect=chat")


def text_in(messages: list[Message]) -> str:
    return "".join(text_of(CHAT, message.json()) for message in messages)


async def resumed(server: Server, stream_id: str, last_event_id: str) -> str:
    """The text after this position."""
    async with attached(
        server.url, stream_id, CHAT, headers={"Last-Event-ID": last_event_id}
    ) as answer:
        return (await see(CHAT, answer)).text


# --- one that never reads -----------------------------------------------------------------------


async def gaps_of(server: Server, stream_id: str, wanted: bytes) -> list[float]:
    """Reads an answer as text to its end; the times between its pieces."""
    gaps, body, last = [], bytearray(), time.monotonic()
    async with attached(server.url, stream_id, TEXT) as answer:
        async for piece in answer.pieces():
            now = time.monotonic()
            gaps.append(now - last)
            last = now
            body += piece
    assert body == wanted
    return gaps


async def crowd(server: Server, prompt: str, stalled: bool) -> list[float]:
    """The gaps of a hundred readers of one answer, sorted; perhaps beside one that never reads,
    which must be cut and resume exactly.
    """
    async with answering(server, prompt, "echo=1000,rate=200") as stream_id:
        reading = [gaps_of(server, stream_id, prompt.encode()) for _ in range(100)]
        if not stalled:
            return sorted(itertools.chain(*await asyncio.gather(*reading)))
        async with connect(server.url, receive_buffer=2048) as connection:
            answer = await attach_slowly(connection, stream_id)
            gaps = sorted(itertools.chain(*await asyncio.gather(*reading)))
            path = f"/api/v1/streams/{stream_id}/events"
            # All others have been served; the one line that is still missing is its own.
            await until(lambda: lines_of(server, path) == 101)
            parser = Sse()
            messages = await answer.read(parser)
        assert answer.ended == "cut"
        rest = await resumed(server, stream_id, parser.last_event_id)
        assert text_in(messages) + rest == prompt
        assert len(rest) > len(prompt) / 2
        return gaps


def lines_of(server: Server, path: str) -> int:
    """How many requests to this path are over."""
    return sum(line["path"] == path for line in server.log_lines("request"))


async def test_a_stalled_reader_adds_nothing_to_the_others(impatient: Server) -> None:
    """Beside one that never reads, a hundred readers have the same gaps as without it. It is cut
    after `write_timeout`, and what it has and what it resumes make the exact text.
    """
    prompt = prompt_of(500_000)
    without = await crowd(impatient, prompt, stalled=False)
    beside = await crowd(impatient, prompt, stalled=True)
    for share in (0.5, 0.99):
        was, now = (gaps[int(share * len(gaps))] for gaps in (without, beside))
        assert now < 3 * was + 0.05, f"gap at {share}: {was:.3f} s without, {now:.3f} s beside"


async def test_stalled_readers_hold_little_memory(impatient: Server) -> None:
    """Fifty that never read a large answer: each costs the server at most its high-water mark and
    one read of the log, however much there is to come.
    """
    count, prompt = 200 if SOAK else 50, prompt_of(4 * MB)
    peaks = []
    for stalled in (0, count):
        async with answering(impatient, prompt, "echo=10000,rate=200") as stream_id:
            connections = [Connection(impatient.url) for _ in range(stalled)]
            for connection in connections:
                await connection.open(receive_buffer=2048)
                await attach_slowly(connection, stream_id)
            peak = 0
            while (await status(impatient.url, stream_id))["state"] == "running":
                peak = max(peak, impatient.rss())
                await asyncio.sleep(0.02)
            peaks.append(max(peak, impatient.rss()))
            for connection in connections:
                connection.cut(rst=True)
    assert peaks[1] - peaks[0] < count * (HIGH_WATER + READ) + 16 * MB


async def test_stalled_readers_of_every_kind_are_cut(impatient: Server) -> None:
    """Far from the end of an answer, and with only its end unread: after `write_timeout` the socket
    is given back, and what the reader has never looks whole, on HTTP/1.0 neither.
    """
    kinds = [Kind("content", framing, http) for framing in MEDIA for http in ("1.0", "1.1")]
    large, small = prompt_of(MB), prompt_of(90_000)
    async with (
        answering(impatient, large, "echo=5000") as one,
        answering(impatient, small, "echo=5000") as other,
    ):
        for stream_id in (one, other):
            await once(impatient.url, stream_id, "state", "finished")
        answers = []
        for kind, stream_id in itertools.product(kinds, (one, other)):
            connection = Connection(impatient.url, kind.http)
            await connection.open(receive_buffer=2048)
            query = f"dialect=content&format={kind.framing}"
            path = f"/api/v1/streams/{stream_id}/events"
            answers.append(await connection.request("GET", f"{path}?{query}"))
        paths = [f"/api/v1/streams/{stream_id}/events" for stream_id in (one, other)]
        await until(lambda: sum(lines_of(impatient, path) for path in paths) == len(answers))
        for answer in answers:
            assert len(await answer.body()) < len(small)
            assert answer.ended == "cut"
            answer.connection.cut()


# --- one that is slow ---------------------------------------------------------------------------


async def test_a_slow_reader_is_not_cut(impatient: Server) -> None:
    """One that reads 2 KB/s for several times `write_timeout` is slow, not stalled. It has the
    exact text, in fewer and larger frames than a reader that keeps up.
    """
    prompt, parser = prompt_of(400_000), Sse()
    async with (
        answering(impatient, prompt, "echo=400,rate=150") as stream_id,
        connect(impatient.url, http="1.0", receive_buffer=2048) as connection,
        attached(impatient.url, stream_id, CHAT) as other,
    ):
        fast = asyncio.ensure_future(see(CHAT, other))
        answer = await attach_slowly(connection, stream_id)
        messages: list[Message] = []
        end = time.monotonic() + 3 * WRITE_TIMEOUT
        async for piece in answer.pieces():
            messages += parser.feed(piece)
            if time.monotonic() < end:
                await asyncio.sleep(len(piece) / 2048)
        assert answer.ended == "end"
        frames = (await fast).items
    assert text_in(messages) == prompt
    assert len(messages) < len(frames) / 2
    assert max(len(m.data) for m in messages) > 4 * max(len(m["content"]) for m in frames)
