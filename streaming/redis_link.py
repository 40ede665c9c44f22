"""The link to Redis: calls that go out together, channels that are heard, and whether both work.

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
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

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


def unavailable(message: str = "Redis cannot be reached") -> Unavailable:
    """The bridge does not work now."""
    return Unavailable(message, code="bridge_unavailable", retry_after=1)


class _Call:
    __slots__ = ("answer", "arguments", "script")

    def __init__(self, script: Script | None, arguments: Sequence[Any]) -> None:
        self.script = script
        self.arguments = arguments
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def command(self, whole: bool) -> Sequence[Any]:
        if self.script is None:
            return self.arguments
        if whole:
            return ("EVAL", self.script.source, *self.arguments)
        return ("EVALSHA", self.script.sha, *self.arguments)


class Link:
    """One instance's connections to one Redis.

    url: `redis://`, `rediss://`, `unix://`, or `redis+sentinel://host:port,host:port/name`. own:
    the channel on which this instance is spoken to, and `told` what it is told there. restored:
    called when Redis is heard again after an outage, and at first.
    """

    def __init__(self, url: str, own: str, restored: Callable[[], None], told: Handler) -> None:
        self._redis = connect(url)
        self._own = own
        self._restored = restored
        self._calls: list[_Call] = []
        self._sending: asyncio.Task[None] | None = None
        self._handlers: dict[str, Handler] = {own: told}
        self._confirmed: dict[str, asyncio.Future[None]] = {}
        self._wanted: set[str] = set()  # channels to be subscribed to in this turn
        self._pubsub: PubSub | None = None
        self._heard = 0.0  # when the last probe was
        self.since = 0.0  # up since then, as time.monotonic() has it; 0 while it is not
        self._first = asyncio.Event()  # it has been up
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def up(self) -> bool:
        """Whether Redis is heard."""
        return self.since > 0

    async def start(self) -> None:
        """Begins; returns when it is up, or after PATIENCE all the same."""
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._probe())]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                await self._first.wait()

    async def close(self) -> None:
        """Ends all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._sending is not None:
            await asyncio.wait([self._sending], timeout=PATIENCE)
        await self._redis.aclose()

    def call(self, script: Script, keys: Sequence[str], *arguments: Any) -> asyncio.Future[Any]:
        """Runs a script; its answer. Cancelling the wait changes nothing. Raises Unavailable, at
        once or later: it may have run, or not, so a script that is called again must know.
        """
        return self._put(_Call(script, (len(keys), *keys, *arguments)))

    def command(self, *arguments: Any) -> asyncio.Future[Any]:
        """As `call`, a command."""
        return self._put(_Call(None, arguments))

    def say(self, channel: str, message: bytes) -> None:
        """Publishes a message, if it can be done now."""
        if self.up:
            self.command("PUBLISH", channel, message)

    async def publish(self, channel: str, message: bytes) -> int:
        """Publishes a message; how many instances hear it. Raises Unavailable."""
        return int(await self.command("PUBLISH", channel, message))

    def _put(self, call: _Call) -> asyncio.Future[Any]:
        if not self.up:
            raise unavailable()
        self._calls.append(call)
        if self._sending is None:
            self._sending = asyncio.create_task(self._send())
        answer = asyncio.shield(call.answer)
        for each in (call.answer, answer):
            each.add_done_callback(_looked_at)
        return answer

    async def _send(self) -> None:
        try:
            while self._calls:
                calls, self._calls = self._calls, []
                await self._run(calls)
        finally:
            self._sending = None

    async def _run(self, calls: list[_Call]) -> None:
        """Sends them, and where Redis did not answer once more: each works only once."""
        for attempt in range(2):
            whole = False
            try:
                answers = await self._pipeline(calls, whole)
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
                logger.warning("Redis refused", extra={"error": str(answer)})
                answer = unavailable("Redis refuses to take more")
            if isinstance(answer, Exception):
                call.answer.set_exception(answer)
            else:
                call.answer.set_result(answer)

    async def _pipeline(self, calls: list[_Call], whole: bool) -> list[Any]:
        pipe = self._redis.pipeline(transaction=False)
        for call in calls:
            pipe.execute_command(*call.command(whole))
        return await pipe.execute(raise_on_error=False)

    # --- what is heard

    async def subscribe(self, channel: str, handler: Handler) -> None:
        """Calls `handler` with each message from when this returns, for as long as the link lives:
        it is subscribed anew after each outage. Raises Unavailable.
        """
        self._handlers[channel] = handler
        confirmed = self._confirmed.get(channel)
        if confirmed is None:
            confirmed = self._confirmed[channel] = asyncio.get_running_loop().create_future()
            if self._pubsub is not None:
                if not self._wanted:
                    asyncio.get_running_loop().call_soon(self._ask)
                self._wanted.add(channel)
        try:
            async with asyncio.timeout(PATIENCE):
                await asyncio.shield(confirmed)
        except TimeoutError:
            raise unavailable() from None

    def unsubscribe(self, channel: str) -> None:
        """Hears no more of it."""
        self._handlers.pop(channel, None)
        self._confirmed.pop(channel, None)
        self._wanted.discard(channel)
        if self._pubsub is not None:
            self._tasks_of(self._pubsub.unsubscribe(channel))

    def _ask(self) -> None:
        wanted, self._wanted = self._wanted, set()
        if self._pubsub is not None and wanted:
            self._tasks_of(self._pubsub.subscribe(*wanted))

    def _tasks_of(self, coroutine: Any) -> None:
        async def quiet() -> None:
            with contextlib.suppress(*LOST):  # the listener hears of it too
                await coroutine

        task = asyncio.create_task(quiet())
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)

    async def _listen(self) -> None:
        wait = BACKOFF[0]
        while True:
            pubsub = self._redis.pubsub()
            try:
                missing, begun = set(self._handlers), time.monotonic()
                await pubsub.subscribe(*missing)
                self._pubsub = pubsub
                if late := set(self._handlers) - missing:
                    await pubsub.subscribe(*late)
                while (message := await pubsub.get_message(timeout=DEAF)) is not None:
                    if missing and time.monotonic() - begun > DEAF:
                        break  # others are heard, and these were never confirmed
                    channel = message["channel"].decode()
                    if message["type"] == "message":
                        self._hear(channel, message["data"])
                        continue
                    if message["type"] == "subscribe":
                        missing.discard(channel)
                        self._confirm(channel)
                    if not missing and not self.up:
                        self._came_back()
                        wait = BACKOFF[0]
            except LOST as error:
                if self.up:
                    logger.warning("Redis is away", extra={"error": str(error)})
            finally:
                self._pubsub = None
                self.since = 0.0
                for channel, confirmed in list(self._confirmed.items()):
                    if confirmed.done():
                        self._confirmed[channel] = asyncio.get_running_loop().create_future()
                with contextlib.suppress(*LOST):
                    await pubsub.aclose()  # type: ignore[no-untyped-call]  # redis-py's
            await asyncio.sleep(wait)
            wait = min(wait * 2, BACKOFF[1])

    def _confirm(self, channel: str) -> None:
        confirmed = self._confirmed.get(channel)
        if confirmed is not None and not confirmed.done():
            confirmed.set_result(None)

    def _came_back(self) -> None:
        self.since = self._heard = time.monotonic()
        self._first.set()
        logger.info("Redis is heard")
        self._restored()

    def _hear(self, channel: str, message: bytes) -> None:
        handler = self._handlers.get(channel)
        try:
            if channel == self._own and message == b"probe":
                self._heard = time.monotonic()
            elif handler is not None:
                handler(message)
        except Exception:  # one message of many: the others are to be heard
            logger.exception("message broke", extra={"channel": channel})

    def _late(self) -> bool:
        return self.up and time.monotonic() - self._heard > DEAF

    async def _probe(self) -> None:
        """A subscriber can be deaf with its connection in order: what counts is that it hears."""
        while True:
            await asyncio.sleep(PROBE)
            if self.up:
                self.say(self._own, b"probe")
            if self._late() and self._pubsub is not None and self._pubsub.connection is not None:
                logger.warning("Redis is not heard any more: connecting anew")
                self.since = 0.0
                await self._pubsub.connection.disconnect(nowait=True)


def _looked_at(answer: asyncio.Future[Any]) -> None:
    """Nobody may be waiting for it any more."""
    if not answer.cancelled():
        answer.exception()


def connect(url: str) -> Redis:
    """A client of the Redis at this address, which tries nothing twice. Raises ValueError."""
    options: dict[str, Any] = {
        "socket_timeout": PATIENCE,
        "socket_connect_timeout": PATIENCE,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,
    }
    parts = urlsplit(url)
    if parts.scheme in ("redis+sentinel", "rediss+sentinel"):
        hosts = [host.rpartition(":") for host in parts.netloc.rpartition("@")[2].split(",")]
        name, _, db = parts.path.strip("/").partition("/")
        sentinels = [(host, int(port)) for host, _, port in hosts]
        user, password = parts.username, parts.password
        if parts.scheme == "rediss+sentinel":
            options["ssl"] = True
        asked = {"socket_timeout": PATIENCE}
        # The ignored error: redis-py gives its Sentinel no types.
        sentinel: Any = Sentinel(sentinels, sentinel_kwargs=asked)  # type: ignore[no-untyped-call]
        login = {"db": int(db or 0), "username": user, "password": password}
        client: Redis = sentinel.master_for(name, **login, **options)
        return client
    return Redis.from_url(url, **options)
