"""Generations that every instance can read, stop and resume.

A generation has one writer, its maker, which appends first and mirrors after: the mirror is a
cursor on its log, and tokens never wait for it. Other instances read a replica. A maker is alive as
long as its lease is; the end of a generation is decided in Redis, once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import orjson

from streaming import config
from streaming.dialects import DIALECTS, ENDINGS
from streaming.errors import InvalidField, RivuletError, Unavailable
from streaming.events import JSON
from streaming.generation import Generation, Key
from streaming.generations import Generations
from streaming.log import Log, now_ms
from streaming.producer import Producer
from streaming.redis_link import Link
from streaming.redis_rooms import RedisRooms, hashed
from streaming.redis_scripts import END, MIRROR
from streaming.rooms import Room
from streaming.writer import CHARS_PER_TOKEN

INTERVAL = 0.02  # seconds that tokens are gathered before they are mirrored
ABOVE = 1_000_000_000  # how far above the mirror the end of a lost generation stands
UNUSED = 30.0  # seconds after which a replica that nobody reads is let go of


class Replica(Generation):
    """A generation that another instance makes. `known`: something is known of it."""

    mirrored = True

    def __init__(self, stream_id: str, stop: Any) -> None:
        origin = {"stream_id": stream_id, "conversation_id": "", "room": "", "model": ""}
        super().__init__("", Log({**origin, "created": 0}, epoch=stream_id))
        self.maker = ""
        self.used = time.monotonic()
        self.loading: asyncio.Task[None] | None = None
        self.loaded = False
        self.pending: list[bytes] = []
        self._stop = stop

    def stop(self) -> None:
        """See Generation.stop: its maker is told."""
        if self.ending is None:
            self._stop(self)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.used = time.monotonic()


class _Mirrored:
    """How far a generation made here is mirrored."""

    __slots__ = ("done", "generation", "offset", "sending")

    def __init__(self, generation: Producer) -> None:
        self.generation = generation
        self.offset = 0
        self.sending = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class RedisMirror:
    """Mirrors what is made here, and holds replicas of what is read here and made elsewhere.

    me: this instance's name. lease: seconds after which an instance that is not heard of is gone.
    """

    def __init__(
        self, link: Link, me: str, prefix: str, cfg: config.Generation, lease: float
    ) -> None:
        self._link = link
        self._me = me
        self._prefix = prefix
        self._lease = lease
        self._kept = int((cfg.total_timeout + cfg.retention + 2 * lease) * 1000)
        self._mirrored: dict[str, _Mirrored] = {}
        self._dirty: dict[str, _Mirrored] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._replicas: dict[str, Replica] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.generations: Generations
        self.rooms: RedisRooms

    def _key(self, stream_id: str, kind: str) -> str:
        return f"{self._prefix}stream:{{{stream_id}}}:{kind}"

    def instance(self, name: str) -> str:
        """The channel of an instance, and the key of its lease."""
        return f"{self._prefix}instance:{name}"

    def _task(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    # --- what is made here

    async def claim(self, generation: Producer) -> str:
        """See Mirror.claim. While Redis is away a generation without a room starts unleased."""
        key = generation.ask.key
        try:
            if key is not None:
                value = f"{generation.id} {hashed(key.digest)}"
                reply = await self._link.command(
                    "SET", self._idempotent(key), value, "NX", "GET", "PX", self._kept
                )
                if reply is not None:
                    before, digest = reply.decode().split()
                    if digest != hashed(key.digest):
                        raise InvalidField(
                            "Idempotency-Key", "was used before with a different body"
                        )
                    return str(before)
            await asyncio.gather(*self._describe(generation))
        except Unavailable:
            if generation.ask.room is not None:
                raise
        mirrored = self._mirrored[generation.id] = _Mirrored(generation)
        generation.log.listeners.append(partial(self._appended, mirrored))
        return ""

    def _describe(self, generation: Producer) -> list[asyncio.Future[Any]]:
        """Writes down what it is, and that nothing of it is mirrored yet."""
        origin, key = generation.log.origin, self._key(generation.id, "meta")
        dialect = generation.dialect.name if generation.dialect is not None else ""
        fields = {**origin, "maker": self._me, "owner": generation.owner, "dialect": dialect}
        told = [item for field in {**fields, "top": 0}.items() for item in field]
        return [
            self._link.command("DEL", self._key(generation.id, "log")),
            self._link.command("HSET", key, *told),
            self._link.command("PEXPIRE", key, self._kept),
        ]

    def _idempotent(self, key: Key) -> str:
        return f"{self._prefix}key:{hashed(f'{key.scope} {key.key}'.encode())}"

    def free(self, key: Key, stream_id: str) -> None:
        """See Mirror.free."""
        if self._link.up:
            self._link.command("DEL", self._idempotent(key))

    def _appended(self, mirrored: _Mirrored) -> None:
        self._dirty[mirrored.generation.id] = mirrored
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(INTERVAL, self._flush)

    def _flush(self) -> None:
        self._timer = None
        if not self._link.up:
            return  # `restored` comes back to them
        dirty, self._dirty = self._dirty, {}
        for mirrored in dirty.values():
            if not mirrored.sending:
                self._send(mirrored)

    def _send(self, mirrored: _Mirrored) -> None:
        log, ending = mirrored.generation.log, mirrored.generation.ending
        events = log.read(mirrored.offset, merge=False, limit=1 << 20)
        if not events:
            return
        last = events[-1].id.offset
        ended = ending.type if ending is not None and ending.id.offset == last else ""
        told = orjson.dumps([log.origin["model"], [_told(event) for event in events]])
        keys = [self._key(log.epoch, "meta"), self._key(log.epoch, "log")]
        first = mirrored.offset + 1
        channel = self._key(log.epoch, "events")
        arguments = channel, self._me, self._kept, first, last, told, ended
        mirrored.sending = True
        answer = self._link.call(MIRROR, keys, *arguments)
        answer.add_done_callback(partial(self._sent, mirrored, last))

    def _sent(self, mirrored: _Mirrored, last: int, answer: asyncio.Future[Any]) -> None:
        mirrored.sending = False
        generation = mirrored.generation
        if answer.cancelled() or answer.exception() is not None:
            self._dirty[generation.id] = mirrored
            if self._link.up:  # Redis refuses, or was slow once
                asyncio.get_running_loop().call_later(1.0, self._flush)
            return
        reply = answer.result()
        if reply == b"fenced":
            self._drop(mirrored)
            self.generations.drop(generation)
            generation.fenced(lost())
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
        """Returns once all of it is mirrored."""
        if (mirrored := self._mirrored.get(stream_id)) is not None:
            await asyncio.shield(mirrored.done)

    # --- what is made elsewhere

    async def find(self, stream_id: str) -> Generation | None:
        """See Mirror.find."""
        replica = self._replicas.get(stream_id) or self._replica(stream_id)
        replica.used = time.monotonic()
        if not replica.loaded:
            await asyncio.shield(self._load(replica))
        if not replica.maker:
            self._forget(replica)
            return None
        return replica

    def running(self, room: Room, stream_id: str) -> Log | None:
        """The log of a generation that a room tells of: of this instance's own, or a replica."""
        own = self.generations.running_here(stream_id)
        if own is not None:
            return own.log
        replica = self._replicas.get(stream_id) or self._replica(stream_id)
        if not replica.loaded:
            # Only if it still runs when all that is known of the room has been read.
            asyncio.get_running_loop().call_soon(self._wanted, room, replica)
        return replica.log

    def _wanted(self, room: Room, replica: Replica) -> None:
        if replica.id in room.running:
            self._load(replica)
        else:
            self._forget(replica)

    def _replica(self, stream_id: str) -> Replica:
        replica = self._replicas[stream_id] = Replica(stream_id, self._stop)
        return replica

    def _load(self, replica: Replica) -> asyncio.Task[None]:
        if replica.loading is None or replica.loading.done():
            replica.loading = self._task(self._read(replica))
        return replica.loading

    async def _read(self, replica: Replica) -> None:
        id = replica.id
        channel = self._key(id, "events")
        await self._link.subscribe(channel, partial(self._hear, replica))
        after = f"({replica.log.top}-0"
        meta, entries = await asyncio.gather(
            self._link.command("HGETALL", self._key(id, "meta")),
            self._link.command("XRANGE", self._key(id, "log"), after, "+"),
        )
        replica.pending, pending = [], replica.pending
        if meta:
            fields = {name.decode(): value.decode() for name, value in _pairs(meta)}
            replica.maker, replica.owner = fields["maker"], fields["owner"]
            replica.dialect = DIALECTS.get(fields["dialect"])
            if not replica.loaded:
                names = ("stream_id", "conversation_id", "room", "model")
                origin: JSON = {name: fields[name] for name in names}
                replica.log.origin = {**origin, "created": int(fields["created"])}
            replica.loaded = True
            for offset, entry in entries:
                model, events = orjson.loads(entry[1])
                first = int(offset.partition(b"-")[0]) - len(events) + 1
                self._apply(replica, first, model, events)
            for message in pending:
                self._take(replica, message)
            if replica.readers:
                self._mark([replica])

    def _hear(self, replica: Replica, message: bytes) -> None:
        if replica.loading is not None and not replica.loading.done():
            replica.pending.append(message)
        else:
            self._take(replica, message)

    def _take(self, replica: Replica, message: bytes) -> None:
        first, told = message.split(b" ", 1)
        if int(first) > replica.log.top + 1:
            self._load(replica)  # what is between; a hole that is in Redis too is one
        else:
            self._apply(replica, int(first), *orjson.loads(told))

    def _apply(self, replica: Replica, first: int, model: str, events: Sequence[Any]) -> None:
        log = replica.log
        if model != log.origin["model"]:
            log.origin = {**log.origin, "model": model}
        for offset, (type, data, time_ms) in enumerate(events, first):
            if offset <= log.top or log.closed:
                continue
            if offset > log.top + 1:
                log.skip(offset - 1)
            if isinstance(type, dict):
                log.extend(type, data, time_ms)
                continue
            event = log.append(type, data, time_ms)
            if type in ENDINGS:
                replica.ending = event
                log.close()
                self._link.unsubscribe(self._key(replica.id, "events"))

    def _stop(self, replica: Replica) -> None:
        self._link.say(self.instance(replica.maker), orjson.dumps({"stop": replica.id}))

    def _forget(self, replica: Replica) -> None:
        if self._replicas.get(replica.id) is replica:
            del self._replicas[replica.id]
            self._link.unsubscribe(self._key(replica.id, "events"))

    # --- leases, and what instances tell each other

    def heard(self, word: JSON) -> None:
        """Another instance says something about what is made here."""
        if "stop" in word:
            generation = self.generations.running_here(word["stop"])
            if generation is not None:
                generation.stop()
        for stream_id in word.get("reading", ()):
            generation = self.generations.running_here(stream_id)
            if generation is not None:
                generation.read_elsewhere = time.monotonic() + self._lease

    def _mark(self, replicas: Sequence[Replica]) -> None:
        """Tells the makers that these are read here."""
        read: dict[str, list[str]] = {}
        for replica in replicas:
            read.setdefault(replica.maker, []).append(replica.id)
        for maker, ids in read.items():
            self._link.say(self.instance(maker), orjson.dumps({"reading": ids}))

    def restored(self) -> None:
        """Redis is heard again: what was made goes there, what was missed comes."""
        self._dirty |= self._mirrored
        self._flush()
        for replica in self._replicas.values():
            if replica.loaded and replica.ending is None:
                self._load(replica)

    async def tend(self) -> None:
        """From time to time: renews this instance's lease, says what is read here, ends what has
        lost its maker, and lets go of what nobody reads. Raises Unavailable.
        """
        await self._link.command("SET", self.instance(self._me), 1, "PX", int(self._lease * 1000))
        now = time.monotonic()
        alive = [r for r in self._replicas.values() if r.loaded and r.ending is None]
        self._mark([replica for replica in alive if replica.readers])
        names = {replica.maker for replica in alive} | self.rooms.instances()
        if names and now - self._link.since >= self._lease:
            for name in names:
                if not await self._link.command("EXISTS", self.instance(name)):
                    self.rooms.gone(name)
                    for replica in alive:
                        if replica.maker == name:
                            await self._end(replica)
        for replica in list(self._replicas.values()):
            used = replica.readers or replica.log.listeners or now - replica.used < UNUSED
            if not used:
                self._forget(replica)

    async def _end(self, replica: Replica) -> None:
        """Ends a generation whose maker is gone, and tells its room."""
        error, said = lost(), -(-len(replica.text()) // CHARS_PER_TOKEN)
        usage = {"prompt_tokens": 0, "completion_tokens": said, "total_tokens": said}
        data = {
            "error": error.body(),
            "status": error.status,
            "usage": {**usage, "estimated": True},
            "model": replica.log.origin["model"],
        }
        told = orjson.dumps([replica.log.origin["model"], [["failed", data, now_ms()]]])
        keys = [self._key(replica.id, "meta"), self._key(replica.id, "log")]
        channel = self._key(replica.id, "events")
        ended = await self._link.call(END, keys, channel, self._me, ABOVE, told)
        name = replica.log.origin["room"]
        if ended and name:
            room = await self.rooms.rooms.open(name)
            whole = {"stream_id": replica.id, "user_id": replica.owner, "content": replica.text()}
            self.rooms.conclude(room, "failed", {**whole, **data})

    async def close(self) -> None:
        """Mirrors what it can, gives up its lease, and ends."""
        if self._link.up:
            self._flush()
            waiting = [m.done for m in self._mirrored.values()]
            if waiting:
                await asyncio.wait(waiting, timeout=1.0)
            self._link.command("DEL", self.instance(self._me))
        for task in list(self._tasks):
            task.cancel()


def lost() -> RivuletError:
    """The instance that made this is gone, and its end with it."""
    return RivuletError("the server that made this answer is gone", status=502, code="owner_lost")


def _told(event: Any) -> list[Any]:
    if event.type == "delta" and "extra" not in event.data:
        head = {name: value for name, value in event.data.items() if name != "content"}
        return [head, event.data["content"], event.time]
    return [event.type, event.data, event.time]


def _pairs(reply: Any) -> list[tuple[bytes, bytes]]:
    """Field and value, from RESP3's map or RESP2's list."""
    if isinstance(reply, dict):
        return list(reply.items())
    return list(zip(reply[::2], reply[1::2], strict=True))
