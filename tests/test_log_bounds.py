"""The bounds of a log, and what becomes of positions that are past them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.config import Rooms
from streaming.events import Position
from streaming.log import Cursor, FellBehind, Log
from streaming.room import Room
from tests.properties import property_test

EPOCH = "epoch_of_this_log"
SAID = {"user_id": "u", "content": "x"}


class Bounds(NamedTuple):
    max_events: int
    max_bytes: int
    max_age: float


def survivors(model: list[tuple[int, int]], bounds: Bounds, now: int) -> int:
    """How many events stay, of (size, time): the longest end of the list within all bounds; the
    newest is never too large.
    """
    for drop in range(len(model)):
        rest = model[drop:]
        within = (
            (not bounds.max_events or len(rest) <= bounds.max_events)
            and (
                len(rest) == 1
                or not bounds.max_bytes
                or sum(size for size, _ in rest) <= bounds.max_bytes
            )
            and (not bounds.max_age or rest[0][1] >= now - bounds.max_age * 1000)
        )
        if within:
            return len(rest)
    return 0


@property_test
@given(
    st.builds(Bounds, st.integers(0, 6), st.integers(0, 90), st.integers(0, 3)),
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from([0, 1, 500, 999, 1000])), max_size=20),
)
def test_a_log_keeps_what_is_within_its_bounds(
    bounds: Bounds, steps: list[tuple[int, int]]
) -> None:
    """Count, bytes and age, each alone and together: the newest events, and no fewer than fit."""
    now = 10**12
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streaming.log.now_ms", lambda: now)
        log = Log({}, **bounds._asdict())
        model: list[tuple[int, int]] = []
        for length, pause in steps:
            now += pause
            log.append("message", {"c": "x" * length})
            model.append((len('{"c":""}') + length, now))
            kept = survivors(model, bounds, now) if any(bounds) else len(model)
            check_held(log, kept)
        now += 1500
        log.trim()
        check_held(log, survivors(model, bounds, now) if any(bounds) else len(model))


def check_held(log: Log, kept: int) -> None:
    events = log.read(log.tail)
    assert [event.id.offset for event in events] == list(range(log.top - kept + 1, log.top + 1))
    assert log.tail == log.top - kept
    assert log.size == sum(len('{"c":""}') + len(event.data["c"]) for event in events)


def test_a_cursor_behind_the_tail_is_told() -> None:
    """It never skips what was trimmed away, and stands where it stood."""
    log = Log({}, max_events=3)
    log.append("message", {})
    cursor, other = Cursor(log, 1), Cursor(log, 2)
    for _ in range(4):
        log.append("message", {})
    with pytest.raises(FellBehind):
        cursor.read()
    assert (log.tail, cursor.offset) == (2, 1)
    assert [event.id.offset for event in other.read()] == [3, 4, 5]


# Positions


def test_without_a_position_a_cursor_begins_now() -> None:
    """At the top, and without a gap."""
    cursor, opening = five_with_three_left().join(None)
    assert [(event.type, event.id) for event in opening] == [("joined", Position(EPOCH, 5))]
    assert cursor.read() == []


@pytest.mark.parametrize("offset", [2, 3, 5])
def test_a_cursor_goes_on_from_a_position(offset: int) -> None:
    """From any that is held, the tail and the top among them."""
    position = Position(EPOCH, offset)
    cursor, opening = five_with_three_left().join(str(position))
    assert [(event.type, event.id) for event in opening] == [("joined", position)]
    assert [event.id.offset for event in cursor.read()] == list(range(offset + 1, 6))


LOST: dict[str, Callable[[Log], str]] = {
    "empty": lambda log: "",
    "malformed": lambda log: "once upon a time",
    "only an offset": lambda log: "4",
    "of another log": lambda log: f"{Log({}).epoch}-4",
    "of an epoch that begins alike": lambda log: f"{EPOCH}x-4",
    "trimmed away": lambda log: f"{EPOCH}-1",
    "before everything": lambda log: f"{EPOCH}-0",
    "not yet written": lambda log: f"{EPOCH}-6",
    "far ahead": lambda log: f"{EPOCH}-{10**15 - 1}",
}


@pytest.mark.parametrize("position", LOST.values(), ids=LOST.keys())
def test_a_lost_position_is_never_silent(position: Callable[[Log], str]) -> None:
    """The cursor goes on from now, with a gap that names what was asked for and where it is."""
    room = five_with_three_left()
    asked = position(room.log)
    cursor, (gap, _) = room.join(asked)
    assert (gap.type, gap.data) == ("gap", {"requested": asked, "resumed": f"{EPOCH}-5"})
    assert cursor.read() == []
    room.append("message", SAID)
    assert [event.id.offset for event in cursor.read()] == [6]


def five_with_three_left() -> Room:
    room = Room("r", Rooms(events=3), messages=1)
    room.restart(EPOCH, 0)
    for _ in range(5):
        room.append("message", SAID)
    return room
