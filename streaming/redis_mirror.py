"""Generations that every instance can read, stop and resume.

A generation has one writer, its maker, which appends first and mirrors after: the mirror is a
cursor on its log, and tokens never wait for it. Other instances read a replica. A maker is alive as
long as its lease is; the end of a generation is decided in Redis, once.
"""

from __future__ import annotations

import asyncio
import math
import time
from functools import partial
from typing import Any

import orjson

from streaming import config
from streaming.errors import InvalidField, Unavailable, owner_lost
from streaming.events import JSON, Event
from streaming.generation import Generation, Key
from streaming.generations import Generations
from streaming.log import Log
from streaming.producer import Producer
from streaming.redis_link import Link
from streaming.redis_node import failed
from streaming.redis_replicas import Replicas
from streaming.redis_rooms import RedisRooms, hashed
from streaming.redis_scripts import CLAIM, FREE, MIRROR
from streaming.room import Room

INTERVAL = 0.02  # seconds that tokens are gathered before they are mirrored
AGAIN = 1.0  # seconds until what Redis has refused is tried again
CLOSING = 1.0  # seconds to mirror the last at the end


class _Mirrored:
    """How far a generation made here is mirrored."""

    __slots__ = ("done", "generation", "offset", "sending")

    def __init__(self, generation: Producer) -> None:
        self.generation = generation
        self.offset = generation.log.top
        self.sending = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class RedisMirror:
    """Mirrors what is made here, keeps this instance's lease, and sees who else has one.

    lease: seconds after which an instance that is not heard of is gone.
    """

    def __init__(self, link: Link, cfg: config.Generation, lease: float) -> None:
        self.replicas = Replicas(link)
        self._link = link
        self._lease = lease
        self.renewed = -math.inf  # when this instance's lease last was
        self._steady = 0.0  # since when it has been in time, always
        self._kept = int((cfg.total_timeout + cfg.retention + 2 * lease) * 1000)
        self._mirrored: dict[str, _Mirrored] = {}
        self._dirty: dict[str, _Mirrored] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.generations: Generations
        self.rooms: RedisRooms

    # --- what is made here

    async def claim(self, generation: Producer) -> str:
        """See Mirror.claim. While Redis is away a generation without a room starts unleased."""
        key = generation.ask.key
        try:
            await asyncio.gather(*self._describe(generation))
            before = "" if key is None else await self._claim(generation.id, key)
        except InvalidField:
            self._withdraw(generation)
            raise
        except Unavailable:
            if generation.ask.room is not None:
                raise
            before = ""
        if before:
            self._withdraw(generation)
        else:
            self._follow(generation)
        return before

    async def _claim(self, id: str, key: Key) -> str:
        """Takes the key for this generation, or the id of the one that has it. One that failed, was
        abandoned or is not known any more has it no longer. Raises InvalidField, Unavailable.
        """
        value, dead = f"{id} {hashed(key.digest)}", ""
        while True:
            name = self._idempotent(key)
            reply = await self._link.call(CLAIM, [name], value, dead, self._kept)
            if reply is None:
                return ""
            dead = str(reply.decode())
            before, digest = dead.split()
            found = await self.find(before)
            if found is None or not found.keeps_key(key):
                continue
            if digest != hashed(key.digest):
                raise InvalidField("Idempotency-Key", "was used before with a different body")
            return before

    def _describe(self, generation: Producer) -> list[asyncio.Future[Any]]:
        """Writes down what it is, and that nothing of it is mirrored yet."""
        origin, key = generation.log.origin, self.replicas.key(generation.id, "meta")
        dialect = generation.dialect.name if generation.dialect is not None else ""
        fields = {**origin, "maker": self._link.me, "owner": generation.owner, "dialect": dialect}
        told = [item for field in {**fields, "top": 0}.items() for item in field]
        return [
            self._link.command("DEL", self.replicas.key(generation.id, "log")),
            self._link.command("HSET", key, *told),
            self._link.command("PEXPIRE", key, self._kept),
        ]

    def _withdraw(self, generation: Producer) -> None:
        self._link.command("DEL", self.replicas.key(generation.id, "meta"))

    def _idempotent(self, key: Key) -> str:
        return f"{self._link.prefix}key:{{{hashed(f'{key.scope} {key.key}'.encode())}}}"

    def free(self, key: Key, stream_id: str) -> None:
        """See Mirror.free."""
        # Where it is not done, whoever comes with it sees how it ended.
        value = f"{stream_id} {hashed(key.digest)}"
        self._link.call(FREE, [self._idempotent(key)], value)

    def _follow(self, generation: Producer) -> None:
        mirrored = self._mirrored[generation.id] = _Mirrored(generation)
        generation.log.listeners.append(partial(self._appended, mirrored))

    def _appended(self, mirrored: _Mirrored) -> None:
        self._dirty[mirrored.generation.id] = mirrored
        if mirrored.generation.log.closed:
            self._flush()  # who has seen the end here may look for it elsewhere
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(INTERVAL, self._flush)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        dirty, self._dirty = self._dirty, {}
        for id, mirrored in dirty.items():
            if not self._link.reaches(self.replicas.key(id, "meta")):
                self._dirty[id] = mirrored  # `restored` comes back to it
            elif not mirrored.sending and mirrored.offset < mirrored.generation.log.top:
                self._send(mirrored)

    def _send(self, mirrored: _Mirrored) -> None:
        """Sends what is new, or nothing, to learn whether it is still ours to end."""
        log, ending = mirrored.generation.log, mirrored.generation.ending
        events = log.read(mirrored.offset, merge=False, limit=1 << 20)
        first, last = mirrored.offset + 1, mirrored.offset + len(events)
        ended = ending.type if ending is not None and ending.id.offset == last else ""
        told = orjson.dumps([log.origin["model"], [_told(event) for event in events]])
        keys = [self.replicas.key(log.epoch, "meta"), self.replicas.key(log.epoch, "log")]
        channel = self.replicas.key(log.epoch, "events")
        arguments = channel, self._link.me, self._kept, first, last, told, ended
        answer = self._link.call(MIRROR, keys, *arguments)
        mirrored.sending = True
        answer.add_done_callback(partial(self._sent, mirrored, last))

    def _sent(self, mirrored: _Mirrored, last: int, answer: asyncio.Future[Any]) -> None:
        mirrored.sending = False
        generation = mirrored.generation
        if failed(answer):
            self._dirty[generation.id] = mirrored
            asyncio.get_running_loop().call_later(AGAIN, self._flush)  # Redis may have been slow
            return
        reply = answer.result()
        if isinstance(reply, int) and reply < 0:
            mirrored.done.cancel()  # its room is told of that end, and not of ours
            self._drop(mirrored)
            self.generations.drop(generation)
            generation.fenced(owner_lost(), -reply)
            room = generation.ask.room
            if room is not None and generation.id in room.running:
                room.running[generation.id] = self.replicas.running(room, generation.id)
            return
        if reply == b"lost":  # Redis has lost it: all of it again
            mirrored.offset = 0
            self._describe(generation)
        else:
            mirrored.offset = last if reply == b"ok" else int(reply)
        if mirrored.offset < generation.log.top:
            self._send(mirrored)
        elif generation.log.closed:
            self._drop(mirrored)

    def _drop(self, mirrored: _Mirrored) -> None:
        self._mirrored.pop(mirrored.generation.id, None)
        self._dirty.pop(mirrored.generation.id, None)
        if not mirrored.done.done():
            mirrored.done.set_result(None)

    async def mirrored(self, stream_id: str) -> None:
        """Returns once all of it is mirrored; is cancelled where another has ended it."""
        if (mirrored := self._mirrored.get(stream_id)) is not None:
            await asyncio.shield(mirrored.done)

    # --- what is made elsewhere

    async def find(self, stream_id: str) -> Generation | None:
        """See Mirror.find."""
        return self.generations.held_here(stream_id) or await self.replicas.find(stream_id)

    def running(self, room: Room, stream_id: str) -> Log:
        """The log of a generation that a room tells of: of this instance's own, or a replica."""
        own = self.generations.held_here(stream_id)
        if own is None:
            return self.replicas.running(room, stream_id)
        # Its end was not told, or is lost: unless it is there, when all of the room has been read.
        asyncio.get_running_loop().call_soon(self.rooms.retell, room, own)
        return own.log

    # --- leases, and what instances tell each other

    def heard(self, word: JSON) -> None:
        """Another instance says something about what is made here."""
        if (generation := self.generations.held_here(word.get("stop", ""))) is not None:
            generation.stop()
        for stream_id in word.get("reading", ()):
            if (generation := self.generations.held_here(stream_id)) is None:
                self.replicas.unmade(stream_id)
                continue
            generation.read_elsewhere = time.monotonic() + self._lease
            if generation.ending is not None and stream_id not in self._mirrored:
                self._follow(generation)  # Redis has lost it, or its end
                self._send(self._mirrored[stream_id])

    def restored(self) -> None:
        """Redis is heard again, or this instance's lease was over: what was made goes there. Others
        may have taken it for lost, and ended what it makes.
        """
        for mirrored in self._mirrored.values():
            if not mirrored.sending:
                self._send(mirrored)

    async def tend(self) -> None:
        """From time to time: renews this instance's lease, and sees whether others are gone. Raises
        Unavailable.
        """
        milliseconds = int(self._lease * 1000)
        name = self._link.instance(self._link.me)
        known = await self._link.command("SET", name, 1, "GET", "PX", milliseconds)
        now = time.monotonic()
        if now - self.renewed > self._lease / 2:
            # What kept this instance from renewing its lease in time, may have kept others.
            self._steady = now
        if known is None and self.renewed > 0:
            self.restored()
            self.rooms.restored()
        self.renewed = now
        gone: list[str] = []
        names = sorted(self.replicas.makers() | self.rooms.instances())
        if names and now - self._steady >= self._lease:
            keys = map(self._link.instance, names)
            alive = await asyncio.gather(*(self._link.command("EXISTS", key) for key in keys))
            gone = [name for name, there in zip(names, alive, strict=True) if not there]
        for name in gone:
            self.rooms.gone(name)
        await self.replicas.tend(gone)

    async def finish(self) -> None:
        """Mirrors what it can."""
        if self._link.up and self._mirrored:
            self._flush()
            await asyncio.wait([m.done for m in self._mirrored.values()], timeout=CLOSING)

    async def close(self) -> None:
        """Gives up the lease, and ends."""
        await self.replicas.close()
        self._link.command("DEL", self._link.instance(self._link.me))


def _told(event: Event) -> list[Any]:
    if event.type == "delta" and "extra" not in event.data:
        head = {name: value for name, value in event.data.items() if name != "content"}
        return [head, event.data["content"], event.time]
    return [event.type, event.data, event.time]
