"""Floods, each from a process of its own, so that what its victims see is the server's doing.

`python -m tests.flood KIND PORT COUNT AT_ONCE` prints what came of how many of them, as JSON:
a status, `retry` for an event stream that said only when to come back, or `cut`.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable

STREAM = (
    "GET /api/v1/rooms/flooded/events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n"
)
POST = "POST /stream HTTP/1.1\r\nHost: localhost\r\n"
PAUSE = 0.02  # seconds between the bytes of one that is slow

Said = AsyncIterator[bytes]


async def _attempts() -> Said:
    yield f"{STREAM}\r\n".encode()


async def _storm() -> Said:
    yield f"{STREAM}Last-Event-ID: {'x' * 20}-1\r\n\r\n".encode()


async def _slowloris() -> Said:
    for byte in STREAM * 1000:
        yield byte.encode()
        await asyncio.sleep(PAUSE)


async def _endless_head() -> Said:
    yield b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: "
    for _ in range(1000):
        yield b"x" * 10_000


async def _headers() -> Said:
    fields = "".join(f"X-Field-{n}: {n}\r\n" for n in range(1000))
    yield f"GET /health HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n".encode()


async def _slow_body() -> Said:
    yield f"{POST}Content-Length: 100000\r\n\r\n".encode()
    for _ in range(100_000):
        yield b"x"
        await asyncio.sleep(PAUSE)


async def _endless_body() -> Said:
    yield f"{POST}Transfer-Encoding: chunked\r\n\r\n".encode()
    for _ in range(2000):
        yield b"10000\r\n" + b"x" * 65536 + b"\r\n"


KINDS: dict[str, Callable[[], Said]] = {
    "attempts": _attempts,
    "storm": _storm,
    "slowloris": _slowloris,
    "endless head": _endless_head,
    "headers": _headers,
    "slow body": _slow_body,
    "endless body": _endless_body,
}


async def _say(writer: asyncio.StreamWriter, said: Said) -> None:
    async for piece in said:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0)  # loopback takes a lot at once: the others have their turn


async def _one(port: int, said: Said, held: list[asyncio.StreamWriter]) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    saying = asyncio.ensure_future(_say(writer, said))
    try:
        top = await reader.readuntil(b"\r\n\r\n")
        status = top.split()[1].decode()
        if b"text/event-stream" in top:
            if b"retry:" in await reader.readuntil(b"\n\n"):
                return "retry"
            held.append(writer)  # it stays until all have tried
        return status
    except (OSError, EOFError):
        return "cut"
    finally:
        saying.cancel()
        if writer not in held:
            writer.transport.abort()


async def flood(kind: str, port: int, count: int, at_once: int) -> Counter[str]:
    """What came of so many."""
    held: list[asyncio.StreamWriter] = []
    places = asyncio.Semaphore(at_once)

    async def one() -> str:
        async with places:
            return await _one(port, KINDS[kind](), held)

    came = Counter(await asyncio.gather(*(one() for _ in range(count))))
    for writer in held:  # not all at once, which would be another flood
        writer.transport.abort()
        await asyncio.sleep(0.001)
    return came


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(json.dumps(asyncio.run(flood(sys.argv[1], *map(int, sys.argv[2:])))), flush=True)
