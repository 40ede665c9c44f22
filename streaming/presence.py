"""Who is in a room: leases, not a log.

A person is in a room as long as one of their connections is, and a short grace longer, so that a
reload or a second tab does not flicker.
"""

from __future__ import annotations

import asyncio
import time

from streaming.delivery import Delivery
from streaming.room import Room


class Presence:
    """Comings and goings in all rooms. grace: seconds from the last connection to `user_left`."""

    def __init__(self, delivery: Delivery, grace: float) -> None:
        self._delivery = delivery
        self._grace = grace
        self._leaving: dict[tuple[Room, str], asyncio.TimerHandle] = {}

    def enter(self, room: Room, user: str) -> None:
        """A connection of this person's comes in."""
        if user not in room.people:
            known = room.has(user)
            room.people[user] = 0
            room.keeper.entered(room, user)
            if not known:
                self._tell(room, "user_joined", user)
        room.people[user] += 1
        if (timer := self._leaving.pop((room, user), None)) is not None:
            timer.cancel()

    def leave(self, room: Room, user: str) -> None:
        """A connection of this person's has gone."""
        room.people[user] -= 1
        room.used = room.left = time.monotonic()
        if not room.people[user]:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(self._grace, self._left, room, user)
            self._leaving[room, user] = timer

    def _left(self, room: Room, user: str) -> None:
        del self._leaving[room, user], room.people[user]
        if room.log.closed:
            return  # it was deleted, and they may be in a new one of its name
        room.keeper.left(room, user)
        if not room.has(user):
            self._tell(room, "user_left", user)

    def _tell(self, room: Room, type: str, user: str) -> None:
        self._delivery.broadcast(room, room.ephemeral(type, {"userId": user}))
