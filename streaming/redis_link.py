"""The link to Redis: what is called and what is heard, at the node that has it.

Here that is one Redis; `redis_cluster.py` knows many.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from redis.exceptions import RedisError

from streaming.events import new_epoch
from streaming.redis_node import (
    PATIENCE,
    Call,
    Channel,
    Handler,
    Node,
    Script,
    failed,
    unavailable,
)


class Link:
    """One instance's link to Redis.

    url: see `redis_node.connect`. prefix: of all keys and channels. restored: called when Redis is
    heard again after an outage, and at first. told: with what this instance is told, by its name
    `me`.
    """

    sharded = False

    def __init__(self, url: str, prefix: str, restored: Callable[[], None], told: Handler) -> None:
        self.me = new_epoch()[:16]
        self.prefix = prefix
        self._restored = restored
        self._told = told
        self._probe = f"{self.instance(self.me)}:probe"
        self._nodes: dict[str, Node] = {}  # by URL
        self._channels: dict[str, Channel] = {}
        self._first = asyncio.Event()  # it has been up
        self._begin(url)

    def _begin(self, url: str) -> None:
        self._node = self._nodes[url] = Node(url, self._probe, self)

    def instance(self, name: str) -> str:
        """The channel of an instance, and the key of its lease. In a cluster all are on one node,
        so that who cannot renew its own does not take others for gone.
        """
        return f"{self.prefix}{{instance}}:{name}"

    @property
    def up(self) -> bool:
        """Whether Redis is heard, all of it."""
        return self._node.up

    def reaches(self, key: str) -> bool:
        """Whether the Redis that has this key is heard."""
        node = self._at(key)
        return node is not None and node.up

    def _at(self, key: str) -> Node | None:
        """The node that has this key or channel, if that is known."""
        return self._node

    async def start(self) -> None:
        """Begins; returns when it is up, or after PATIENCE all the same."""
        self._hear(self.instance(self.me), self._told, True)
        for node in self._nodes.values():
            node.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                await self._first.wait()

    async def close(self) -> None:
        """Ends all connections."""
        await asyncio.gather(*(node.close() for node in self._nodes.values()))

    # --- what its nodes say: see redis_node.Owner

    def came(self) -> None:
        if self.up:
            self._first.set()
        self._restored()

    def redirects(self, node: Node, error: RedisError, call: Call | None = None) -> bool:
        return False

    def misplaced(self) -> None:
        pass

    # --- what is called: where that is not possible, its answer raises Unavailable

    def call(self, script: Script, keys: Sequence[str], *arguments: Any) -> asyncio.Future[Any]:
        """Runs a script; its answer. Cancelling the wait changes nothing. Where it raises
        Unavailable it may have run, or not, so a script that is called again must know.
        """
        return self._put(Call(keys[0], script, (len(keys), *keys, *arguments)))

    def command(self, name: str, key: str, *arguments: Any) -> asyncio.Future[Any]:
        """As `call`, a command."""
        return self._put(Call(key, None, (name, key, *arguments)))

    def say(self, channel: str, message: bytes) -> None:
        """Publishes a message on a channel of ours, if it can be done now."""
        self.command("SPUBLISH" if self.sharded else "PUBLISH", channel, message)

    async def publish(self, channel: str, message: bytes) -> int:
        """Publishes a message; how many instances hear it. Raises Unavailable."""
        return int(await self.command("PUBLISH", channel, message))

    def _put(self, call: Call) -> asyncio.Future[Any]:
        node = self._at(call.key)
        if node is not None and node.up:
            node.put(call)
        else:
            call.answer.set_exception(unavailable())
        answer = asyncio.shield(call.answer)
        answer.add_done_callback(failed)
        return answer

    # --- what is heard

    async def subscribe(self, channel: str, handler: Handler, ours: bool = False) -> None:
        """Calls `handler` with each message from when this returns, for as long as the link lives:
        it is subscribed anew after each outage, and then `handler` gets b"", because something may
        have passed meanwhile. ours: only `say` and scripts publish there. Raises Unavailable.
        """
        known = self._channels.get(channel)
        if known is None:
            known = self._hear(channel, handler, ours)
        known.handler = handler
        try:
            async with asyncio.timeout(PATIENCE):
                await asyncio.shield(known.confirmed)
        except TimeoutError:
            raise unavailable() from None

    def _hear(self, name: str, handler: Handler, ours: bool) -> Channel:
        channel = self._channels[name] = Channel(name, handler, ours)
        self._place(channel)
        return channel

    def _place(self, channel: Channel) -> None:
        """Hears it at the node that has it."""
        node = self._at(channel.name)
        if node is channel.node:
            return
        if channel.node is not None:
            channel.node.drop(channel)
            channel.lose()
        channel.node = node
        if node is not None:
            node.add(channel)

    def unsubscribe(self, channel: str) -> None:
        """Hears no more of it."""
        known = self._channels.pop(channel, None)
        if known is not None and known.node is not None:
            known.node.drop(known)
