"""Events and positions: what a log holds, and where in it one stands."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

_EPOCH = re.compile(r"[A-Za-z0-9_]{16,64}")
_OFFSET = re.compile(r"[0-9]{1,15}")  # below 2**53, so that JavaScript counts it exactly

JSON = dict[str, Any]


class Position(NamedTuple):
    """A place in one life of a log: after event number `offset` (from 1; 0 is before the first).

    `epoch` names that life. Without it, a log that began again after a restart would hide its whole
    beginning from a client that remembers a high offset: the client would say "I have 57" and get
    nothing until event 58. With it the client's position is of another life, and it is told so.
    On the wire `<epoch>-<offset>`.
    """

    epoch: str
    offset: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Position | None:
        """The position that `text` spells, or None where it spells none."""
        epoch, dash, offset = text.rpartition("-")
        if not dash or not _EPOCH.fullmatch(epoch) or not _OFFSET.fullmatch(offset):
            return None
        return cls(epoch, int(offset))


def new_epoch() -> str:
    """32 characters, 128 random bits: unguessable, so it serves as a stream id too."""
    return secrets.token_hex(16)


class Event(NamedTuple):
    """One event as a reader sees it.

    type: a word of design section 8. data: JSON object. id: the position after this event (after
    the last one, where several were merged). time: Unix milliseconds. origin: what every event of
    this log shares (for a generation: stream_id, conversation_id, created), so that an encoder
    needs nothing but the event.
    """

    type: str
    data: Mapping[str, Any]
    id: Position
    time: int
    origin: Mapping[str, Any]
