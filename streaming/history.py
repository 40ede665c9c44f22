"""Rooms that outlive the process: what they hold, and their positions, in a SQLite file.

The queue is the log. A room that has changed is marked, and a batch writes what each marked room
holds and the file does not: however slow the disk, no more waits for it than the rooms hold anyway,
and what could not be written is written later. All that blocks is done by one thread, in order.

A publish does not wait for the file, so a crash may lose the last moments. Therefore a file that
was not closed in order opens with a new epoch for each room: positions that may never have been
written get a `gap`. After an orderly stop the epochs go on.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from streaming import config
from streaming.dialects import ENDINGS
from streaming.errors import CannotStart, Unavailable, owner_lost
from streaming.events import JSON, Event, Position, new_epoch
from streaming.history_file import Change, HistoryFile
from streaming.room import KEYS, Keeper, Room

logger = logging.getLogger("rivulet.history")
T = TypeVar("T")

GATHER = 0.05  # seconds in which changes gather for a batch: what a crash may lose
RETRY = 1.0  # seconds after a batch that failed
BATCH = 5000  # events in one batch, about: a room that is to be read waits for it


class _Held:
    """A room in memory. written: up to this offset the file has it."""

    __slots__ = ("deleted", "loading", "room", "written")

    def __init__(self, room: Room) -> None:
        self.room = room
        self.written = 0
        self.deleted = False
        self.loading: asyncio.Task[None] | None = None

    def change(self) -> Change:
        """What the file lacks. It is worked out from what the room holds now."""
        room, log = self.room, self.room.log
        log.trim()
        before = [e for e in room.messages if self.written < e.id.offset <= log.tail]
        keys: list[tuple[int, tuple[str, str], bytes, list[str]]] = []
        for key, (digest, ids) in reversed(room.keys.items()):
            if (offset := _offset(ids[0])) <= self.written:
                break
            keys.append((offset, key, digest, ids))
        full = len(room.keys) == KEYS
        return Change(
            name=room.name,
            epoch=log.epoch,
            tail=log.tail,
            top=log.top,
            first=room.messages[0].id.offset if room.messages else log.top + 1,
            oldest_key=_offset(next(iter(room.keys.values()))[1][0]) if full else 0,
            said=frozenset(event.id.offset for event in room.messages),
            events=before + log.read(max(self.written, log.tail)),
            keys=keys[::-1],
        )


class History(Keeper):
    """Keeps rooms in the file at `path`; a Keeper. cfg: what bounds them there as in memory."""

    keeps = True

    def __init__(self, path: str, cfg: config.Rooms) -> None:
        self._file = HistoryFile(path, int(cfg.age * 1000))
        self._thread = ThreadPoolExecutor(1, "history")
        self._held: dict[str, _Held] = {}
        self._dirty: OrderedDict[str, _Held] = OrderedDict()
        self._leaving: dict[str, _Held] = {}  # forgotten, and not yet written in full
        self._lost: set[str] = set()  # forgotten, and could not be written
        self._lock = asyncio.Lock()  # of batches
        self._writing: asyncio.Task[None] | None = None
        self._failing = self._corrupt = False
        self._whole = True  # the file has missed nothing since it was opened

    @property
    def ready(self) -> bool:
        """Whether the file takes what it is told."""
        return not self._failing and not self._corrupt

    async def start(self) -> None:
        """Opens the file, made where there is none. Raises CannotStart: what the operator must know
        of a file that is not ours, damaged, in use, or out of reach; it is left as it is.
        """
        try:
            await self._run(self._file.open)
        except (OSError, sqlite3.Error) as error:
            self._thread.shutdown()
            reason = str(error.strerror if isinstance(error, OSError) else error)
            if _code(error) == sqlite3.SQLITE_BUSY:
                reason = "another process uses it"
            elif _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                reason = "damaged, or no SQLite file; move it and its -wal away to begin anew"
            raise CannotStart(
                f"history.path: {self._file.path} cannot be used: {reason}"
            ) from error

    async def close(self) -> None:
        """Writes what is left. Only where nothing was ever missed, rooms go on in the same epochs
        when the file is opened again: also those in which nothing has been said yet.
        """
        for name, held in self._held.items():
            if held.loading is None and not held.deleted:
                self._dirty[name] = held
        async with self._lock:
            if self._writing is not None:
                self._writing.cancel()
            while self._dirty and await self._batch():
                pass
        try:
            await self._run(self._file.close, self._whole)
        except sqlite3.Error as error:
            self._fail(error)
        if self._writing is not None:
            self._writing.cancel()
        self._thread.shutdown()

    def _run(self, work: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    # --- reading

    async def open(self, room: Room) -> None:
        """See Keeper.open. A room that is held already is what it is, whatever ails the file."""
        held = self._held.get(room.name)
        if held is None or held.room is not room:
            held = self._held[room.name] = _Held(room)
            held.loading = asyncio.create_task(self._open(held))
        if held.loading is not None:
            await asyncio.shield(held.loading)

    async def _open(self, held: _Held) -> None:
        try:
            await self._load(held)
        except BaseException as error:
            self.forget(held.room)
            if isinstance(error, sqlite3.Error):
                self._fail(error)
                raise _unavailable("read") from error
            raise
        held.loading = None

    async def _load(self, held: _Held) -> None:
        room = held.room
        if room.name in self._leaving:  # its life before this one is to be there in full
            async with self._lock:
                if room.name in self._dirty:
                    self._dirty.move_to_end(room.name, last=False)
                    await self._batch()
        kept = await self._run(self._file.read, room.name)
        lost = room.name in self._lost
        self._lost.discard(room.name)
        if kept is None:
            return
        later = [event for event in kept.events if event[0] > kept.tail]
        room.restart(new_epoch() if lost else kept.epoch, kept.top - len(later))
        for offset, time_ms, type, data in kept.events[: -len(later) or None]:
            place = Position(room.log.epoch, offset)
            room.messages.append(Event(type, data, place, time_ms, room.log.origin))
        cut: dict[str, JSON] = {}  # what ran when the process before this one was cut off
        for number, (_, time_ms, type, data) in enumerate(later, 1):
            room.append(type, data, time_ms)
            if type == "started":
                cut[data["stream_id"]] = data
            elif type in ENDINGS:
                cut.pop(data["stream_id"], None)
            if number % 256 == 0:
                await asyncio.sleep(0)  # others want their turn too
        room.keys.update(((user, key), (digest, ids)) for user, key, digest, ids in kept.keys)
        held.written = kept.top
        for started in cut.values():
            room.append("failed", {**started, "content": "", "error": owner_lost().body()})
        if cut or lost:
            self._mark(room)

    def forget(self, room: Room) -> None:
        """See Keeper.forget."""
        held = self._held.get(room.name)
        if held is not None and held.room is room:
            del self._held[room.name]
            if held.loading is None and not held.deleted and held.written < room.log.top:
                self._leaving[room.name] = held

    # --- writing

    async def publish(
        self, room: Room, events: Sequence[tuple[str, JSON]], key: tuple[str, str]
    ) -> list[str]:
        """See Room.publish. It does not wait for the file."""
        ids = room.add(events, key)
        self._mark(room)
        return ids

    def conclude(self, room: Room, type: str, data: JSON) -> None:
        """See Keeper.conclude."""
        super().conclude(room, type, data)
        self._mark(room)

    def _mark(self, room: Room) -> None:
        held = self._held.get(room.name)
        if held is not None and held.room is room and not held.deleted:
            self._dirty[room.name] = held
            self._wake()

    def _wake(self) -> None:
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())

    async def _write(self) -> None:
        """Runs as long as there is something to write, or the file has to show that it is well."""
        while self._dirty or self._failing:
            await asyncio.sleep(RETRY if self._failing else GATHER)
            async with self._lock:
                await self._batch()
        self._writing = None

    async def _batch(self) -> bool:
        """Writes some of what is to be written, all of it or nothing; whether that went well."""
        batch: list[tuple[_Held, Change]] = []
        count = 0
        try:
            while self._dirty and count < BATCH:
                _, held = self._dirty.popitem(last=False)
                batch.append((held, held.change()))
                count += 1 + len(batch[-1][1].events)
            await self._run(self._file.write, [change for _, change in batch])
        except Exception as error:
            for held, change in batch:
                if self._leaving.get(change.name) is held:
                    del self._leaving[change.name]
                    self._lost.add(change.name)
                elif self._held.get(change.name) is held and not held.deleted:
                    self._dirty[change.name] = held
            self._fail(error)
            return False
        for held, change in batch:
            held.written = change.top
            if self._leaving.get(change.name) is held:
                del self._leaving[change.name]
        if self._failing:
            self._failing = False
            if self.ready:
                logger.info("history is written again", extra={"path": self._file.path})
        return True

    def _fail(self, error: Exception) -> None:
        if self.ready:
            logger.error("history failed", extra={"path": self._file.path, "reason": str(error)})
        self._corrupt |= _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
        self._failing, self._whole = True, False
        self._wake()

    async def delete(self, room: Room, user: str) -> None:
        """See Keeper.delete. Raises Unavailable where the file does not let go of it."""
        await self.open(room)
        held = self._held.get(room.name) or _Held(room)
        held.deleted = True  # what is still published in it is not written
        self._dirty.pop(room.name, None)
        try:
            await self._run(self._file.delete, room.name)
        except sqlite3.Error as error:
            held.deleted = False
            self._mark(room)
            self._fail(error)
            raise _unavailable("written") from error


def _code(error: Exception) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _offset(id: str) -> int:
    return int(id.rpartition("-")[2])


def _unavailable(done: str) -> Unavailable:
    message = f"the history cannot be {done}"
    return Unavailable(message, code="history_unavailable", retry_after=1)
