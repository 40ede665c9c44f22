"""The flush clock: one timer that all running streams share.

A stream that has just passed something on rests until the next tick, and takes what came meanwhile
in one go: one read, one parse, one write. Measured with 50 streams of 50 tokens/s, against a timer
each: see bench/README.md.
"""

from __future__ import annotations

import asyncio


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
