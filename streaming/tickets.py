"""Tickets: a word in a URL that stands for an identity, where a browser can send no header.

    issued --30 s--> gone
    issued --a WebSocket--> spent
    issued --an SSE stream--> bound to its path and query --10 minutes without one--> gone

A browser's `EventSource` comes back by the same URL, so its ticket is not spent. What a ticket is
stored as tells nobody the ticket, and one instance redeems what another has issued.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import orjson

from streaming.auth import Auth, Identity
from streaming.errors import InvalidField, Unauthorized

FRESH = 30.0  # seconds to its first use
IDLE = 600.0  # seconds that a bound one is good for without a connection
HELD = 60.0  # seconds between two calls of `keep`: a crash then takes little from IDLE
MOST = 65_536  # in this process's memory: with grants one may take kilobytes
PATH_CHARS = 2048


class Store(Protocol):
    """Where tickets are, by name, for a time. Its methods raise Unavailable, but for `extend`."""

    async def get(self, name: str) -> bytes | None:
        """What is there."""

    async def put(
        self, name: str, value: bytes, seconds: float, before: bytes | None = None
    ) -> bool:
        """Puts it there for so long; with `before` only in its place. Whether it is there now."""

    def extend(self, names: Iterable[str], seconds: float) -> None:
        """Keeps those that are there for so long from now, if that can be done now."""


class Tickets:
    """Tickets of all users."""

    def __init__(self, auth: Auth, store: Store) -> None:
        self._auth = auth
        self._store = store
        self._held: Counter[str] = Counter()  # connections by what their ticket is stored as

    async def issue(self, identity: Identity, path: str = "") -> str:
        """A ticket, good for FRESH seconds. path: the only one that it is good for, with or without
        a query; "" leaves that to its first use. Raises InvalidField, Unavailable.
        """
        if path and not (path.startswith("/") and len(path) <= PATH_CHARS):
            raise InvalidField(
                "path", f"must begin with / and have at most {PATH_CHARS} characters"
            )
        ticket = secrets.token_urlsafe(32)
        record = [identity.dump().decode(), time.time(), path and _hashed(path), ""]
        await self._store.put(_hashed(ticket), orjson.dumps(record), FRESH)
        return ticket

    async def redeem(self, ticket: str, target: str, socket: bool) -> Identity:
        """Whose it is. target: path and query of the request, as `target` gives it. socket: it is
        a WebSocket, whose ticket is spent then; of several at once, one succeeds. Raises
        Unauthorized, always the same; Unavailable.
        """
        name, bound = _hashed(ticket), _hashed(target)
        paths = "", bound, _hashed(target.partition("?")[0])
        while (held := await self._store.get(name)) is not None:
            if held.startswith(b"spent"):
                break
            dumped, issued, path, before = orjson.loads(held)
            identity = Identity.load(dumped)
            if path not in paths or before not in ("", "" if socket else bound):
                break
            if not self._auth.valid(identity, time.time()):
                break
            if float(await self._store.get(_mark(identity.user)) or 0) >= issued:
                break
            after = orjson.dumps([dumped, issued, path, bound])
            if socket:
                after = b"spent " + secrets.token_bytes(16)  # unlike what another would put there
            if await self._store.put(name, after, FRESH if socket else IDLE, before=held):
                return identity
        raise Unauthorized("the ticket is not valid", code="ticket_invalid")

    @contextmanager
    def held(self, ticket: str) -> Iterator[None]:
        """As long as this is open, there is a connection of this bound ticket."""
        name = _hashed(ticket)
        self._held[name] += 1
        try:
            yield
        finally:
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]
            self._store.extend([name], IDLE)

    def keep(self) -> None:
        """To be called every HELD seconds: what has a connection stays good."""
        self._store.extend([*self._held], IDLE)

    async def forget(self, user: str) -> None:
        """All tickets that this user has until now are good no more. Raises Unavailable."""
        # Longer than one of them can last without a connection.
        await self._store.put(_mark(user), b"%f" % time.time(), IDLE + FRESH + HELD)


def target(path_qs: str) -> str:
    """The path and raw query of a request without its ticket."""
    path, _, query = path_qs.partition("?")
    kept = "&".join(part for part in query.split("&") if not part.startswith("ticket="))
    return f"{path}?{kept}" if kept else path


class Memory:
    """The store of an instance on its own: MOST at most, the longest unused leave."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[bytes, float]] = {}  # with when it goes; the newest use last
        self._swept = time.monotonic()

    async def get(self, name: str) -> bytes | None:
        """See Store.get."""
        value, until = self._kept.get(name, (None, 0.0))
        return value if time.monotonic() < until else None

    async def put(
        self, name: str, value: bytes, seconds: float, before: bytes | None = None
    ) -> bool:
        """See Store.put. Nothing comes between look and change: nobody is waited for."""
        if before is not None and await self.get(name) != before:
            return False
        self._kept.pop(name, None)
        self._sweep()
        while len(self._kept) >= MOST:
            del self._kept[next(iter(self._kept))]
        self._kept[name] = value, time.monotonic() + seconds
        return True

    def extend(self, names: Iterable[str], seconds: float) -> None:
        """See Store.extend."""
        now = time.monotonic()
        for name in names:
            value, until = self._kept.pop(name, (b"", 0.0))
            if now < until:
                self._kept[name] = value, now + seconds
        self._sweep()

    def _sweep(self) -> None:
        now = time.monotonic()
        if now - self._swept > FRESH:
            self._swept = now
            self._kept = {n: kept for n, kept in self._kept.items() if now < kept[1]}


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _mark(user: str) -> str:
    return f"forgotten:{_hashed(user)}"
