"""Rooms whose order Redis decides, because they have many writers.

A room's log changes only in that order: from what is heard on its channel or from a publisher's own
reply, whichever comes first, by offset; a hole is filled from its stream. A room that nobody uses
here is let go of, and read anew when somebody comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any, Protocol
from urllib.parse import quote

import orjson

from streaming import config
from streaming.delivery import Delivery
from streaming.errors import InvalidField, TooLarge, Unavailable
from streaming.events import JSON, Event, Position, new_epoch
from streaming.generation import Generation
from streaming.log import Log, now_ms
from streaming.redis_link import Link
from streaming.redis_listing import Listing
from streaming.redis_node import Tasks, failed
from streaming.redis_scripts import DELETE, LOOK, PUBLISH
from streaming.room import KEYS, Keeper, Room
from streaming.rooms import Rooms

MESSAGE_BYTES = 16 << 20  # Redis cuts a subscriber that has more than 32 MB to take
AGAIN = 1.0  # seconds between two attempts to read a room, or to tell it of an end
PEOPLE = 7 * 86_400.0  # seconds that who is in a room is kept, longer than a connection lasts
SETTLING = 1.0  # seconds that this may take while somebody waits
THEIRS = "keys", "order"  # where idempotency keys of clients are kept, and in what order
OURS = "sent", "sending"  # the same of ours, of which there are many, for a short time


class Answers(Protocol):
    """What rooms need of the generations that run in them."""

    async def mirrored(self, stream_id: str) -> None:
        """Returns once others can have all of one that is made here."""

    def running(self, room: Room, stream_id: str) -> Log:
        """The log of one that a room tells of."""


class _Held:
    """A room that is subscribed to."""

    __slots__ = ("loading", "opened", "pending", "room")

    def __init__(self, room: Room) -> None:
        self.room = room
        self.opened = False
        self.loading: asyncio.Task[None] | None = None
        self.pending: list[bytes] = []  # heard while it loads


class RedisRooms(Keeper):
    """Keeps the rooms of this instance at what Redis holds."""

    keeps = True

    def __init__(self, link: Link, cfg: config.Rooms, delivery: Delivery) -> None:
        self._link = link
        self._me = link.me
        self._config = cfg
        self._delivery = delivery
        self._held: dict[str, _Held] = {}
        self._count = itertools.count()
        self._tasks = Tasks()
        self._concluding: dict[str, set[asyncio.Task[None]]] = {}  # by room
        self._unsaid: set[tuple[Room, str]] = set()  # who came or left, which Redis does not know
        self.rooms: Rooms  # whose keeper this is
        self.listing = Listing(link, lambda: [room.summary for room in self.rooms])
        self.mirror: Answers

    def _key(self, room: Room, kind: str) -> str:
        return f"{self._link.prefix}room:{{{quote(room.name, safe='')}}}:{kind}"

    def _keys(self, room: Room) -> list[str]:
        return [self._key(room, "meta"), self._key(room, "log")]

    @property
    def _life(self) -> tuple[str, int]:
        return new_epoch(), int(self._config.age * 1000)

    # --- what is held here

    async def open(self, room: Room) -> None:
        """See Keeper.open: subscribed first, then read, so that nothing is between the two. A room
        that is held already is what it is, also while Redis is away.
        """
        held = self._held.get(room.name)
        if held is None or held.room is not room:
            held = self._held[room.name] = _Held(room)
            held.loading = asyncio.create_task(self._open(held))
        if not held.opened and held.loading is not None:
            await asyncio.shield(held.loading)

    async def _open(self, held: _Held) -> None:
        try:
            channel = self._key(held.room, "events")
            await self._link.subscribe(channel, partial(self._hear, held), ours=True)
            await self._load(held)
        except BaseException:
            self.forget(held.room)
            raise
        held.opened = True

    async def reach(self, room: Room, after: str) -> None:
        """See Keeper.reach: this instance may hear of an event later than others' readers."""
        position, held = Position.parse(after), self._held.get(room.name)
        if position is None or held is None or room.log.holds(position):
            return
        if position.epoch != room.log.epoch or position.offset > room.log.top:
            await asyncio.shield(self._reload(held))

    async def settle(self, room: Room) -> None:
        """See Keeper.settle."""
        if tasks := self._concluding.get(room.name):
            await asyncio.wait(tasks, timeout=SETTLING)

    def forget(self, room: Room) -> None:
        """See Keeper.forget."""
        held = self._held.get(room.name)
        if held is not None and held.room is room:
            del self._held[room.name]
            self._link.unsubscribe(self._key(room, "events"))

    def restored(self) -> None:
        """Redis is heard again, or this instance's lease was over: says who is here."""
        for held in self._held.values():
            for user in held.room.people:
                self.entered(held.room, user)

    def tend(self) -> None:
        """From time to time: says again what Redis did not take."""
        unsaid, self._unsaid = self._unsaid, set()
        for room, user in unsaid:
            (self.entered if user in room.people else self.left)(room, user)

    def _reload(self, held: _Held) -> asyncio.Task[None]:
        if held.loading is None or held.loading.done():
            held.loading = self._task(self._load(held))
        return held.loading

    def _task(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        async def quiet() -> None:
            with contextlib.suppress(Unavailable):  # done again when Redis is back
                await coroutine

        return self._tasks.start(quiet())

    async def _load(self, held: _Held) -> None:
        while True:
            try:
                await self._look(held)
            except Unavailable:
                if self._link.reaches(self._key(held.room, "log")):  # else it is said later
                    asyncio.get_running_loop().call_later(AGAIN, self._hear, held, b"")
                raise
            held.opened, pending, held.pending = True, held.pending, []
            taken = [self._take(held, message) for message in pending]
            if all(taken):
                return

    async def _look(self, held: _Held) -> None:
        room, log = held.room, held.room.log
        (epoch, top, entries), people = await asyncio.gather(
            self._link.call(LOOK, self._keys(room), *self._life, log.epoch, log.top),
            self._link.command("HKEYS", self._key(room, "people")),
        )
        first = _offset(entries[0]) if entries else top + 1
        if epoch.decode() != room.log.epoch or first > room.log.top + 1:
            room.restart(epoch.decode(), first - 1)
        for entry in entries:
            if _offset(entry) > room.log.top:  # a publisher's reply may have been quicker
                room.append(*orjson.loads(entry[1][1]))
        elsewhere: dict[str, set[str]] = {}
        for instance, _, user in (name.decode().partition(" ") for name in people):
            if instance != self._me:
                elsewhere.setdefault(instance, set()).add(user)
        self._meet(room, elsewhere)

    def _hear(self, held: _Held, message: bytes) -> None:
        if not held.opened or (held.loading is not None and not held.loading.done()):
            held.pending.append(message)
        elif not self._take(held, message):
            self._reload(held)

    def _take(self, held: _Held, message: bytes) -> bool:
        """Whether it could be taken: something before it may be missing."""
        if not message:
            return False
        if message[:1] == b"{":
            self._passing(held.room, orjson.loads(message))
            return True
        epoch, first, events = message.split(b" ", 2)
        return self._apply(held, epoch.decode(), int(first), orjson.loads(events))

    def _apply(self, held: _Held, epoch: str, first: int, events: Sequence[Sequence[Any]]) -> bool:
        room = held.room
        if epoch != room.log.epoch or first > room.log.top + 1:
            return False
        for event in events[room.log.top + 1 - first :]:
            room.append(*event)
        return True

    # --- publishing

    async def publish(
        self, room: Room, events: Sequence[tuple[str, JSON]], key: tuple[str, str]
    ) -> list[str]:
        """See Room.publish. A call that Redis did not answer is repeated with the same key. A key
        of nobody's is of an end, which is not to begin a room that has been deleted.
        """
        user, given = key
        digest, name, kinds = "-", f"{self._me} {next(self._count)}", OURS
        if given:
            digest = hashed(orjson.dumps(events, option=orjson.OPT_SORT_KEYS))
            name, kinds = hashed(f"{user}\n{given}".encode()), THEIRS
        now = now_ms()
        told = [orjson.dumps([type, data, now]) for type, data in events]
        if sum(map(len, told)) > MESSAGE_BYTES:
            raise TooLarge(f"more than {MESSAGE_BYTES} bytes at once", param="body")
        keys = [*self._keys(room), *(self._key(room, kind) for kind in kinds)]
        bounds = KEYS, self._config.events, self._config.bytes
        where = self._key(room, "events"), "" if user or not given else "there"
        reply = await self._link.call(
            PUBLISH, keys, *self._life, name, digest, *bounds, *where, *told
        )
        if not reply:
            return []
        told_now: list[tuple[str, JSON, int]] = [(type, data, now) for type, data in events]
        if len(reply) == 1:
            before, *reply = reply[0].split()
            if before.decode() != digest:
                raise InvalidField("Idempotency-Key", "was used before with a different body")
            told_now = []  # it was another time that they were told
        epoch, first = reply[0].decode(), int(reply[1])
        last = first + len(events) - 1
        held = self._held.get(room.name)
        if held is not None and held.opened:
            self._apply(held, epoch, first, told_now)
            for _ in range(2):  # one that is under way may have looked before
                if held.room.log.epoch != epoch or held.room.log.top < last:
                    await asyncio.shield(self._reload(held))
        return [f"{epoch}-{offset}" for offset in range(first, last + 1)]

    def conclude(self, room: Room, type: str, data: JSON) -> None:
        """See Keeper.conclude: once it is mirrored, and as soon as Redis is there."""
        tasks = self._concluding.setdefault(room.name, set())
        tasks.add(task := self._task(self._conclude(room, type, data)))

        def done(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            if not tasks and self._concluding.get(room.name) is tasks:
                del self._concluding[room.name]

        task.add_done_callback(done)

    async def _conclude(self, room: Room, type: str, data: JSON) -> None:
        await self.mirror.mirrored(data["stream_id"])
        while not room.log.closed:  # it has been deleted
            try:
                await self.publish(room, [(type, data)], ("", f"end {data['stream_id']}"))
            except InvalidField:
                return  # another instance has told another end of it
            except Unavailable:
                await asyncio.sleep(AGAIN)
            else:
                return

    def retell(self, room: Room, generation: Generation) -> None:
        """Tells the room of the end of this one, where it takes it for running."""
        ending = generation.ending
        if ending is not None and generation.id in room.running:
            said = {"stream_id": generation.id, "user_id": generation.owner}
            told = {**said, "content": generation.text(), **ending.data}
            self.conclude(room, ending.type, told)

    def running(self, room: Room, stream_id: str) -> Log | None:
        """See Keeper.running."""
        return self.mirror.running(room, stream_id)

    # --- who is here, and what passes by

    def entered(self, room: Room, user: str) -> None:
        """See Keeper.entered. A field each; those of an instance that crashed go with it."""
        self._note(room, user, "HSET", "")
        self._link.command("PEXPIRE", self._key(room, "people"), int(PEOPLE * 1000))
        self._say(room, {"in": user})

    def left(self, room: Room, user: str) -> None:
        """See Keeper.left."""
        self._note(room, user, "HDEL")
        self._say(room, {"out": user})

    def _note(self, room: Room, user: str, name: str, *value: str) -> None:
        """Tells Redis; `tend` does again where it may not have come through."""

        def said(answer: asyncio.Future[Any]) -> None:
            if failed(answer):
                self._unsaid.add((room, user))

        key, field = self._key(room, "people"), f"{self._me} {user}"
        self._link.command(name, key, field, *value).add_done_callback(said)

    def told(self, room: Room, event: Event) -> None:
        """See Keeper.told."""
        self._say(room, {"told": [event.type, event.data]})

    def _say(self, room: Room, word: JSON) -> None:
        self._link.say(self._key(room, "events"), orjson.dumps({"by": self._me, **word}))

    def _passing(self, room: Room, word: JSON) -> None:
        by = word["by"]
        if by == self._me:
            return
        if "in" in word:
            known = room.has(word["in"])
            room.elsewhere.setdefault(by, set()).add(word["in"])
            if not known:
                self._tell(room, "user_joined", word["in"])
        elif "out" in word:
            known = room.has(word["out"])
            room.elsewhere.get(by, set()).discard(word["out"])
            if known and not room.has(word["out"]):
                self._tell(room, "user_left", word["out"])
        elif "told" in word:
            self._delivery.broadcast(room, room.ephemeral(*word["told"]))
        elif "deleted" in word:
            self.rooms.end(room.name, word["deleted"])

    def _meet(self, room: Room, elsewhere: dict[str, set[str]]) -> None:
        """Takes these for the people elsewhere, and tells who came and who went."""
        before, room.elsewhere = room.elsewhere, elsewhere
        was, now = set().union(*before.values()), set().union(*elsewhere.values())
        for type, users in (("user_joined", now - was), ("user_left", was - now)):
            for user in sorted(users - room.people.keys()):
                self._tell(room, type, user)

    def _tell(self, room: Room, type: str, user: str) -> None:
        if type == "user_left":
            room.left = time.monotonic()
        self._delivery.broadcast(room, room.ephemeral(type, {"userId": user}))

    def instances(self) -> set[str]:
        """The other instances that have people in rooms held here."""
        return {instance for held in self._held.values() for instance in held.room.elsewhere}

    def gone(self, instance: str) -> None:
        """This instance is no more: its people leave."""
        for held in self._held.values():
            if instance in held.room.elsewhere:
                fields = [f"{instance} {user}" for user in held.room.elsewhere[instance]]
                if fields:
                    self._link.command("HDEL", self._key(held.room, "people"), *fields)
                here = held.room.elsewhere.items()
                self._meet(held.room, {name: users for name, users in here if name != instance})

    async def elsewhere(self) -> tuple[list[JSON], bool]:
        """See Keeper.elsewhere."""
        return await self.listing.ask()

    async def delete(self, room: Room, user: str) -> None:
        """See Keeper.delete."""
        keys = [self._key(room, kind) for kind in ("meta", "log", "people", *OURS, *THEIRS)]
        word = orjson.dumps({"by": self._me, "deleted": user})
        await self._link.call(DELETE, keys, self._key(room, "events"), word)

    async def close(self) -> None:
        """Says what is still to be said, as far as that works at once, and ends."""
        await self._tasks.end(SETTLING if self._link.up else 0)


def _offset(entry: Sequence[bytes]) -> int:
    return int(entry[0].partition(b"-")[0])


def hashed(text: bytes) -> str:
    """A digest, short enough for a key."""
    return hashlib.sha256(text).hexdigest()
