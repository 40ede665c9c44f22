"""The registry of rooms: the connection manager. It makes them, finds them, and lets them go."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice

from streaming.config import History
from streaming.config import Rooms as RoomsConfig
from streaming.errors import Unavailable
from streaming.events import JSON
from streaming.metrics import Metrics
from streaming.room import Keeper, Room


class Rooms:
    """The registry: makes rooms, finds them, and forgets those that nobody uses.

    A room is in use while a generation runs in it or somebody reads it. One that has not been for
    `idle` seconds goes; where there are too many, the one that was used longest ago.
    """

    def __init__(
        self,
        config: RoomsConfig,
        history: History,
        keeper: Keeper | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.keeper = keeper or Keeper()
        self._metrics = metrics or Metrics()
        self._config = config
        self._messages = history.messages
        self._rooms: OrderedDict[str, Room] = OrderedDict()  # least recently used first
        self._look_again = 0.0  # when to look at all of them for a place, which takes a while

    def __len__(self) -> int:
        return len(self._rooms)

    def __iter__(self) -> Iterator[Room]:
        return iter(self._rooms.values())

    def end(self, name: str, user: str) -> None:
        """Ends a room for everybody in it: this person has deleted it."""
        if (room := self._rooms.pop(name, None)) is not None:
            self.keeper.forget(room)
            room.append("left", {"user_id": user})
            room.log.close()

    async def delete(self, room: Room, user: str) -> None:
        """Ends a room, and lets go of all that is kept of it. Raises Unavailable."""
        await self.keeper.delete(room, user)
        self.end(room.name, user)

    async def open(self, name: str, after: str | None = None) -> Room:
        """As `get`, brought to the present, and to the position `after`: what anybody is told of a
        room is told of this.
        """
        room = self.get(name)
        await self.keeper.open(room)
        if after is not None:
            await self.keeper.reach(room, after)
        return room

    async def seek(self, name: str) -> Room | None:
        """The room of this name, here or elsewhere, if anything is known of it."""
        room = self._rooms.get(name)
        if room is not None or not self.keeper.keeps:
            return room
        room = await self.open(name)
        return room if room.log.top or room.members else None

    async def listed(self) -> tuple[list[JSON], bool]:
        """The summary of each room that lives here or elsewhere; whether those are all."""
        found, whole = await self.keeper.elsewhere()
        rooms = {each["room"]: each for each in found} | {room.name: room.summary for room in self}
        return list(rooms.values()), whole

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
            room = Room(name, self._config, self._messages, self.keeper, self._metrics)
            self._rooms[name] = room
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
                self._forget(room)
            else:
                unused.append(room)
        if unused and self._full:
            self._forget(min(unused, key=lambda room: room.used))

    def _forget(self, room: Room) -> None:
        del self._rooms[room.name]
        self.keeper.forget(room)
