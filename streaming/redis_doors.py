"""Tickets and limits that instances share: see tickets.Store and limits.Shared.

A user's count is a hash, a field for each instance that has some. A field counts as long as its
instance's lease lasts, so what a crashed instance had is given back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from urllib.parse import quote

from streaming.limits import WINDOW
from streaming.redis_link import Link
from streaming.redis_node import failed
from streaming.redis_scripts import HIT, SWAP

KEPT = 3600.0  # seconds that Redis has a count without hearing of it


class RedisStore:
    """Tickets in Redis, for a time each."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def _key(self, name: str) -> str:
        return f"{self._link.prefix}ticket:{{{name}}}"

    async def get(self, name: str) -> bytes | None:
        """See Store.get."""
        value: bytes | None = await self._link.command("GET", self._key(name))
        return value

    async def put(
        self, name: str, value: bytes, seconds: float, before: bytes | None = None
    ) -> bool:
        """See Store.put."""
        milliseconds = int(seconds * 1000)
        if before is None:
            await self._link.command("SET", self._key(name), value, "PX", milliseconds)
            return True
        swapped = await self._link.call(SWAP, [self._key(name)], before, value, milliseconds)
        return bool(swapped)

    def extend(self, names: Iterable[str], seconds: float) -> None:
        """See Store.extend."""
        for name in names:
            self._link.command("PEXPIRE", self._key(name), int(seconds * 1000))


class RedisCounts:
    """Counts in Redis."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._here: dict[tuple[str, str], int] = {}
        self._unsaid: set[tuple[str, str]] = set()  # of what is at none, which Redis does not know
        self._said = time.monotonic()

    def _key(self, what: str, kind: str, user: str) -> str:
        return f"{self._link.prefix}{what}:{{{kind}:{quote(user, safe='')}}}"

    async def hit(self, kind: str, user: str) -> tuple[int, float]:
        """See Shared.hit. A call that Redis did not answer may count twice."""
        key, milliseconds = self._key("rate", kind, user), int(WINDOW * 1000)
        count, left = await self._link.call(HIT, [key], milliseconds)
        return int(count), left / 1000

    async def elsewhere(self, kind: str, user: str) -> int:
        """See Shared.elsewhere."""
        key = self._key("count", kind, user)
        said = await self._link.command("HGETALL", key)
        pairs = said.items() if isinstance(said, dict) else zip(said[::2], said[1::2], strict=True)
        counts = {name.decode(): int(n) for name, n in pairs if name.decode() != self._link.me}
        leases = map(self._link.instance, counts)
        alive = await asyncio.gather(*(self._link.command("EXISTS", lease) for lease in leases))
        there = dict(zip(counts, alive, strict=True))
        if gone := [name for name in counts if not there[name]]:
            self._link.command("HDEL", key, *gone)
        return sum(count for name, count in counts.items() if there[name])

    def tell(self, kind: str, user: str, count: int) -> None:
        """See Shared.tell. Said again where it may not have come through."""
        if count:
            self._here[kind, user] = count
        else:
            self._here.pop((kind, user), None)
        self._say(kind, user)

    def _say(self, kind: str, user: str) -> None:
        def said(answer: asyncio.Future[object]) -> None:
            if failed(answer):
                self._unsaid.add((kind, user))

        count, me = self._here.get((kind, user), 0), self._link.me
        key = self._key("count", kind, user)
        if count:
            self._link.command("HSET", key, me, count).add_done_callback(said)
            self._link.command("PEXPIRE", key, int(KEPT * 1000))
        else:
            self._link.command("HDEL", key, me).add_done_callback(said)

    def restored(self) -> None:
        """Says everything again: Redis, or who took this instance for lost, may have dropped it."""
        self._said = time.monotonic()
        self._unsaid |= self._here.keys()
        self.tend()

    def tend(self) -> None:
        """From time to time: says again what was not heard, and all before Redis forgets it."""
        if time.monotonic() - self._said > KEPT / 3:
            self.restored()
        unsaid, self._unsaid = self._unsaid, set()
        for kind, user in unsaid:
            self._say(kind, user)
