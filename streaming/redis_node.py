"""One Redis: calls that go out together, channels that are heard, and whether both work.

All calls of one turn of the loop go in one pipeline, one pipeline after the other, so their order
is kept. What is heard comes over one connection of its own. redis-py reconnects neither: it would
repeat a call without a word, and not tell of the messages that passed meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import cached_property
from typing import Any, Protocol
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import MovedError, NoScriptError, RedisError

from streaming.errors import Unavailable

logger = logging.getLogger("rivulet.redis")

PATIENCE = 2.0  # seconds for Redis to answer
PROBE = 1.0  # seconds between two words to ourselves
DEAF = 4.0  # seconds without hearing one
BACKOFF = 0.1, 1.0  # seconds before the first attempt to come back, and the longest
LOST: tuple[type[Exception], ...] = (RedisError, OSError, asyncio.TimeoutError)

Handler = Callable[[bytes], None]


class Script:
    """A Lua script, which Redis runs as one step."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()

    @cached_property
    def sharded(self) -> Script:
        """The same for a cluster, where what it publishes stays with the node that runs it."""
        return Script(self.source.replace("'PUBLISH'", "'SPUBLISH'"))


class Tasks:
    """Tasks that are held on to until they are done, or all are ended."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Starts one."""
        task = asyncio.create_task(coroutine)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def end(self, patience: float = 0) -> None:
        """Cancels them, those that are not done within so many seconds, and waits for that."""
        if self._running and patience:
            await asyncio.wait(self._running, timeout=patience)
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def failed(answer: asyncio.Future[Any]) -> bool:
    """Whether there is none, or an error, which counts as seen: nobody may be waiting for it."""
    return answer.cancelled() or answer.exception() is not None


def unavailable(message: str = "Redis cannot be reached") -> Unavailable:
    """The bridge does not work now."""
    return Unavailable(message, code="bridge_unavailable", retry_after=1)


class Call:
    """A command, or a script with its arguments, and its answer. key: is where it is to be run.
    asking: it is a key that is on its way to the node asked. until: as long it may be sent on.
    """

    __slots__ = ("answer", "arguments", "asking", "key", "script", "until")

    def __init__(self, key: str, script: Script | None, arguments: Sequence[Any]) -> None:
        self.key = key
        self.script = script
        self.arguments = arguments
        self.asking = False
        self.until = time.monotonic() + 2 * PATIENCE
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.answer.add_done_callback(failed)

    def command(self, whole: bool, sharded: bool) -> Sequence[Any]:
        if self.script is None:
            return self.arguments
        script = self.script.sharded if sharded else self.script
        if whole:
            return ("EVAL", script.source, *self.arguments)
        return ("EVALSHA", script.sha, *self.arguments)


class Channel:
    """What is heard on one channel. ours: nobody else publishes there, so in a cluster it need not
    go to every node. node: where it is heard.
    """

    __slots__ = ("confirmed", "handler", "missed", "name", "node", "ours")

    def __init__(self, name: str, handler: Handler, ours: bool) -> None:
        self.name = name
        self.handler = handler
        self.ours = ours
        self.node: Node | None = None
        self.missed = False  # it was heard once, and is not now
        self.confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def hear(self, message: bytes) -> None:
        """Passes it on."""
        try:
            self.handler(message)
        except Exception:  # one message of many: the others are to be heard
            logger.exception("message broke", extra={"channel": self.name})

    def confirm(self, node: Node) -> None:
        """This node hears it from now on; where something may have passed before, that is said."""
        if self.node is not node:
            return
        if not self.confirmed.done():
            self.confirmed.set_result(None)
        if self.missed:
            self.missed = False
            self.hear(b"")

    def lose(self) -> None:
        """It is not heard any more."""
        if self.confirmed.done():
            self.missed = True
            self.confirmed = asyncio.get_running_loop().create_future()


class Owner(Protocol):
    """Whose nodes these are. sharded: they are of a cluster."""

    sharded: bool

    def came(self) -> None:
        """A node is heard again, or at first."""

    def redirects(self, node: Node, error: RedisError, call: Call | None = None) -> bool:
        """Sees to what this node has refused, where it is another's; whether that is so."""

    def misplaced(self) -> None:
        """A node does not have a channel any more."""


class Node:
    """One instance's connections to one Redis. url: see `connect`. probe: a channel on which this
    instance speaks to itself. up: it is heard.
    """

    def __init__(self, url: str, probe: str, owner: Owner) -> None:
        self.url = url
        self.up = False
        self._redis = connect(url)
        self._probe = probe
        self._owner = owner
        self._calls: list[Call] = []
        self._sending: asyncio.Task[None] | None = None
        self._channels: dict[str, Channel] = {}
        self._wanted: list[Channel] = []  # to be subscribed to in this turn
        self._missing: set[str] = set()  # not confirmed since the connection stands
        self._fresh: list[Channel] = []  # confirmed, which is told once all of them are
        self._left: set[str] = set()  # sharded channels whose end we have asked for
        self._pubsub: PubSub | None = None
        self._heard = 0.0  # when the last probe was
        self._tasks = Tasks()

    def start(self) -> None:
        """Begins to listen."""
        self._tasks.start(self._listen())
        self._tasks.start(self._tend())

    async def close(self) -> None:
        """Ends all connections, once what is to be sent has been."""
        await self._tasks.end()
        if self._sending is not None:
            await asyncio.wait([self._sending], timeout=PATIENCE)
        await self._redis.aclose()

    # --- what is called

    def put(self, call: Call) -> None:
        """Sends it with the others of this turn."""
        self._calls.append(call)
        if self._sending is None:
            self._sending = asyncio.create_task(self._send())

    async def _send(self) -> None:
        try:
            while self._calls:
                calls, self._calls = self._calls, []
                await self._run(calls)
        finally:
            self._sending = None

    async def _run(self, calls: list[Call]) -> None:
        """Sends them, and where Redis did not answer once more: each works only once."""
        for attempt in range(2):
            try:
                answers = await self._pipeline(calls, False)
                again = [i for i, a in enumerate(answers) if isinstance(a, NoScriptError)]
                if again:
                    known = await self._pipeline([calls[i] for i in again], True)
                    for i, answer in zip(again, known, strict=True):
                        answers[i] = answer
            except LOST as error:
                if attempt == 0:
                    continue
                logger.warning("Redis did not answer", extra={"error": str(error)})
                answers = [unavailable("Redis did not answer: it may be done, or not")] * len(calls)
            break
        for call, answer in zip(calls, answers, strict=True):
            if call.answer.done():
                continue
            if isinstance(answer, RedisError):
                if self._owner.redirects(self, answer, call):
                    continue
                logger.warning("Redis refused", extra={"error": str(answer)})
                answer = unavailable("Redis refuses to take more")
            if isinstance(answer, Exception):
                call.answer.set_exception(answer)
            else:
                call.answer.set_result(answer)

    async def _pipeline(self, calls: list[Call], whole: bool) -> list[Any]:
        pipe = self._redis.pipeline(transaction=False)
        theirs = []  # the place of each call's answer
        for call in calls:
            if call.asking:
                pipe.execute_command("ASKING")
            theirs.append(len(pipe))
            pipe.execute_command(*call.command(whole, self._owner.sharded))
        answers = await pipe.execute(raise_on_error=False)
        return [answers[place] for place in theirs]

    # --- what is heard

    def add(self, channel: Channel) -> None:
        """Hears it, after each outage too."""
        self._channels[channel.name] = channel
        if self._pubsub is not None:
            if not self._wanted:
                asyncio.get_running_loop().call_soon(self._ask)
            self._wanted.append(channel)

    def drop(self, channel: Channel) -> None:
        """Hears no more of it."""
        self._channels.pop(channel.name, None)
        self._missing.discard(channel.name)
        if channel in self._wanted:
            self._wanted.remove(channel)
        elif self._pubsub is not None:
            if verb := self._sharded(channel):
                self._left.add(channel.name)
            self._tasks.start(self._say(self._pubsub, [(f"{verb}UNSUBSCRIBE", channel.name)]))

    def _sharded(self, channel: Channel) -> str:
        return "S" if self._owner.sharded and channel.ours else ""

    def _ask(self) -> None:
        wanted, self._wanted = self._wanted, []
        if self._pubsub is not None and wanted:
            self._tasks.start(self._say(self._pubsub, self._subscriptions(wanted)))

    def _subscriptions(self, channels: Iterable[Channel]) -> list[Sequence[str]]:
        """Sharded ones each by itself: those of one command must be of one slot."""
        plain = [channel.name for channel in channels if not self._sharded(channel)]
        sharded = [("SSUBSCRIBE", channel.name) for channel in channels if self._sharded(channel)]
        return [("SUBSCRIBE", *plain), *sharded] if plain else [*sharded]

    async def _say(self, pubsub: PubSub, commands: list[Sequence[str]]) -> None:
        with contextlib.suppress(*LOST):  # the listener hears of it too
            for command in commands:
                await pubsub.execute_command(*command)

    async def _listen(self) -> None:
        wait = BACKOFF[0]
        while True:
            pubsub = self._redis.pubsub()
            try:
                with contextlib.suppress(MovedError):
                    # One that has just started may load its data, or wait for its cluster.
                    await self._redis.exists(self._probe)
                # Not by `subscribe`: redis-py would subscribe anew by itself.
                await pubsub.execute_command("SUBSCRIBE", self._probe)
                begun = time.monotonic()
                self._pubsub, self._missing = pubsub, {self._probe, *self._channels}
                await self._say(pubsub, self._subscriptions(list(self._channels.values())))
                while True:
                    try:
                        message = await pubsub.get_message(timeout=DEAF)
                    except MovedError as error:  # a channel is another's now
                        self._owner.redirects(self, error)
                    else:
                        # Others may be heard, and these were never confirmed.
                        late = self._missing and time.monotonic() - begun > DEAF
                        if message is None or late:
                            break
                        self._take(message["type"], message["channel"].decode(), message["data"])
                    if not self._missing and not self.up:
                        self.up, self._heard, wait = True, time.monotonic(), BACKOFF[0]
                        logger.info("Redis is heard")
                        self._owner.came()
                    while self.up and self._fresh:
                        self._fresh.pop().confirm(self)
            except LOST as error:
                if wait == BACKOFF[0]:  # the first time
                    logger.warning("Redis is away", extra={"error": str(error)})
            finally:
                self._pubsub, self.up = None, False
                self._left.clear()
                self._fresh.clear()
                for channel in self._channels.values():
                    channel.lose()
                with contextlib.suppress(*LOST):
                    await pubsub.aclose()  # type: ignore[no-untyped-call]  # redis-py's
            await asyncio.sleep(wait)
            wait = min(wait * 2, BACKOFF[1])

    def _take(self, kind: str, name: str, message: bytes) -> None:
        channel = self._channels.get(name)
        if name == self._probe:
            self._heard = time.monotonic()
        elif channel is not None and kind in ("message", "smessage"):
            channel.hear(message)
        elif channel is not None and kind in ("subscribe", "ssubscribe"):
            self._fresh.append(channel)
        elif kind == "sunsubscribe" and name in self._left:
            self._left.discard(name)
        elif channel is not None and kind == "sunsubscribe":  # its slot has been moved
            del self._channels[name]
            channel.node = None
            channel.lose()
            self._owner.misplaced()
        if kind in ("subscribe", "ssubscribe"):
            self._missing.discard(name)

    async def _tend(self) -> None:
        """A subscriber can be deaf with its connection in order: what counts is that it hears."""
        while True:
            await asyncio.sleep(PROBE)
            if self.up:
                self.put(Call("", None, ("PUBLISH", self._probe, b"")))
            late = self.up and time.monotonic() - self._heard > DEAF
            if late and self._pubsub is not None and self._pubsub.connection is not None:
                logger.warning("Redis is not heard any more: connecting anew")
                self.up = False
                await self._pubsub.connection.disconnect(nowait=True)


def connect(url: str) -> Redis:
    """A client of the Redis at this address (`redis://`, `rediss://`, `unix://`, or
    `redis+sentinel://host:port,host:port/name`), which tries nothing twice. Raises ValueError.
    """
    options: dict[str, Any] = {
        "socket_timeout": PATIENCE,
        "socket_connect_timeout": PATIENCE,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,
    }
    parts = urlsplit(url)
    if parts.scheme in ("redis+sentinel", "rediss+sentinel"):
        login, at, hosts = parts.netloc.rpartition("@")
        name, _, db = parts.path.strip("/").partition("/")
        pairs = [host.rpartition(":") for host in hosts.split(",")]
        sentinels = [(host, int(port)) for host, _, port in pairs]
        # All but the hosts is read as in any other address.
        plain = parts._replace(scheme="redis", netloc=login + at, path=f"/{db}").geturl()
        if parts.scheme == "rediss+sentinel":
            options["ssl"] = True
        asked = {"socket_timeout": PATIENCE}
        # The ignored error: redis-py gives its Sentinel no types.
        sentinel: Any = Sentinel(sentinels, sentinel_kwargs=asked)  # type: ignore[no-untyped-call]
        client: Redis = sentinel.master_for(name, **{**options, **parse_url(plain)})
        return client
    return Redis.from_url(url, **options)
