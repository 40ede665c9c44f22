"""The SQLite file behind streaming/history.py. Everything here blocks; one thread calls it.

Each room has a row, its events that are held, and the keys that it remembers. A flag says whether
the file was closed in order; it is cleared, and that is on the disk, before anything else happens.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import orjson

from streaming.events import JSON, Event
from streaming.log import now_ms

LOCK_WAIT = 5.0  # seconds for the process before this one to let go of the file
AGE_EVERY = 60.0  # seconds between two looks for rooms that nobody has used for long
AGE_BITE = 100  # such rooms at once
OURS = 0x52495655  # marks a SQLite file as a history, and as one of this form
SCHEMA = """
CREATE TABLE life (clean INTEGER NOT NULL);
INSERT INTO life VALUES (1);
CREATE TABLE rooms (
    name TEXT PRIMARY KEY, epoch TEXT NOT NULL, tail INTEGER NOT NULL, top INTEGER NOT NULL,
    used INTEGER NOT NULL
);
CREATE INDEX rooms_used ON rooms (used);
CREATE TABLE events (
    room TEXT, offset INTEGER, time INTEGER NOT NULL, said INTEGER NOT NULL, type TEXT NOT NULL,
    data BLOB NOT NULL, PRIMARY KEY (room, offset)
);
CREATE TABLE keys (
    room TEXT, offset INTEGER, user TEXT NOT NULL, key TEXT NOT NULL, digest BLOB NOT NULL,
    ids BLOB NOT NULL, PRIMARY KEY (room, offset)
);
"""


class Change(NamedTuple):
    """What the file is to be told of a room. first: offset of the oldest message that newcomers and
    models are told, which may be older than the log; oldest_key: of the oldest key that counts.
    """

    name: str
    epoch: str
    tail: int
    top: int
    first: int
    oldest_key: int
    said: frozenset[int]
    events: list[Event]
    keys: list[tuple[int, tuple[str, str], bytes, list[str]]]


class Kept(NamedTuple):
    """What the file says of a room. events: offset, time, type and data of each."""

    epoch: str
    tail: int
    top: int
    events: list[tuple[int, int, str, JSON]]
    keys: list[tuple[str, str, bytes, list[str]]]


class HistoryFile:
    """All of it raises sqlite3.Error. age_ms: a room unused for so long may go."""

    def __init__(self, path: str, age_ms: int) -> None:
        self.path = path
        self._age_ms = age_ms
        self._aged = -math.inf  # when rooms were last looked for that nobody has used for long
        self._db: sqlite3.Connection

    def open(self) -> None:
        """Raises OSError too."""
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))  # conversations are private
        db = sqlite3.connect(self.path, LOCK_WAIT, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(db)
        except BaseException:
            db.close()
            raise
        self._db = db

    def _prepare(self, db: sqlite3.Connection) -> None:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            error = sqlite3.DatabaseError(verdict)
            error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise error
        (mark,) = db.execute("PRAGMA application_id").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if mark != OURS and tables:
            raise sqlite3.DatabaseError("it is a database of something else")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA journal_size_limit = 16777216")
        db.execute("PRAGMA synchronous = FULL")
        with _transaction(db):
            if not tables:
                for statement in SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {OURS}")
            (clean,) = db.execute("SELECT clean FROM life").fetchone()
            if not clean:
                db.execute("UPDATE rooms SET epoch = lower(hex(randomblob(16)))")
            db.execute("UPDATE life SET clean = 0")
        # From here on a crash of the machine may take the last batches, but not change their order.
        db.execute("PRAGMA synchronous = NORMAL")

    def read(self, name: str) -> Kept | None:
        """What is kept of the room of this name."""
        query = "SELECT epoch, tail, top FROM rooms WHERE name = ?"
        row = self._db.execute(query, (name,)).fetchone()
        if row is None:
            return None
        epoch, tail, top = row
        query = "SELECT offset, time, type, data FROM events WHERE room = ? ORDER BY offset"
        events = [(*rest, orjson.loads(data)) for *rest, data in self._db.execute(query, (name,))]
        query = "SELECT user, key, digest, ids FROM keys WHERE room = ? ORDER BY offset"
        keys = [(*rest, orjson.loads(ids)) for *rest, ids in self._db.execute(query, (name,))]
        return Kept(epoch, tail, top, events, keys)

    def write(self, changes: Iterable[Change]) -> None:
        """All of them or none. It writes something in any case, to see whether it can."""
        with _transaction(self._db):
            self._db.execute("UPDATE life SET clean = 0")
            for change in changes:
                self._put(change)
            if time.monotonic() > self._aged + AGE_EVERY:
                self._aged = time.monotonic()
                query = "SELECT name FROM rooms WHERE used < ? LIMIT ?"
                for row in self._db.execute(query, (now_ms() - self._age_ms, AGE_BITE)).fetchall():
                    self._drop(*row)

    def _put(self, change: Change) -> None:
        name = change.name
        self._db.execute(
            "INSERT OR REPLACE INTO rooms VALUES (?, ?, ?, ?, ?)",
            (name, change.epoch, change.tail, change.top, now_ms()),
        )
        self._db.executemany(
            "INSERT OR REPLACE INTO events VALUES (?, ?, ?, ?, ?, ?)",
            (
                (name, offset, e.time, offset in change.said, e.type, orjson.dumps(e.data))
                for e in change.events
                for offset in (e.id.offset,)
            ),
        )
        self._db.execute(
            "DELETE FROM events WHERE room = ? AND offset <= ? AND (NOT said OR offset < ?)",
            (name, change.tail, change.first),
        )
        self._db.executemany(
            "INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?, ?)",
            (
                (name, offset, user, key, digest, orjson.dumps(ids))
                for offset, (user, key), digest, ids in change.keys
            ),
        )
        if change.keys:
            self._db.execute(
                "DELETE FROM keys WHERE room = ? AND offset < ?", (name, change.oldest_key)
            )

    def delete(self, name: str) -> None:
        """Lets go of all that is kept of a room."""
        with _transaction(self._db):
            self._drop(name)

    def _drop(self, name: str) -> None:
        self._db.execute("DELETE FROM rooms WHERE name = ?", (name,))
        self._db.execute("DELETE FROM events WHERE room = ?", (name,))
        self._db.execute("DELETE FROM keys WHERE room = ?", (name,))

    def close(self, clean: bool) -> None:
        """clean: nothing that rooms hold is missing here, so positions stay good."""
        with contextlib.closing(self._db) as db:
            if clean:
                db.execute("PRAGMA synchronous = FULL")
                with _transaction(db):
                    db.execute("UPDATE life SET clean = 1")


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    with db:  # commits, or rolls back
        yield
