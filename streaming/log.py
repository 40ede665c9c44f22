"""The one idea: an append-only log of events, read through cursors.

`append` is synchronous, so the order of calls is the order of events, numbered from 1 without
holes. A reader is a `Cursor`, a position that moves forward; it has no queue, so a slow reader
costs nothing, and reading what was missed and following what comes are the same read.

Adjacent deltas of the same part and kind are kept as one `Run`: their text once, end to end, and
where each of them ended. So a token costs its text and eight bytes, a read from any position is a
slice, and merging on read is not a step of its own.
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import orjson

from streaming.events import Event, Position, new_epoch


class FellBehind(Exception):
    """The events after this cursor have been trimmed away."""


class Run:
    """Adjacent deltas with one head. Delta i (from 0) ends at byte ends[i] of `text`, UTF-8."""

    __slots__ = ("ends", "first", "head", "text", "times")

    def __init__(self, first: int, head: Mapping[str, Any]) -> None:
        self.first = first  # offset of its first delta
        self.head = head  # all of the delta's data but `content`
        self.text = bytearray()
        self.ends = array("I")
        self.times = array("I")  # milliseconds since the log began

    def slice(self, start: int, stop: int) -> str:
        """The text of deltas start up to but without stop."""
        begin = self.ends[start - 1] if start else 0
        return self.text[begin : self.ends[stop - 1]].decode()


class Log:
    """A log of one life.

    origin: what its events share; every Event read from it carries it. start: the offset that it
    goes on from, where the events before are held elsewhere. max_events, max_bytes (of
    JSON), max_age (seconds) bound what it keeps: past them its oldest events leave, a few at a
    time; 0 is no bound. The newest is kept however large it is, so that nobody live misses it.
    `tail` is the offset before the oldest event held, `top` the newest's.
    """

    __slots__ = (
        "_bytes", "_items", "_max_age", "_max_bytes", "_max_events", "_sizes", "_start", "_starts",
        "closed", "epoch", "listeners", "origin", "tail", "top",
    )  # fmt: skip

    def __init__(
        self,
        origin: Mapping[str, Any],
        *,
        epoch: str | None = None,
        start: int = 0,
        max_events: int = 0,
        max_bytes: int = 0,
        max_age: float = 0,
    ) -> None:
        self.epoch = epoch or new_epoch()
        self.origin = origin
        self.tail = start
        self.top = start
        self.closed = False
        self.listeners: list[Callable[[], None]] = []  # told after each append
        self._items: list[Event | Run] = []
        self._starts: list[int] = []  # offset of the first event of each item
        self._sizes: list[int] = []  # of each item, where the log is bounded
        self._bytes = 0
        self._start = now_ms()
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._max_age = max_age

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.top)

    @property
    def size(self) -> int:
        """Bytes of what is held, roughly: text of runs, JSON of other events."""
        return self._bytes

    def append(self, type: str, data: Mapping[str, Any], time_ms: int | None = None) -> Event:
        """Adds one event and returns it. Never blocks. On an open log it fails only for data that
        is no JSON (TypeError), and then has changed nothing. time_ms: when it came, if not now.
        """
        self._check_open()
        size = len(orjson.dumps(data))
        self.top += 1
        event = Event(type, data, Position(self.epoch, self.top), time_ms or now_ms(), self.origin)
        self._items.append(event)
        self._starts.append(self.top)
        self._bytes += size
        if self._max_events or self._max_bytes or self._max_age:
            self._sizes.append(size)
            self.trim()
        for listener in self.listeners:
            listener()
        return event

    def extend(self, head: Mapping[str, Any], text: str, time_ms: int | None = None) -> None:
        """Adds one delta: an event of type `delta` with the data of `head` and `content: text`.
        Only for a log without bounds (a generation's). time_ms: as of `append`.
        """
        self._check_open()
        encoded = text.encode()
        self.top += 1
        run = self._items[-1] if self._items else None
        if not isinstance(run, Run) or (run.head is not head and run.head != head):
            run = Run(self.top, head)
            self._items.append(run)
            self._starts.append(self.top)
        run.text += encoded
        run.ends.append(len(run.text))
        run.times.append(max(0, (time_ms or now_ms()) - self._start))  # a clock may be set back
        self._bytes += len(encoded)
        for listener in self.listeners:
            listener()

    def skip(self, offset: int) -> None:
        """Leaves a hole: the next event comes after this offset. Only for the end of a log whose
        writer is lost: nobody knows how far readers of it have come.
        """
        self.top = offset

    def close(self) -> None:
        """No event comes after this: whoever has read to the top is at the end."""
        self.closed = True
        for listener in self.listeners:
            listener()

    def read(self, after: int, *, merge: bool = True, limit: int = 1 << 62) -> list[Event]:
        """The events after offset `after`, in order, adjacent deltas merged unless merge is off:
        at least one where there is one, and no more once `limit` bytes of text have been passed.

        Raises FellBehind where some of them have been trimmed.
        """
        if after < self.tail:
            raise FellBehind
        events: list[Event] = []
        if after >= self.top:
            return events
        first = bisect_right(self._starts, after + 1) - 1
        for index in range(first, len(self._items)):
            item = self._items[index]
            if isinstance(item, Run):
                if after < item.first + len(item.ends) - 1:  # else a skip follows it
                    after, limit = self._read_run(item, after, merge, limit, events)
            else:
                events.append(item)
                after = item.id.offset
                limit -= 256  # about what its JSON takes beside its data: a bound on work too
                limit -= self._sizes[index] if self._sizes else 0
            if limit <= 0:
                break
        return events

    def _read_run(
        self, run: Run, after: int, merge: bool, limit: int, events: list[Event]
    ) -> tuple[int, int]:
        ends, total = run.ends, len(run.ends)
        start = after + 1 - run.first
        begin = ends[start - 1] if start else 0
        stop = total if ends[-1] - begin <= limit else bisect_left(ends, begin + limit, start) + 1
        stop = min(stop, total)
        bounds = [stop] if merge else range(start + 1, stop + 1)
        for bound in bounds:
            event = Event(
                "delta",
                {**run.head, "content": run.slice(start, bound)},
                Position(self.epoch, run.first + bound - 1),
                self._start + run.times[bound - 1],
                self.origin,
            )
            events.append(event)
            start = bound
        return run.first + stop - 1, limit - (ends[stop - 1] - begin) - 256

    def holds(self, position: Position) -> bool:
        """Whether everything after this position can be read from this log."""
        return position.epoch == self.epoch and self.tail <= position.offset <= self.top

    def trim(self) -> None:
        """Lets go of what is past the bounds. Also to be called from time to time where age is
        bounded: a log that nobody appends to grows old all the same.
        """
        drop = 0
        oldest = now_ms() - self._max_age * 1000
        size = self._bytes
        for item, item_size in zip(self._items, self._sizes, strict=False):  # no bounds: no sizes
            count = len(self._items) - drop
            if not (
                (self._max_events and count > self._max_events)
                or (self._max_bytes and size > self._max_bytes and count > 1)
                or (self._max_age and isinstance(item, Event) and item.time < oldest)
            ):
                break
            size -= item_size
            drop += 1
        if drop:
            self.tail += drop
            self._bytes = size
            del self._items[:drop], self._starts[:drop], self._sizes[:drop]

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("append to a closed log")


class Cursor:
    """A reader's place in a log: after event number `offset`."""

    __slots__ = ("log", "offset")

    def __init__(self, log: Log, offset: int) -> None:
        self.log = log
        self.offset = offset

    @property
    def source(self) -> Hashable:
        """What all cursors on the same thing share."""
        return self.log

    @property
    def logs(self) -> list[Log]:
        """The logs whose next event this cursor waits for."""
        return [self.log]

    @property
    def closed(self) -> bool:
        """Whether no event comes any more."""
        return self.log.closed

    @property
    def ended(self) -> bool:
        """Whether the log is closed and read to its end."""
        return self.log.closed and self.offset >= self.log.top

    @property
    def behind(self) -> bool:
        """Whether something is there to be read."""
        return self.offset < self.log.top

    def copy(self) -> Cursor:
        """Another cursor at the same place."""
        return Cursor(self.log, self.offset)

    def rejoined(self) -> list[Event]:
        """What a reader that has caught up must be told besides: nothing."""
        return []

    def read(self, *, merge: bool = True, limit: int = 1 << 62) -> list[Event]:
        """As Log.read, and moves past what it returns. Raises FellBehind."""
        events = self.log.read(self.offset, merge=merge, limit=limit)
        if events:
            self.offset = events[-1].id.offset
        return events


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000
