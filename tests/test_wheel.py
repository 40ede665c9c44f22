"""The wheel: one timer for all heartbeats."""

from __future__ import annotations

import asyncio

from streaming.clock import Wheel

PERIOD = 0.01  # seconds
BEATS = 20


class Item:
    """Beats until it has beaten so often, and then says so."""

    def __init__(self) -> None:
        self.beats = 0
        self.enough = asyncio.Event()

    def beat(self) -> None:
        self.beats += 1
        if self.beats >= BEATS:
            self.enough.set()


class Counting(Wheel):
    turns = 0

    def _turn(self) -> None:
        self.turns += 1
        super()._turn()


async def test_one_timer_serves_all_items() -> None:
    """A turn for each time that something is due, however long the wheel has been turning; a timer
    that is set and forgotten would add a turn to every later period.
    """
    wheel, items = Counting(PERIOD), [Item(), Item(), Item()]
    for item in items:
        wheel.touch(item)
        await asyncio.sleep(PERIOD / 4)  # so that they are due at different times
    async with asyncio.timeout(30):
        await asyncio.gather(*(item.enough.wait() for item in items))
    wheel.stop()
    assert wheel.turns <= 1.5 * sum(item.beats for item in items)


async def test_what_is_due_at_nearly_one_time_shares_a_turn() -> None:
    """A thousand sockets that came in one second are not a thousand turns of the loop."""
    period, count = 0.2, 100
    wheel, items = Counting(period), [Item() for _ in range(count)]
    for item in items:
        wheel.touch(item)
        await asyncio.sleep(period / 2 / count)
    async with asyncio.timeout(30):
        await items[-1].enough.wait()
    wheel.stop()
    assert wheel.turns <= count / 2 * BEATS


async def test_what_was_touched_does_not_beat() -> None:
    """An item that is touched more often than each period is silent beside one that is not."""
    wheel, quiet, silent = Wheel(0.2), Item(), Item()
    wheel.touch(silent)
    while not silent.beats:
        wheel.touch(quiet)
        await asyncio.sleep(0)
    wheel.stop()
    assert not quiet.beats


async def test_a_dropped_item_beats_no_more() -> None:
    """And the wheel rests when nothing is left on it."""
    wheel, gone, there = Wheel(PERIOD), Item(), Item()
    wheel.touch(gone)
    wheel.touch(there)
    wheel.drop(gone)
    async with asyncio.timeout(30):
        await there.enough.wait()
    wheel.stop()
    assert not gone.beats
