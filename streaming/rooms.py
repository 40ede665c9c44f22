"""Rooms: a log, and small projections kept next to it.

state = fold(events): the last messages, which are what a newcomer sees and what a model is told,
and the generations that run. A conversation with a model is a room with one person in it. Who
follows a room follows the generations in it too: a `RoomCursor` reads them as one.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Sequence
from itertools import islice

import orjson

from streaming.config import History
from streaming.config import Rooms as RoomsConfig
from streaming.dialects import ENDINGS, is_text
from streaming.errors import InvalidField, NotFound, Unavailable
from streaming.events import JSON, Event, Position
from streaming.log import Cursor, Gap, Log, now_ms

KEYS = 1000  # idempotency keys that a room remembers


class Room:
    """One room. Its events: `message` or whatever is published, and of each generation `started`
    and its ending.
    """

    def __init__(self, name: str, config: RoomsConfig, messages: int) -> None:
        self.name = name
        self.log = Log(
            {"room": name},
            max_events=config.events,
            max_bytes=config.bytes,
            max_age=config.age,
        )
        self.messages: deque[Event] = deque(maxlen=messages)  # what was said, by whomever
        self.running: dict[str, Log] = {}  # by stream id
        self.people: dict[str, int] = {}  # connections by user
        self.used = self.left = time.monotonic()  # left: when somebody last went
        self._keys: OrderedDict[tuple[str, str], tuple[bytes, list[str]]] = OrderedDict()

    def append(self, type: str, data: JSON, running: Log | None = None) -> Event:
        """Adds an event and folds it into the projections. running: the log of the generation that
        this event (`started`) tells of.
        """
        event = self.log.append(type, data)
        if type == "started" and running is not None:
            self.running[data["stream_id"]] = running
        elif type in ENDINGS:
            self.running.pop(data["stream_id"], None)
        if type == "message" or (type in ENDINGS and data["content"]):
            self.messages.append(event)
        self.used = time.monotonic()
        return event

    def publish(self, events: Sequence[tuple[str, JSON]], key: tuple[str, str]) -> list[str]:
        """Adds these events, all in a row, and gives their ids; the same user and key give the
        first ids again. Raises InvalidField where the events are others.
        """
        if not key[1]:
            return [str(self.append(type, data).id) for type, data in events]
        digest = hashlib.sha256(orjson.dumps(events, option=orjson.OPT_SORT_KEYS)).digest()
        first, ids = self._keys.get(key, (digest, []))
        if first != digest:
            raise InvalidField("Idempotency-Key", "was used before with a different body")
        if not ids:
            ids = [str(self.append(type, data).id) for type, data in events]
            self._keys[key] = digest, ids
            if len(self._keys) > KEYS:
                self._keys.popitem(last=False)
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
        said = [
            event
            for event in self.log.read(self.log.tail)
            if event.id.offset < before
            and (event.type == "message" or (event.type in ENDINGS and event.data["content"]))
        ]
        return said[-limit:]

    def ephemeral(self, type: str, data: JSON) -> Event:
        """An event without a position, for whoever is connected now."""
        return Event(type, data, Position("", 0), now_ms(), self.log.origin)

    def presence(self) -> Event:
        """Who is here, as an ephemeral event."""
        return self.ephemeral("presence", {"members": sorted(self.people)})

    def join(self, after: str | None) -> tuple[RoomCursor, list[Event]]:
        """A follower's cursor, and the events that bring it there: `joined` with all that it needs
        to be current; before it `gap` where the position `after` cannot be honoured.
        """
        cursor, gap = self.log.cursor(after)
        opening = [] if gap is None else [self._gap(gap)]
        active, places = [], {}
        for stream_id, log in self.running.items():
            places[stream_id] = Cursor(log, log.top)
            text = "".join(event.data["content"] for event in log.read(0) if is_text(event))
            active.append({"stream_id": stream_id, "seq": log.top, "content": text})
        position = Position(self.log.epoch, cursor.offset)
        data = {
            "recovered": after is not None and gap is None,
            "members": sorted(self.people),
            "messages": [event for event in self.messages if event.id.offset <= cursor.offset],
            "active": active,
        }
        opening.append(Event("joined", data, position, now_ms(), self.log.origin))
        return RoomCursor(self, cursor.offset, places), opening

    def _gap(self, gap: Gap) -> Event:
        return self.ephemeral("gap", {"requested": gap.requested, "resumed": str(gap.resumed)})


class RoomCursor:
    """A place in a room and in each generation that runs in it: what a follower has been told.

    A generation is opened when its `started` is read and dropped with its ending, which comes after
    all that it said.
    """

    __slots__ = ("_offset", "_places", "_room")

    def __init__(self, room: Room, offset: int, places: dict[str, Cursor]) -> None:
        self._room = room
        self._offset = offset
        self._places = places

    @property
    def source(self) -> Hashable:
        """See Cursor.source."""
        return self._room

    @property
    def logs(self) -> list[Log]:
        """See Cursor.logs."""
        return [self._room.log, *(place.log for place in self._places.values())]

    @property
    def closed(self) -> bool:
        """Whether the room has ended."""
        return self._room.log.closed

    @property
    def ended(self) -> bool:
        """Whether the room has ended and is read to its end."""
        return self.closed and not self.behind

    @property
    def behind(self) -> bool:
        """Whether something is there to be read."""
        places = self._places.values()
        return self._offset < self._room.log.top or any(place.behind for place in places)

    def copy(self) -> RoomCursor:
        """Another cursor at the same place."""
        places = {stream_id: place.copy() for stream_id, place in self._places.items()}
        return RoomCursor(self._room, self._offset, places)

    def rejoined(self) -> list[Event]:
        """Who is here: the comings and goings of meanwhile were not told."""
        return [self._room.presence()]

    def read(self, *, merge: bool = True, limit: int = 1 << 62) -> list[Event]:
        """As Cursor.read, of the room and what runs in it. Raises FellBehind."""
        events: list[Event] = []
        for event in self._room.log.read(self._offset, limit=limit):
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


class Rooms:
    """The registry: makes rooms, finds them, and forgets those that nobody uses.

    A room is in use while a generation runs in it or somebody reads it. One that has not been for
    `idle` seconds goes; where there are too many, the one that was used longest ago.
    """

    def __init__(self, config: RoomsConfig, history: History) -> None:
        self._config = config
        self._messages = history.messages
        self._rooms: OrderedDict[str, Room] = OrderedDict()  # least recently used first
        self._look_again = 0.0  # when to look at all of them for a place, which takes a while

    def __len__(self) -> int:
        return len(self._rooms)

    def __iter__(self) -> Iterator[Room]:
        return iter(self._rooms.values())

    def delete(self, name: str) -> Room:
        """Forgets a room and returns it, to be ended for everybody in it. Raises NotFound."""
        room = self._rooms.pop(name, None)
        if room is None:
            raise NotFound("no such room", param="room")
        return room

    def find(self, name: str) -> Room | None:
        """The room of this name, if there is one."""
        return self._rooms.get(name)

    def get(self, name: str) -> Room:
        """The room of this name, made where there is none.

        Raises Unavailable where there are too many rooms and all are in use, or were a second ago.
        """
        room = self._rooms.get(name)
        if room is None:
            self.sweep()
            if self._full and time.monotonic() >= self._look_again:
                self._look_again = time.monotonic() + 1
                self.sweep(len(self._rooms))
            if self._full:
                raise Unavailable("too many rooms are in use", code="overloaded", retry_after=5)
            room = self._rooms[name] = Room(name, self._config, self._messages)
        room.used = time.monotonic()
        self._rooms.move_to_end(name)
        return room

    @property
    def _full(self) -> bool:
        return len(self._rooms) >= self._config.max_rooms

    def sweep(self, most: int = 100) -> None:
        """Looks at `most` rooms, and at others the next time. Forgets those that have been idle for
        too long, and one more where there is no place.
        """
        oldest = time.monotonic() - self._config.idle
        unused: list[Room] = []
        for room in list(islice(self._rooms.values(), most)):
            if room.running or room.people or room.log.listeners:
                self._rooms.move_to_end(room.name)
            elif room.used < oldest:
                del self._rooms[room.name]
            else:
                unused.append(room)
        if unused and self._full:
            del self._rooms[min(unused, key=lambda room: room.used).name]
