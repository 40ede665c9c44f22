"""Timers that many share: the flush clock of running streams, and the wheel of heartbeats.

A stream that has just passed something on rests until the flush clock's next tick, and takes what
came meanwhile in one go: one read, one parse, one write. Measured with 50 streams of 50 tokens/s,
against a timer each: see bench/README.md.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from typing import Protocol


class FlushClock:
    """Ticks at most `interval` seconds (0 or more) after somebody begins to rest; at rest itself
    when nobody does.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._resting: list[asyncio.Future[None]] = []

    def rest(self) -> asyncio.Future[None]:
        """Done at the next tick, within `interval`. Cancelling one rest leaves the others."""
        loop = asyncio.get_running_loop()
        # A future each: cancelling a task cancels the future it waits for.
        future: asyncio.Future[None] = loop.create_future()
        if self._interval:
            if not self._resting:
                loop.call_later(self._interval, self._tick)
            self._resting.append(future)
        else:
            future.set_result(None)
        return future

    def _tick(self) -> None:
        resting, self._resting = self._resting, []
        for future in resting:
            if not future.done():
                future.set_result(None)


SLACK = 0.01  # seconds that a beat may wait for others: a turn each costs 50 us with the loop's


class Wheel:
    """One timer for many things: calls `beat` of each that has not been touched for a period (and
    up to a tenth of it longer, SLACK at most).

    They stand in the order of their last touch, so a turn looks only at those that are due.
    """

    def __init__(self, period: float) -> None:
        self._period = period
        self._slack = min(SLACK, period / 10)
        self._touched: OrderedDict[Beating, float] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._touched)

    def oldest(self) -> Beating:
        """The one that has not been touched for the longest time."""
        return next(iter(self._touched))

    def touch(self, item: Beating) -> float:
        """Puts `item` at the end; new ones too. When that was, as time.monotonic() has it."""
        self._touched[item] = now = time.monotonic()
        self._touched.move_to_end(item)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._period, self._turn)
        return now

    def drop(self, item: Beating) -> None:
        """Takes `item` off."""
        self._touched.pop(item, None)

    def stop(self) -> None:
        """No beat comes after this."""
        self._touched.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _turn(self) -> None:
        now = time.monotonic()
        while self._touched:
            item, last = next(iter(self._touched.items()))
            if (wait := last + self._period - now) > 0:
                wait = max(wait, self._slack)
                self._timer = asyncio.get_running_loop().call_later(wait, self._turn)
                return
            self.touch(item)
            item.beat()
        self._timer = None


class Beating(Protocol):
    """What a Wheel turns."""

    def beat(self) -> None: ...
