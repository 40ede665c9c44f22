"""The bridge: joins this instance to others through one Redis.

It puts together the link, the rooms and the mirror, and sees to them as long as the server runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import orjson

from streaming import config
from streaming.delivery import Delivery
from streaming.errors import Unavailable
from streaming.generations import Generations
from streaming.redis_cluster import Cluster
from streaming.redis_doors import RedisCounts, RedisStore
from streaming.redis_link import Link
from streaming.redis_mirror import RedisMirror
from streaming.redis_rooms import RedisRooms
from streaming.rooms import Rooms

logger = logging.getLogger("rivulet.redis")


class RedisBridge:
    """One instance's part of the whole. `rooms` is a Keeper, `mirror` a Mirror, `tickets` a Store,
    `counts` a Shared; `join` gives the first two what they keep, before `start`.
    """

    def __init__(self, cfg: config.Config, delivery: Delivery) -> None:
        self._lease = cfg.redis.lease
        kind = Cluster if "+cluster://" in cfg.redis.url else Link
        self.link = kind(cfg.redis.url, cfg.redis.prefix, self._restored, self._told)
        self.rooms = RedisRooms(self.link, cfg.rooms, delivery)
        self.mirror = RedisMirror(self.link, cfg.generation, self._lease)
        self.tickets = RedisStore(self.link)
        self.counts = RedisCounts(self.link)
        self._due = asyncio.Event()
        self._tending: asyncio.Task[None]

    @property
    def ready(self) -> bool:
        """Whether Redis is heard, and takes what it is told: its memory may be full."""
        return self.link.up and time.monotonic() - self.mirror.renewed < self._lease / 2

    def join(self, rooms: Rooms, generations: Generations) -> None:
        """What the bridge keeps."""
        self.rooms.rooms, self.rooms.mirror = rooms, self.mirror
        self.mirror.rooms = self.mirror.replicas.rooms = self.rooms
        self.mirror.generations = generations

    async def start(self) -> None:
        """Connects; returns when it has, or could not for a moment: it goes on trying."""
        await asyncio.gather(self.link.start(), self.rooms.listing.start())
        with contextlib.suppress(Unavailable):
            await self.mirror.tend()
        self._tending = asyncio.create_task(self._tend())

    async def close(self) -> None:
        """Says what is still to be said, and ends."""
        self._tending.cancel()
        await self.mirror.finish()
        await self.rooms.close()
        await self.mirror.close()
        await self.link.close()

    def _restored(self) -> None:
        self._due.set()
        self.rooms.restored()
        self.mirror.restored()
        self.counts.restored()

    def _told(self, message: bytes) -> None:
        if not message:
            return
        word = orjson.loads(message)
        if "listed" in word:
            self.rooms.listing.told(word)
        else:
            self.mirror.heard(word)

    async def _tend(self) -> None:
        while True:
            before = self.mirror.renewed
            try:
                await self.mirror.tend()
                if self.mirror.renewed - before > self._lease:
                    self.counts.restored()  # others may have taken this instance for lost
                self.counts.tend()
                self.rooms.tend()
                self.rooms.rooms.sweep()
            except Unavailable:
                pass  # the link says so
            except Exception:
                logger.exception("bridge broke")
            try:
                async with asyncio.timeout(self._lease / 5):
                    await self._due.wait()
            except TimeoutError:
                pass
            self._due.clear()
