"""A small client for programs that tell a person how their work goes, in a channel of theirs.

    async with Publisher("http://127.0.0.1:8080", key="...") as publisher:
        async with publisher.task("ann", "work") as task:
            await task.progress(percent=50)

It stands alone: nothing of the server is needed to use it. Given the URL of the server's Redis
instead, it publishes there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp

logger = logging.getLogger("rivulet.publisher")

JSON = dict[str, Any]
REDIS = "redis://", "rediss://", "unix://", "redis+cluster://", "rediss+cluster://"


class PublishError(Exception):
    """The server did not take an event, or was not there. status: its answer's; 0 for none."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class _Server:
    """By the server's own call. Cancelling it may have published or not, as with the other."""

    def __init__(self, url: str, key: str, timeout: float) -> None:
        self._url = f"{url.rstrip('/')}/api/v1/sse/publish"
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._session: aiohttp.ClientSession | None = None

    async def publish(self, user_id: str, channel: str, event: str, data: JSON) -> int:
        if self._session is None:
            self._session = aiohttp.ClientSession(headers=self._headers, timeout=self._timeout)
        body = {"user_id": user_id, "channel": channel, "event": event, "data": data}
        try:
            async with self._session.post(self._url, json=body) as answer:
                if answer.status >= 400:
                    said = (await answer.text())[:500]
                    raise PublishError(f"{answer.status}: {said}", answer.status)
                delivered: int = (await answer.json())["delivered"]
                return delivered
        except (aiohttp.ClientError, TimeoutError) as error:
            raise PublishError(f"{type(error).__name__}: {error}") from error

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


class _Redis:
    """By Redis, from where every instance of the server hears it."""

    def __init__(self, url: str, timeout: float) -> None:
        # Only who publishes this way needs it. redis-py would repeat an event without a word.
        from redis.asyncio import Redis, RedisCluster
        from redis.asyncio.cluster import ClusterNode
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        times: Any = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
        once = Retry(NoBackoff(), 0)
        self._redis: Redis | RedisCluster
        if "+cluster://" in url:
            parts = urlsplit(url)
            login, at, hosts = parts.netloc.rpartition("@")
            named = [urlsplit(f"//{host}") for host in hosts.split(",")]
            nodes = [ClusterNode(host.hostname or "", host.port or 6379) for host in named]
            scheme = parts.scheme.removesuffix("+cluster")
            url = parts._replace(scheme=scheme, netloc=login + at + named[0].netloc).geturl()
            self._redis = RedisCluster.from_url(url, startup_nodes=nodes, retry=once, **times)
        else:
            self._redis = Redis.from_url(url, retry=once, **times)

    async def _say(self, name: str, message: str) -> int:
        """In a cluster at the node where instances listen: all hear it, but one counts its own."""
        from redis.asyncio import RedisCluster

        if not isinstance(self._redis, RedisCluster):
            return int(await self._redis.publish(name, message))
        await self._redis.initialize()
        node = self._redis.get_node_from_key(name)
        return int(await self._redis.execute_command("PUBLISH", name, message, target_nodes=node))

    async def publish(self, user_id: str, channel: str, event: str, data: JSON) -> int:
        from redis.exceptions import RedisClusterException, RedisError

        if not channel or ":" in channel:
            raise PublishError("a channel's name has no `:`", 422)
        message = json.dumps({"event": event, "data": data})
        try:
            return await self._say(f"sse:{channel}:{user_id}", message)
        except (RedisError, RedisClusterException, OSError, TimeoutError) as error:
            raise PublishError(f"{type(error).__name__}: {error}") from error

    async def close(self) -> None:
        await self._redis.aclose()


class Publisher:
    """Publishes into the channels of a server.

    url: the server's base URL, or that of its Redis; without it the environment's
    RIVULET_REDIS__URL or REDIS_URL. key: a service key, for the server; one in open mode needs
    none. timeout: seconds that one event may take. Raises ValueError for another kind of URL.
    """

    def __init__(self, url: str = "", key: str = "", *, timeout: float = 10.0) -> None:
        environ = os.environ
        url = url or environ.get("RIVULET_REDIS__URL", "") or environ.get("REDIS_URL", "")
        self._way: _Server | _Redis
        if url.startswith(("http://", "https://")):
            self._way = _Server(url, key, timeout)
        elif url.startswith(REDIS):
            self._way = _Redis(url, timeout)
        else:
            raise ValueError(f"a URL begins with http://, https://, {', '.join(REDIS)}")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes its connections; publishing again opens new ones."""
        await self._way.close()

    async def publish(self, user_id: str, channel: str, event: str, data: JSON) -> int:
        """Publishes one event; how many streams of this person it went to, or by Redis how many
        instances. Raises PublishError.

        It is not tried again: when an answer is lost, the event may have arrived.
        """
        return await self._way.publish(user_id, channel, event, data)

    @asynccontextmanager
    async def task(
        self, user_id: str, channel: str, name: str = "generation", **data: Any
    ) -> AsyncIterator[Task]:
        """A piece of work: `{name}.start` with `data`; then `{name}.complete` with the task's
        `result`, or `{name}.error` when the block raises or is cancelled, which goes on from here.

        Raises PublishError where start or complete are not taken. Where `error` is not, that is
        logged, and what the block raised counts.
        """
        task = Task(self, user_id, channel, name)
        await task.send("start", data)
        try:
            yield task
        except (Exception, asyncio.CancelledError) as error:
            code = "cancelled" if isinstance(error, asyncio.CancelledError) else "task_failed"
            try:
                message = str(error) or type(error).__name__
                await task.send("error", {"error": {"code": code, "message": message}})
            except PublishError as lost:
                logger.warning("the end of a task was not told", extra={"reason": str(lost)})
            raise
        await task.send("complete", task.result)


class Task:
    """One piece of work under way. Every event has its `task_id`. result: goes with `complete`."""

    def __init__(self, publisher: Publisher, user_id: str, channel: str, name: str) -> None:
        self.id = secrets.token_hex(8)
        self.result: JSON = {}
        self._publisher = publisher
        self._to = user_id, channel
        self._name = name

    async def progress(self, **data: Any) -> None:
        """Tells how far it is. Raises PublishError."""
        await self.send("progress", data)

    async def send(self, step: str, data: JSON) -> None:
        """Publishes `{name}.{step}`. Raises PublishError."""
        event = f"{self._name}.{step}"
        await self._publisher.publish(*self._to, event, {"task_id": self.id, **data})
