"""Places in what can be followed, and why following one ends before it does."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from streaming.errors import RivuletError
from streaming.events import Event
from streaming.log import Log


class TooSlow(Exception):
    """A reader has taken nothing for `write_timeout` seconds. It is cut, and can resume."""


class Draining(Exception):
    """The server is going away, and this stream with it."""


class Expelled(Exception):
    """Whoever reads may do so no more."""

    def __init__(self, error: RivuletError) -> None:
        self.error = error


class Place(Protocol):
    """A place in something that can be followed: a log, or a room with what runs in it."""

    @property
    def source(self) -> Hashable: ...
    @property
    def logs(self) -> list[Log]: ...
    @property
    def closed(self) -> bool: ...
    @property
    def ended(self) -> bool: ...
    @property
    def behind(self) -> bool: ...
    def copy(self) -> Place: ...
    def read(self, *, merge: bool = True, limit: int = 1 << 62) -> list[Event]: ...
    def rejoined(self) -> list[Event]: ...
