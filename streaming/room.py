"""Rooms: a log, and small projections kept next to it.

state = fold(events): the last messages, which are what a newcomer sees and what a model is told,
and the generations that run. A conversation with a model is a room with one person in it. Who
follows a room follows the generations in it too: a `RoomCursor` reads them as one.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence

import orjson

from streaming.config import Rooms as RoomsConfig
from streaming.dialects import ENDINGS, is_text
from streaming.errors import InvalidField
from streaming.events import JSON, Event, Position
from streaming.log import Cursor, FellBehind, Log, now_ms
from streaming.metrics import Metrics

KEYS = 1000  # idempotency keys that a room remembers
SNAPSHOT = 256 * 1024  # characters of messages that a newcomer is told: a crowd comes at once


class Keeper:
    """Who puts in order what is published in rooms, and keeps it: here, this process alone. A
    bridge between instances, or a file, takes its place.
    """

    keeps = False  # it may know rooms that are not held in this process

    async def open(self, room: Room) -> None:
        """Brings a room to the present, before anybody reads it. Raises Unavailable."""

    async def reach(self, room: Room, after: str) -> None:
        """Brings an open room to this position, where others may know more of it already."""

    async def settle(self, room: Room) -> None:
        """Waits for what `conclude` still does in this room, a moment at most."""

    async def publish(
        self, room: Room, events: Sequence[tuple[str, JSON]], key: tuple[str, str]
    ) -> list[str]:
        """See Room.publish."""
        return room.add(events, key)

    def conclude(self, room: Room, type: str, data: JSON) -> None:
        """Tells the room of the end of a generation that has run in it, from here."""
        if not room.log.closed:  # else it has been deleted
            room.append(type, data)

    def running(self, room: Room, stream_id: str) -> Log | None:
        """The log of a generation that runs elsewhere."""
        return None

    def entered(self, room: Room, user: str) -> None:
        """The first connection of this person's has come in here."""

    def left(self, room: Room, user: str) -> None:
        """The last connection of this person's here has been gone for a while."""

    def told(self, room: Room, event: Event) -> None:
        """Passes on an ephemeral event that everybody here has been told."""

    async def delete(self, room: Room, user: str) -> None:
        """Lets go of all that is kept of it elsewhere, and says who wanted that."""

    async def elsewhere(self) -> tuple[list[JSON], bool]:
        """What other instances hold, as `Room.summary` has it; whether that is all of it."""
        return [], True

    def forget(self, room: Room) -> None:
        """Nobody uses this room here any more."""


class Room:
    """One room. Its events: `message` or whatever is published, and of each generation `started`
    and its ending.
    """

    def __init__(
        self,
        name: str,
        config: RoomsConfig,
        messages: int,
        keeper: Keeper | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.name = name
        self.keeper = keeper or Keeper()
        self._metrics = metrics or Metrics()
        self.log = self._begin(config)
        self._config = config
        self.messages: deque[Event] = deque(maxlen=messages)  # what was said, by whomever
        self.starting: dict[str, Log] = {}  # of generations that are about to be told here
        self.running: dict[str, Log] = {}  # by stream id
        self.people: dict[str, int] = {}  # connections here, by user
        self.elsewhere: dict[str, set[str]] = {}  # people by the instance that has them
        self.used = self.left = time.monotonic()  # left: when somebody last went
        self.keys: OrderedDict[tuple[str, str], tuple[bytes, list[str]]] = OrderedDict()

    def _begin(self, config: RoomsConfig, epoch: str | None = None, start: int = 0) -> Log:
        bounds = {"max_events": config.events, "max_bytes": config.bytes}
        return Log({"room": self.name}, epoch=epoch, start=start, max_age=config.age, **bounds)

    def restart(self, epoch: str, start: int) -> None:
        """Begins another life, after offset `start` of it: whoever reads this one falls behind."""
        before, self.log = self.log, self._begin(self._config, epoch, start)
        self.messages.clear()
        for listener in before.listeners:
            listener()

    def has(self, user: str) -> bool:
        """Whether this person is here, on any instance."""
        return user in self.people or any(user in users for users in self.elsewhere.values())

    @property
    def members(self) -> list[str]:
        """Who is here, on any instance."""
        return sorted(set(self.people).union(*self.elsewhere.values()))

    def append(self, type: str, data: JSON, time_ms: int | None = None) -> Event:
        """Adds an event and folds it into the projections. time_ms: see Log.append."""
        event = self.log.append(type, data, time_ms)
        self._metrics.published += 1
        if type == "started":
            stream_id = data["stream_id"]
            log = self.starting.pop(stream_id, None) or self.keeper.running(self, stream_id)
            if log is not None:
                self.running[stream_id] = log
        elif type in ENDINGS:
            self.running.pop(data["stream_id"], None)
        if _said(event):
            self.messages.append(event)
        self.used = time.monotonic()
        return event

    async def publish(
        self, events: Sequence[tuple[str, JSON]], key: tuple[str, str] = ("", "")
    ) -> list[str]:
        """Publishes these events, all in a row, and gives their ids once this room holds them; the
        same user and key give the first ids again. Cancelling it publishes them all the same.

        Raises InvalidField where the events are others than the key's first, Unavailable.
        """
        return await self.keeper.publish(self, events, key)

    def add(self, events: Sequence[tuple[str, JSON]], key: tuple[str, str]) -> list[str]:
        """As `publish`, where this process puts things in order."""
        if not key[1]:
            return [str(self.append(type, data).id) for type, data in events]
        digest = hashlib.sha256(orjson.dumps(events, option=orjson.OPT_SORT_KEYS)).digest()
        first, ids = self.keys.get(key, (digest, []))
        if first != digest:
            raise InvalidField("Idempotency-Key", "was used before with a different body")
        if not ids:
            ids = [str(self.append(type, data).id) for type, data in events]
            self.keys[key] = digest, ids
            if len(self.keys) > KEYS:
                self.keys.popitem(last=False)
        return ids

    def context(self) -> list[JSON]:
        """The last messages as a model is told them; what was said before a stop was said."""
        return [
            {
                "role": "user" if event.type == "message" else "assistant",
                "content": event.data["content"],
            }
            for event in self.messages
            if event.data.get("content")
        ]

    def history(self, before: int, limit: int) -> list[Event]:
        """The last `limit` messages before offset `before` that are held, oldest first."""
        held = self.log.read(self.log.tail)
        return [each for each in held if each.id.offset < before and _said(each)][-limit:]

    def ephemeral(self, type: str, data: JSON) -> Event:
        """An event without a position, for whoever is connected now."""
        return Event(type, data, Position("", 0), now_ms(), self.log.origin)

    @property
    def summary(self) -> JSON:
        """What a list of rooms says of it."""
        members, position = len(self.members), str(self.log.position)
        return {"room": self.name, "members": members, "position": position}

    def presence(self) -> Event:
        """Who is here, as an ephemeral event."""
        return self.ephemeral("presence", {"members": self.members})

    def join(self, after: str | None) -> tuple[RoomCursor, list[Event]]:
        """A follower's cursor, and the events that bring it there: `joined` with all that it needs
        to be current; before it `gap` where the position `after` cannot be honoured: because it is
        malformed, of another life, trimmed away or not yet written.
        """
        position, opening = self.log.position, []
        asked = None if after is None else Position.parse(after)
        if recovered := asked is not None and self.log.holds(asked):
            position = asked
        elif after is not None:
            told = {"requested": after, "resumed": str(position)}
            opening.append(self.ephemeral("gap", told))
        self._metrics.gaps += len(opening)
        self._metrics.recoveries += recovered
        active, places = [], {}
        for stream_id, log in self.running.items():
            places[stream_id] = Cursor(log, log.top)
            text = "".join(event.data["content"] for event in log.read(0) if is_text(event))
            active.append({"stream_id": stream_id, "seq": log.top, "content": text})
        data = {
            "recovered": recovered,
            "members": self.members,
            "messages": self._last(position.offset),
            "active": active,
        }
        opening.append(Event("joined", data, position, now_ms(), self.log.origin))
        return RoomCursor(self, self.log, position.offset, places), opening

    def _last(self, upto: int) -> list[Event]:
        """The last messages up to this offset, as many as go into a snapshot; at least one."""
        last: list[Event] = []
        left = SNAPSHOT
        for event in reversed(self.messages):
            if event.id.offset <= upto:
                left -= len(event.data["content"])
                if "data" in event.data:
                    left -= len(orjson.dumps(event.data["data"]))
                if left < 0 and last:
                    break
                last.append(event)
        return last[::-1]


def _said(event: Event) -> bool:
    """Whether it is a message: an answer that said something is one too."""
    return event.type == "message" or (event.type in ENDINGS and bool(event.data["content"]))


class RoomCursor:
    """A place in a room and in each generation that runs in it: what a follower has been told.

    A generation is opened when its `started` is read and dropped with its ending, which comes after
    all that it said.
    """

    __slots__ = ("_log", "_offset", "_places", "_room")

    def __init__(self, room: Room, log: Log, offset: int, places: dict[str, Cursor]) -> None:
        self._room = room
        self._log = log  # the room's, as long as it lives that life
        self._offset = offset
        self._places = places

    @property
    def source(self) -> Hashable:
        """See Cursor.source."""
        return self._room

    @property
    def logs(self) -> list[Log]:
        """See Cursor.logs."""
        return [self._log, *(place.log for place in self._places.values())]

    @property
    def closed(self) -> bool:
        """Whether the room has ended."""
        return self._log.closed

    @property
    def ended(self) -> bool:
        """Whether the room has ended and is read to its end."""
        return self.closed and not self.behind

    @property
    def behind(self) -> bool:
        """Whether something is there to be read."""
        places = self._places.values()
        lost = self._log is not self._room.log
        return lost or self._offset < self._log.top or any(place.behind for place in places)

    def copy(self) -> RoomCursor:
        """Another cursor at the same place."""
        places = {stream_id: place.copy() for stream_id, place in self._places.items()}
        return RoomCursor(self._room, self._log, self._offset, places)

    def rejoined(self) -> list[Event]:
        """Who is here: the comings and goings of meanwhile were not told."""
        return [self._room.presence()]

    def read(self, *, merge: bool = True, limit: int = 1 << 62) -> list[Event]:
        """As Cursor.read, of the room and what runs in it. Raises FellBehind."""
        if self._log is not self._room.log:
            raise FellBehind
        events: list[Event] = []
        for event in self._log.read(self._offset, limit=limit):
            if event.type == "started":
                stream_id = event.data["stream_id"]
                if stream_id in self._room.running and stream_id not in self._places:
                    self._places[stream_id] = Cursor(self._room.running[stream_id], 0)
            elif event.type in ENDINGS:
                place = self._places.get(event.data["stream_id"])
                if place is not None:
                    events += place.read(merge=merge, limit=limit)
                    if place.behind:
                        return events  # the ending comes after all of it, in a later read
                    del self._places[event.data["stream_id"]]
            events.append(event)
            self._offset = event.id.offset
        for place in self._places.values():
            events += place.read(merge=merge, limit=limit)
        return events
