"""Per-user channels: events for one person, from any part of a system. No ids, no resume.

A channel is a small log all the same, so that a reader which is slow for a moment loses nothing; it
lives as long as somebody reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from streaming.config import Delivery as DeliveryConfig
from streaming.config import Limits
from streaming.delivery import Delivery
from streaming.dialects import Dialect, timestamp
from streaming.errors import RivuletError
from streaming.events import JSON, Event
from streaming.log import Cursor, Log

KEPT, BYTES = 1000, 4 * 2**20  # what a slow reader may be behind
RETRY = 5.0
HEARTBEAT = 30.0  # seconds of silence: clients of these streams count on it


class Channels:
    """The channels that somebody reads, by user and name."""

    def __init__(self, config: DeliveryConfig, limits: Limits) -> None:
        self.delivery = Delivery(replace(config, heartbeat=HEARTBEAT))
        self._most = limits.streams_per_user
        self._logs: dict[tuple[str, str], Log] = {}
        self._streams: dict[str, Counter[str]] = {}  # of each user, by channel

    @contextmanager
    def reading(self, user: str, channel: str) -> Iterator[Cursor]:
        """A cursor from now, as long as this is open. Raises RivuletError (429) where the user has
        too many streams; an open one is never closed for a new one.
        """
        streams = self._streams.setdefault(user, Counter())
        if streams.total() >= self._most:
            message = f"a user may have {self._most} streams open"
            raise RivuletError(message, status=429, code="too_many_streams", retry_after=RETRY)
        key = user, channel
        log = self._logs.setdefault(key, Log({}, max_events=KEPT, max_bytes=BYTES))
        streams[channel] += 1
        try:
            yield Cursor(log, log.top)
        finally:
            streams[channel] -= 1
            if not streams[channel]:
                del streams[channel], self._logs[key]
            if not streams:
                del self._streams[user]

    def publish(self, user: str, channel: str, event: str, data: JSON) -> int:
        """Tells whoever reads this channel; how many streams that are."""
        log = self._logs.get((user, channel))
        if log is None:
            return 0
        # A browser takes an event called `error` for a broken connection.
        log.append("failed" if event == "error" else event, data)
        return self._streams[user][channel]


def _say(event: Event) -> list[JSON]:
    return [{"timestamp": timestamp(event.time), **event.data}]


CHANNEL = Dialect("channel", _say, ids="none", named="event", dated=True)
