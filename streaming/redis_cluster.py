"""A link to a Redis Cluster: each key is at the node that has its slot, and slots move.

Which node that is is asked of any of them, as soon as one says that a slot is not its own, takes a
channel away, or is not heard. A call is sent on to where it belongs; a channel is subscribed to
there, and whoever hears it is told that something may have passed meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import Any
from urllib.parse import urlsplit

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    RedisError,
    TryAgainError,
)

from streaming.redis_link import Link
from streaming.redis_node import LOST, Call, Node, Tasks, connect, logger

EVERY = 1.0  # seconds between two looks while a node is away
PAUSE = 0.1  # seconds between two looks at any rate
AGAIN = 0.05  # seconds until a key may have moved


class Cluster(Link):
    """As Link. url: `redis+cluster://host:port,host:port`, of some of its nodes."""

    sharded = True

    def _begin(self, url: str) -> None:
        self._parts = urlsplit(url)
        self._login, at, hosts = self._parts.netloc.rpartition("@")
        self._login += at
        self._seeds = [self._url(host) for host in hosts.split(",")]
        self._slots: list[Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._owners: set[Node | None] = {None}  # of slots
        self._stale = asyncio.Event()  # the slots are to be asked for
        self._tasks = Tasks()
        for seed in self._seeds:
            connect(seed)  # raises ValueError for what is no address

    def _url(self, address: str) -> str:
        scheme = self._parts.scheme.removesuffix("+cluster")
        return self._parts._replace(scheme=scheme, netloc=self._login + address).geturl()

    @property
    def up(self) -> bool:
        """Whether all nodes are heard, and have all slots."""
        return all(node is not None and node.up for node in self._owners)

    def _at(self, key: str) -> Node | None:
        return self._slots[key_slot(key.encode())]

    async def start(self) -> None:
        """See Link.start."""
        self._tasks.start(self._tend())
        await super().start()

    async def close(self) -> None:
        """See Link.close."""
        await self._tasks.end()
        await super().close()

    # --- who has which slots

    async def _tend(self) -> None:
        while True:
            if self._stale.is_set() or not self.up:
                self._stale.clear()
                try:
                    await self._look()
                except Exception:  # what one says may be strange: another is asked later
                    logger.exception("cluster broke")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVERY):
                    await self._stale.wait()
            await asyncio.sleep(PAUSE)

    async def _look(self) -> None:
        """Asks one that is heard, else any. It may not know yet: then another is asked later."""
        heard = {url for url, node in self._nodes.items() if node.up}
        known = {*self._nodes, *self._seeds}
        for url in sorted(known, key=lambda url: (url not in heard, random.random())):
            node = connect(url)
            try:
                # The ignored error: redis-py gives its commands no types.
                told = await node.execute_command("CLUSTER", "SLOTS")  # type: ignore[no-untyped-call]
            except LOST as error:
                if not self._nodes:  # what it is, is not said by any of them
                    logger.warning("Redis is away", extra={"error": str(error)})
                continue
            finally:
                with contextlib.suppress(*LOST):
                    await node.aclose()
            self._learn(url, told)
            return

    def _learn(self, url: str, told: Any) -> None:
        slots: list[Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, (host, port, *_), *_ in told:
            node = self._named(url, host.decode() if host else "", port)
            slots[first : last + 1] = [node] * (last + 1 - first)
        self._slots, self._owners = slots, set(slots)
        self._arrange()
        for node in set(self._nodes.values()) - self._owners:
            del self._nodes[node.url]
            self._tasks.start(node.close())

    def _arrange(self) -> None:
        for channel in self._channels.values():
            self._place(channel)

    def _named(self, url: str, host: str, port: int) -> Node:
        """The node at this address. url: of the one that names it: without a host it is there."""
        host = host or urlsplit(url).hostname or ""
        url = self._url(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        node = self._nodes.get(url)
        if node is None:
            node = self._nodes[url] = Node(url, self._probe, self)
            node.start()
        return node

    # --- what its nodes say

    def redirects(self, node: Node, error: RedisError, call: Call | None = None) -> bool:
        """See redis_node.Owner. Sent on, a call comes after those that are there already."""
        if isinstance(error, (MovedError, ClusterDownError)):
            self._stale.set()
        if isinstance(error, MovedError):
            owner = self._named(node.url, error.host, error.port)
            if self._slots[error.slot_id] is not owner:
                self._slots[error.slot_id] = owner
                self._owners.add(owner)
                self._arrange()
        if call is None or time.monotonic() > call.until:
            return False
        call.asking = isinstance(error, AskError) and not isinstance(error, MovedError)
        if isinstance(error, AskError):
            self._named(node.url, error.host, error.port).put(call)
        elif isinstance(error, TryAgainError):  # some of its keys are here, some there
            asyncio.get_running_loop().call_later(AGAIN, node.put, call)
        else:
            return False
        return True

    def misplaced(self) -> None:
        """See redis_node.Owner."""
        self._stale.set()
