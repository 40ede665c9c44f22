"""A generation: one model answer, as its readers see it, and what somebody asked for.

Its log ends with exactly one of `finished`, `failed`, `cancelled`, and is kept for `retention`
seconds. Stop is a call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from streaming.auth import Identity
from streaming.dialects import Dialect, is_text, timestamp
from streaming.events import JSON, Event
from streaming.log import Log
from streaming.models import ModelCall
from streaming.room import Room


class Key(NamedTuple):
    """An idempotency key. scope: user and route. digest: of the request's body.

    flight: made by the server from user and body, and valid only while the generation runs (single
    flight).
    """

    scope: str
    key: str
    digest: bytes
    flight: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """What somebody wants generated.

    owner: who may read and stop it. linger: seconds it runs on with nobody reading. room: where its
    start and end are told, after what the owner `said`. dialect: where the body of the request
    decided it. request_id: for the error that a reader may get.
    """

    call: ModelCall
    owner: str
    linger: float
    conversation_id: str = ""
    room: Room | None = None
    said: object = None  # content of a message: text, or a list of parts
    dialect: Dialect | None = None
    key: Key | None = None
    request_id: str = ""


class Generation:
    """One model answer. `id` is its stream id and its log's epoch; `log` is what it says, `ending`
    the last event of that. dialect: the one that it was asked for in, where its body decided that.
    mirrored: it is made elsewhere, and its log may be behind what its maker's readers have; where
    its maker was lost, its ending comes after a hole, which begins after offset `hole`.

    `with generation:` somebody reads it, or waits for its end, as long as that is open.
    """

    mirrored = False
    hole: int | None = None
    first_token: float | None = None  # seconds until it came, where it is made here

    def __init__(self, owner: str, log: Log, dialect: Dialect | None = None) -> None:
        self.id = log.epoch
        self.owner = owner
        self.log = log
        self.dialect = dialect
        self.ending: Event | None = None
        self.readers = 0

    def __enter__(self) -> None:
        self.readers += 1

    def __exit__(self, *_: object) -> None:
        self.readers -= 1

    @property
    def conversation_id(self) -> str:
        """The conversation that it belongs to, or ""."""
        return str(self.log.origin["conversation_id"])

    @property
    def spoke(self) -> bool:
        """Whether anything of the answer has come, after `started`."""
        return any(event.type == "part_started" for event in self.log.read(1, limit=1))

    def keeps_key(self, key: Key) -> bool:
        """Whether whoever comes with this key, which has started it, finds it: not where it failed
        or was abandoned.
        """
        if self.ending is None:
            return True
        abandoned = self.ending.data.get("reason") == "abandoned"
        return not (key.flight or self.ending.type == "failed" or abandoned)

    def stop(self) -> None:
        """Ends it as `cancelled` and closes the upstream's connection; after the end, nothing."""
        raise NotImplementedError

    async def spoken(self) -> None:
        """Returns once something of the answer has come, or it has ended. Cancelling it changes
        nothing.
        """
        await self._until(lambda: self.spoke or self.log.closed)

    async def reached(self, offset: int) -> None:
        """Returns once its log holds this offset, or it has ended. As `ended`."""
        await self._until(lambda: self.log.top >= offset or self.log.closed)

    async def ended(self) -> None:
        """Returns once it has ended. Cancelling it changes nothing."""
        await self._until(lambda: self.log.closed)

    async def _until(self, true: Callable[[], bool]) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def look() -> None:
            if true() and not future.done():
                future.set_result(None)

        self.log.listeners.append(look)
        try:
            look()
            await future
        finally:
            self.log.listeners.remove(look)

    def status(self) -> JSON:
        """What `GET /api/v1/streams/{id}` says: state, position, model, usage, times, error."""
        origin, ending = self.log.origin, self.ending
        data = ending.data if ending is not None else {}
        return {
            "stream_id": self.id,
            "state": ending.type if ending is not None else "running",
            "position": str(self.log.position),
            "model": origin["model"],
            "conversation_id": origin["conversation_id"] or None,
            "finish_reason": data.get("finish_reason"),
            "usage": data.get("usage"),
            "error": data.get("error"),
            "started": timestamp(origin["created"]),
            "finished": timestamp(ending.time) if ending is not None else None,
        }

    def open_to(self, who: Identity, action: str) -> bool:
        """Whether this person may do that with it, one of grants.ACTIONS: its owner, and in a room
        whoever may do it there.
        """
        room = self.log.origin["room"]
        return who.user == self.owner or bool(room and who.may(action, room))

    def text(self) -> str:
        """The answer so far."""
        return "".join(e.data["content"] for e in self.log.read(0) if is_text(e))
