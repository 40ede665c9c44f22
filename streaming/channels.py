"""Per-user channels: events for one person, from any part of a system. No ids, no resume.

A channel is a small log all the same, so that a reader which is slow for a moment loses nothing; it
lives as long as somebody reads it. With a bridge its events come by way of Redis, from any instance
and any process.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import orjson

from streaming.config import Delivery as DeliveryConfig
from streaming.config import Limits
from streaming.delivery import Delivery
from streaming.dialects import Dialect, timestamp
from streaming.errors import TooMany, Unavailable
from streaming.events import JSON, Event
from streaming.log import Cursor, Log
from streaming.metrics import Metrics

logger = logging.getLogger("rivulet.channels")

KEPT, BYTES = 1000, 4 * 2**20  # what a slow reader may be behind
RETRY = 5.0
HEARTBEAT = 30.0  # seconds of silence: clients of these streams count on it


class Relay(Protocol):
    """Messages between instances. All of it raises Unavailable."""

    async def subscribe(self, channel: str, handler: Callable[[bytes], None]) -> None:
        """Hears this channel from now on."""

    def unsubscribe(self, channel: str) -> None:
        """Hears it no more."""

    async def publish(self, channel: str, message: bytes) -> int:
        """How many instances have heard this message."""


class _Channel:
    """What one person is told on one channel, as long as somebody reads it."""

    def __init__(self) -> None:
        self.log = Log({}, max_events=KEPT, max_bytes=BYTES)
        self.readers = 0


class Channels:
    """The channels that somebody reads here, by user and name."""

    def __init__(
        self,
        config: DeliveryConfig,
        limits: Limits,
        relay: Relay | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.delivery = Delivery(replace(config, heartbeat=HEARTBEAT), metrics)
        self._relay = relay
        self._most = limits.streams_per_user
        self._channels: dict[tuple[str, str], _Channel] = {}
        self._streams: dict[str, int] = {}  # by user

    @asynccontextmanager
    async def reading(self, user: str, name: str) -> AsyncIterator[Cursor]:
        """A cursor from now, as long as this is open. Raises TooMany where the user has too many
        streams; an open one is never closed for a new one.
        """
        if self._streams.get(user, 0) >= self._most:
            message = f"a user may have {self._most} streams open"
            raise TooMany(message, code="too_many_streams", retry_after=RETRY)
        channel = self._channels.setdefault((user, name), _Channel())
        channel.readers += 1
        self._streams[user] = self._streams.get(user, 0) + 1
        try:
            if self._relay is not None:
                with contextlib.suppress(Unavailable):  # it is heard as soon as the bridge is back
                    await self._relay.subscribe(_address(user, name), partial(self._heard, channel))
            yield Cursor(channel.log, channel.log.top)
        finally:
            channel.readers -= 1
            self._streams[user] -= 1
            if not self._streams[user]:
                del self._streams[user]
            if not channel.readers:
                del self._channels[user, name]
                if self._relay is not None:
                    self._relay.unsubscribe(_address(user, name))

    async def publish(self, user: str, name: str, event: str, data: JSON) -> int:
        """Tells whoever reads this channel; how many streams that are, or with a bridge how many
        instances hear it. Cancelling it changes nothing. Raises Unavailable.
        """
        if self._relay is not None:
            message = orjson.dumps({"event": event, "data": data})
            return await self._relay.publish(_address(user, name), message)
        channel = self._channels.get((user, name))
        if channel is None:
            return 0
        _tell(channel, event, data)
        return channel.readers

    def _heard(self, channel: _Channel, message: bytes) -> None:
        """From any process: `{"event", "data", "timestamp"?}`. What is no such thing is dropped;
        b"" says that something may have passed unheard, which is lost.
        """
        if not message:
            return
        try:
            said = orjson.loads(message)
            event, data = said["event"], said.get("data")
            if not isinstance(event, str) or "\n" in event or "\r" in event:
                raise ValueError("event must be a name")
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            logger.warning("message dropped", extra={"error": str(error)})
            return
        stamp = {"timestamp": said["timestamp"]} if said.get("timestamp") is not None else {}
        _tell(channel, event, {**stamp, **as_object(data)})


def as_object(data: Any) -> JSON:
    """What an event says, as an object: anything else goes under `data`."""
    if data is None:
        return {}
    return data if isinstance(data, dict) else {"data": data}


def _tell(channel: _Channel, event: str, data: JSON) -> None:
    # A browser takes an event called `error` for a broken connection.
    channel.log.append("failed" if event == "error" else event, data)


def _address(user: str, name: str) -> str:
    return f"sse:{name}:{user}"


def _say(event: Event) -> list[JSON]:
    return [{"timestamp": timestamp(event.time), **event.data}]


CHANNEL = Dialect("channel", _say, ids="none", named="event", dated=True)
