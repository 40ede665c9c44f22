"""Rooms: a log, and two small projections kept next to it.

state = fold(events): the last messages, which are what a model is told of a conversation, and the
generations that run in it. A conversation with a model is a room with one person in it.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from itertools import islice
from typing import Any

from streaming.config import History
from streaming.config import Rooms as RoomsConfig
from streaming.errors import Unavailable
from streaming.events import JSON, Event
from streaming.log import Log


class Room:
    """One room. Its events: `message`, and of each generation `started` and its ending."""

    def __init__(self, name: str, config: RoomsConfig, messages: int) -> None:
        self.name = name
        self.log = Log(
            {"room": name},
            max_events=config.events,
            max_bytes=config.bytes,
            max_age=config.age,
        )
        self.messages: deque[JSON] = deque(maxlen=messages)
        self.running: dict[str, JSON] = {}  # stream id -> data of its `started`
        self.used = time.monotonic()

    def append(self, type: str, data: JSON) -> Event:
        """Adds an event and folds it into the projections."""
        event = self.log.append(type, data)
        self._fold(event)
        self.used = time.monotonic()
        return event

    def _fold(self, event: Event) -> None:
        data: Any = event.data
        match event.type:
            case "message":
                self.messages.append({"role": "user", "content": data["content"]})
            case "started":
                self.running[data["stream_id"]] = data
            case "finished" | "failed" | "cancelled":
                self.running.pop(data["stream_id"], None)
                if data["content"]:  # what was said before a cut or a stop was said
                    self.messages.append({"role": "assistant", "content": data["content"]})


class Rooms:
    """The registry: makes rooms, finds them, and forgets those that nobody uses.

    A room is in use while a generation runs in it or somebody reads it. One that has not been for
    `idle` seconds goes; where there are too many, the one that was used longest ago.
    """

    def __init__(self, config: RoomsConfig, history: History) -> None:
        self._config = config
        self._messages = history.messages
        self._rooms: OrderedDict[str, Room] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._rooms)

    def find(self, name: str) -> Room | None:
        """The room of this name, if there is one."""
        return self._rooms.get(name)

    def get(self, name: str) -> Room:
        """The room of this name, made where there is none.

        Raises Unavailable where there are too many rooms and all are in use.
        """
        room = self._rooms.get(name)
        if room is None:
            self.sweep()
            if len(self._rooms) >= self._config.max_rooms:
                raise Unavailable("too many rooms are in use", code="overloaded", retry_after=5)
            room = self._rooms[name] = Room(name, self._config, self._messages)
        room.used = time.monotonic()
        self._rooms.move_to_end(name)
        return room

    def sweep(self) -> None:
        """Forgets rooms that have been idle for too long, and one more where there is no place."""
        oldest = time.monotonic() - self._config.idle
        unused: list[Room] = []
        for room in list(islice(self._rooms.values(), 100)):  # a bounded bite; the next takes more
            if room.running or room.log.listener is not None:
                self._rooms.move_to_end(room.name)
            elif room.used < oldest:
                del self._rooms[room.name]
            else:
                unused.append(room)
        if unused and len(self._rooms) >= self._config.max_rooms:
            del self._rooms[min(unused, key=lambda room: room.used).name]
