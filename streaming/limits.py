"""Limits: how often a user may ask, how much they and this process may have open.

The total and the connections from one address are this process's own: they protect it, and whoever
deals out connections among instances spreads them. What a user may have and ask for is counted on
all instances together, as far as Redis is heard; where it is not, what is counted here decides.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from streaming import config
from streaming.errors import TooMany, Unavailable
from streaming.schema import Network

T = TypeVar("T")

WINDOW = 60.0  # seconds, from a user's first request in it
RETRY = 5.0  # seconds until one more may have room
PATIENCE = 0.5  # seconds that a request waits for what others have counted
WORDS = {
    "requests": "requests a minute",
    "generations": "answers a minute",
    "connections": "connections",
    "running": "answers at once",
}


@dataclass(frozen=True, slots=True)
class Quota:
    """What is left of a rate. reset: seconds until all of it is there again."""

    limit: int
    remaining: int
    reset: float

    def headers(self) -> dict[str, str]:
        """As an answer tells it."""
        left = {"Limit": self.limit, "Remaining": self.remaining, "Reset": math.ceil(self.reset)}
        return {f"RateLimit-{name}": str(value) for name, value in left.items()}


class Shared(Protocol):
    """What instances count together, by kind and user."""

    async def hit(self, kind: str, user: str) -> tuple[int, float]:
        """Counts one; how many are in this window, and seconds to its end. Raises Unavailable."""

    async def elsewhere(self, kind: str, user: str) -> int:
        """How many other instances have that live. Raises Unavailable."""

    def tell(self, kind: str, user: str, count: int) -> None:
        """This instance has so many."""


class Entry:
    """A connection that has been let in. `leave` when it is over; once more changes nothing.
    `with entry:` it lasts as long as that is open.
    """

    __slots__ = ("_ip", "_limits", "_user")

    def __init__(self, limits: Limits, ip: str, user: str) -> None:
        self._limits: Limits | None = limits
        self._ip = ip
        self._user = user

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.leave()

    async def rename(self, user: str) -> None:
        """It turns out to be this user's. Raises TooMany."""
        if self._limits is not None:
            await self._limits.acquire("connections", user)
            self._user = user

    def leave(self) -> None:
        """It is over."""
        limits, self._limits = self._limits, None
        if limits is not None:
            limits.leave(self._ip)
            if self._user:
                limits.release("connections", self._user)


class Limits:
    """All limits but those on the size of things. rates: whether there are any in this mode."""

    def __init__(
        self, cfg: config.Limits, rates: bool = True, shared: Shared | None = None
    ) -> None:
        self._config = cfg
        self._shared = shared
        self._most = {
            "requests": cfg.requests_per_minute if rates else 0,
            "generations": cfg.generations_per_minute if rates else 0,
            "connections": cfg.connections_per_user,
            "running": cfg.running_per_user,
        }
        self._windows: dict[tuple[str, str], tuple[int, float]] = {}  # count, end; by end
        self._counts: Counter[tuple[str, str]] = Counter()
        self._addresses: Counter[str] = Counter()
        self.connections = 0

    async def admit(self, ip: str, user: str) -> Entry:
        """Lets a connection in that is to last, a stream's or a socket's. user: "" where that is
        not known yet. Raises TooMany, Unavailable.
        """
        self.enter(ip)
        try:
            if user:
                await self.acquire("connections", user)
        except BaseException:
            self.leave(ip)
            raise
        return Entry(self, ip, user)

    # --- this process

    def enter(self, ip: str) -> None:
        """A connection from this address comes in. Raises TooMany, Unavailable; those that are
        there stay.
        """
        address, most = _network(ip), self._config.connections_per_ip
        if 0 < self._config.connections <= self.connections:
            message = "the server has as many connections as it may"
            raise Unavailable(message, code="overloaded", retry_after=RETRY)
        if 0 < most <= self._addresses[address]:
            message = f"an address may have {most} connections"
            raise TooMany(message, code="too_many_connections", retry_after=RETRY)
        self.connections += 1
        self._addresses[address] += 1

    def leave(self, ip: str) -> None:
        """It has gone."""
        self.connections -= 1
        _less(self._addresses, _network(ip))

    # --- a user

    async def take(self, kind: str, user: str) -> Quota | None:
        """Counts one of "requests" or "generations"; what is left, or None where there is no limit.
        Raises TooMany.
        """
        most = self._most[kind]
        if not most:
            return None
        count, reset = self._hit(kind, user)
        if self._shared is not None:
            count, reset = await _asked(self._shared.hit(kind, user), (count, reset))
        quota = Quota(most, max(most - count, 0), reset)
        if count > most:
            message = f"a user may have {most} {WORDS[kind]}"
            raise TooMany(message, retry_after=reset, headers=quota.headers())
        return quota

    async def acquire(self, kind: str, user: str) -> None:
        """One more of "connections" or "running", to be released. Raises TooMany; those that are
        there stay.
        """
        most, others = self._most[kind], 0
        if not most:
            return
        if self._shared is not None:
            others = await _asked(self._shared.elsewhere(kind, user), 0)
        # Nobody is waited for between this and the count.
        if self._counts[kind, user] + others >= most:
            message, code = f"a user may have {most} {WORDS[kind]}", f"too_many_{kind}"
            raise TooMany(message, code=code, retry_after=RETRY)
        self._counts[kind, user] += 1
        self._tell(kind, user)

    def release(self, kind: str, user: str) -> None:
        """It is over."""
        if self._most[kind]:
            _less(self._counts, (kind, user))
            self._tell(kind, user)

    def _tell(self, kind: str, user: str) -> None:
        if self._shared is not None:
            self._shared.tell(kind, user, self._counts[kind, user])

    def _hit(self, kind: str, user: str) -> tuple[int, float]:
        now = time.monotonic()
        while self._windows:
            oldest = next(iter(self._windows))
            if self._windows[oldest][1] > now:
                break
            del self._windows[oldest]
        count, end = self._windows.get((kind, user), (0, now + WINDOW))
        self._windows[kind, user] = count + 1, end
        return count + 1, end - now


async def _asked(answer: Awaitable[T], otherwise: T) -> T:
    """What others say; where they cannot be asked, nobody is refused or kept waiting for that."""
    try:
        async with asyncio.timeout(PATIENCE):
            return await answer
    except (Unavailable, TimeoutError):
        return otherwise


def _less(counts: Counter[T], name: T) -> None:
    if counts[name] > 1:
        counts[name] -= 1
    else:
        counts.pop(name, None)


def _address(ip: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """It as an address, of IPv4 where it is one in IPv6; None where it is none."""
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return None
    return (address.ipv4_mapped if address.version == 6 else None) or address


def _network(ip: str) -> str:
    """What one client has of addresses: of IPv6 it is a /64."""
    address = _address(ip)
    if address is not None and address.version == 6:
        return address.exploded[:19]
    return str(address or ip)


def client_ip(peer: str, forwarded: str, trusted: Sequence[Network]) -> str:
    """The address of whoever asks. peer: who is connected. forwarded: X-Forwarded-For, all of it.

    Read from its end, as far as each that says something is trusted: the rest anybody may claim.
    """
    client = peer
    for said in reversed(forwarded.split(",") if forwarded else ()):
        if not _among(client, trusted):
            break
        try:
            client = str(ipaddress.ip_address(said.strip()))
        except ValueError:
            break
    return client


def _among(ip: str, networks: Sequence[Network]) -> bool:
    address = _address(ip)
    return address is not None and any(address in network for network in networks)
