"""Generations that other instances make, as they are read here.

A replica is a log that is filled from the mirror of a generation: what it holds is read from Redis
once, what comes is heard, and a hole is read anew. Where its maker is lost, its end is decided in
Redis, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson

from streaming.dialects import DIALECTS, ENDINGS
from streaming.errors import Unavailable, owner_lost
from streaming.events import JSON
from streaming.generation import Generation
from streaming.log import Log, now_ms
from streaming.redis_link import Link
from streaming.redis_node import Tasks, failed, unavailable
from streaming.redis_scripts import END
from streaming.room import Room
from streaming.writer import CHARS_PER_TOKEN

if TYPE_CHECKING:
    from streaming.redis_rooms import RedisRooms

ABOVE = 1_000_000_000  # how far above the mirror the end of a lost generation stands
AGAIN = 1.0  # seconds until what could not be read is tried again
UNUSED = 30.0  # seconds after which a replica that nobody reads is let go of


class Replica(Generation):
    """A generation that another instance, `maker`, makes. tell: says a word to that instance.
    loaded: what Redis holds of it has been read; until then nothing is known of it.
    """

    mirrored = True

    def __init__(self, stream_id: str, tell: Callable[[Replica, JSON], None]) -> None:
        origin = {"stream_id": stream_id, "conversation_id": "", "room": "", "model": ""}
        super().__init__("", Log({**origin, "created": 0}, epoch=stream_id))
        self.maker = ""
        self.used = time.monotonic()
        self.loading: asyncio.Task[None] | None = None
        self.loaded = False
        self.pending: list[bytes] = []  # heard while it loads
        self._tell = tell

    def stop(self) -> None:
        """See Generation.stop: its maker is told. Raises Unavailable where it cannot be."""
        if self.ending is None:
            self._tell(self, {"stop": self.id})

    def __enter__(self) -> None:
        super().__enter__()
        if self.readers == 1 and self.ending is None:
            self._tell(self, {"reading": [self.id]})

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.used = time.monotonic()


class Replicas:
    """The replicas of this instance."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._held: dict[str, Replica] = {}
        self._tasks = Tasks()
        self.rooms: RedisRooms

    def key(self, stream_id: str, kind: str) -> str:
        """The name of what is kept of a generation."""
        return f"{self._link.prefix}stream:{{{stream_id}}}:{kind}"

    def _task(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._tasks.start(coroutine)
        task.add_done_callback(failed)
        return task

    # --- finding them

    async def find(self, stream_id: str) -> Replica | None:
        """See Mirror.find."""
        replica = self._replica(stream_id)
        replica.used = time.monotonic()
        if not replica.loaded:
            await asyncio.shield(self._load(replica))
        if not replica.loaded:
            self._forget(replica)
            return None
        return replica

    def running(self, room: Room, stream_id: str) -> Log:
        """The log of one that a room tells of."""
        replica = self._replica(stream_id)
        if not replica.loaded:
            # Only if it still runs when all that is known of the room has been read.
            asyncio.get_running_loop().call_soon(self._wanted, room, replica)
        return replica.log

    def _wanted(self, room: Room, replica: Replica) -> None:
        if replica.id in room.running:
            self._task(self._load_in(room, replica))
        elif not replica.loaded:
            self._forget(replica)

    async def _load_in(self, room: Room, replica: Replica) -> None:
        await self._load(replica)
        if not replica.loaded and room.running.get(replica.id) is replica.log:
            del room.running[replica.id]  # its maker was lost too long ago
            self._forget(replica)

    def _replica(self, stream_id: str) -> Replica:
        replica = self._held.get(stream_id)
        if replica is None:
            replica = self._held[stream_id] = Replica(stream_id, self._tell)
        return replica

    def _forget(self, replica: Replica) -> None:
        if self._held.get(replica.id) is replica:
            del self._held[replica.id]
            self._link.unsubscribe(self.key(replica.id, "events"))

    # --- filling them

    def _load(self, replica: Replica) -> asyncio.Task[None]:
        if replica.loading is None or replica.loading.done():
            replica.loading = self._task(self._read(replica))
        return replica.loading

    async def _read(self, replica: Replica) -> None:
        channel = self.key(replica.id, "events")
        await self._link.subscribe(channel, partial(self._hear, replica), ours=True)
        try:
            while not await self._look(replica):
                pass
        except Unavailable:
            if replica.loaded and self._link.reaches(channel):  # else it is said later
                asyncio.get_running_loop().call_later(AGAIN, self._hear, replica, b"")
            raise

    async def _look(self, replica: Replica) -> bool:
        """Takes what Redis has, and what was heard meanwhile; whether nothing is missing."""
        id = replica.id
        meta, entries = await asyncio.gather(
            self._link.command("HGETALL", self.key(id, "meta")),
            self._link.command("XRANGE", self.key(id, "log"), f"({replica.log.top}-0", "+"),
        )
        replica.pending, pending = [], replica.pending
        if not meta:
            if replica.loaded:  # Redis has lost it
                self._tell(replica, {"reading": [id]})
            return True
        if not replica.loaded:
            fields = {name.decode(): value.decode() for name, value in meta.items()}
            replica.maker, replica.owner = fields["maker"], fields["owner"]
            replica.dialect = DIALECTS.get(fields["dialect"])
            names = ("stream_id", "conversation_id", "room", "model")
            origin: JSON = {name: fields[name] for name in names}
            replica.log.origin = {**origin, "created": int(fields["created"])}
            replica.loaded = True
        for offset, entry in entries:
            model, events = orjson.loads(entry[b"e"])
            self._apply(replica, int(offset.partition(b"-")[0]) - len(events) + 1, model, events)
        taken = [self._take(replica, message) for message in pending]
        return all(taken)

    def _hear(self, replica: Replica, message: bytes) -> None:
        if replica.loading is not None and not replica.loading.done():
            replica.pending.append(message)
        elif not self._take(replica, message):
            self._load(replica)  # what is between; a hole that is in Redis too is one

    def _take(self, replica: Replica, message: bytes) -> bool:
        """Whether it could be taken: something before it may be missing."""
        first, _, told = message.partition(b" ")
        if not message or int(first) > replica.log.top + 1:
            return False
        self._apply(replica, int(first), *orjson.loads(told))
        return True

    def _apply(self, replica: Replica, first: int, model: str, events: Sequence[Any]) -> None:
        log = replica.log
        if model != log.origin["model"]:
            log.origin = {**log.origin, "model": model}
        for offset, (type, data, time_ms) in enumerate(events, first):
            if offset <= log.top or log.closed:
                continue
            if offset > log.top + 1:
                replica.hole = log.top
                log.skip(offset - 1)
            if isinstance(type, dict):
                log.extend(type, data, time_ms)
                continue
            event = log.append(type, data, time_ms)
            if type in ENDINGS:
                replica.ending = event
                log.close()
                self._link.unsubscribe(self.key(replica.id, "events"))

    # --- their makers

    def _tell(self, replica: Replica, word: JSON) -> None:
        channel = self._link.instance(replica.maker)
        if "stop" in word and not self._link.reaches(channel):
            raise unavailable()
        self._link.say(channel, orjson.dumps(word))

    def _room(self, replica: Replica) -> Room | None:
        """The room that does not know yet of its end, where that room is held here."""
        room = self.rooms.rooms.find(replica.log.origin["room"])
        known = room is not None and room.running.get(replica.id) is replica.log
        return room if known else None

    def unmade(self, stream_id: str) -> None:
        """Somebody reads it as made here, and it is not: `tend` ends it."""
        self._task(self.find(stream_id))

    def makers(self) -> set[str]:
        """Whom those that run need."""
        held = self._held.values()
        return {r.maker for r in held if r.loaded and (r.ending is None or self._room(r))}

    async def tend(self, gone: Iterable[str]) -> None:
        """From time to time: says what is read here, ends what has lost its maker, tells rooms of
        ends that they do not know of, and lets go of what nobody reads.
        """
        read: dict[str, list[str]] = {}
        for replica in self._held.values():
            if replica.readers and replica.ending is None:
                read.setdefault(replica.maker, []).append(replica.id)
        for maker, ids in read.items():
            self._link.say(self._link.instance(maker), orjson.dumps({"reading": ids}))
        lost = {*gone, self._link.me}  # what is made here has no replica here
        for replica in [r for r in self._held.values() if r.loaded]:
            with contextlib.suppress(Unavailable):  # the others may be elsewhere
                if replica.ending is None and replica.maker in lost:
                    await self._bury(replica)
                if (room := self._room(replica)) is not None:
                    self.rooms.retell(room, replica)
        now = time.monotonic()
        for replica in list(self._held.values()):
            used = replica.readers or replica.log.listeners or now - replica.used < UNUSED
            if not used and not self._room(replica):
                self._forget(replica)

    async def _bury(self, replica: Replica) -> None:
        """Its maker is gone: ends it, where that is still to be done, and opens its room."""
        await self._load(replica)
        if replica.ending is None:
            error, said = owner_lost(), -(-len(replica.text()) // CHARS_PER_TOKEN)
            usage = {"prompt_tokens": 0, "completion_tokens": said, "total_tokens": said}
            data = {
                "error": error.body(),
                "status": error.status,
                "usage": {**usage, "estimated": True},
                "model": replica.log.origin["model"],
            }
            told = [replica.log.origin["model"], [["failed", data, now_ms()]]]
            keys = [self.key(replica.id, "meta"), self.key(replica.id, "log")]
            channel = self.key(replica.id, "events")
            answer = self._link.call(END, keys, channel, self._link.me, ABOVE, orjson.dumps(told))
            if offset := await answer:
                # Below 0 Redis knows nothing of it any more, and nobody else will end it.
                self._apply(replica, max(offset, replica.log.top + ABOVE), *told)
            else:
                await self._load(replica)  # somebody else was quicker
        if replica.ending is not None and (name := replica.log.origin["room"]):
            await self.rooms.rooms.open(name)

    async def close(self) -> None:
        """Ends what still reads."""
        await self._tasks.end()
