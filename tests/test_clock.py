"""The flush clock, on a loop whose time jumps to the next timer."""

from __future__ import annotations

import asyncio

import pytest

from streaming.clock import FlushClock
from tests.test_demo import run


async def resting(clock: FlushClock, after: float) -> float:
    """When a rest that begins after so many seconds ends."""
    await asyncio.sleep(after)
    await clock.rest()
    return asyncio.get_running_loop().time()


def ends(clock: FlushClock, *begins: float) -> list[float]:
    async def main() -> list[float]:
        return await asyncio.gather(*(resting(clock, after) for after in begins))

    return run(main)


def test_all_who_rest_wake_at_one_tick() -> None:
    """That of whoever began first; so nobody rests longer than the interval."""
    assert ends(FlushClock(0.02), 0.0, 0.005, 0.019) == pytest.approx([0.02] * 3)


def test_the_clock_rests_when_nobody_does() -> None:
    """The next tick is a whole interval after the next rest began, not a beat of its own."""
    assert ends(FlushClock(0.02), 0.0, 0.03, 0.035) == pytest.approx([0.02, 0.05, 0.05])


def test_without_an_interval_nobody_rests() -> None:
    """It returns in the same turn of the loop."""
    assert ends(FlushClock(0), 0.0, 0.005) == pytest.approx([0.0, 0.005])


def test_cancelling_one_rest_leaves_the_others() -> None:
    """They wake at the same tick as if it had stayed, and the clock goes on."""

    async def main() -> list[float]:
        clock = FlushClock(0.02)
        first = asyncio.create_task(resting(clock, 0.0))
        others = [asyncio.create_task(resting(clock, after)) for after in (0.01, 0.03)]
        await asyncio.sleep(0.015)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return await asyncio.gather(*others)

    assert run(main) == pytest.approx([0.02, 0.05])


def test_one_timer_serves_any_number() -> None:
    """A thousand streams cost one timer an interval."""

    async def main() -> int:
        loop = asyncio.get_running_loop()
        ticks = 0

        class Counting(FlushClock):
            def _tick(self) -> None:
                nonlocal ticks
                ticks += 1
                super()._tick()

        clock = Counting(0.02)

        async def stream() -> None:
            while loop.time() < 1:
                await clock.rest()

        await asyncio.gather(*(stream() for _ in range(1000)))
        return ticks

    assert run(main) in (50, 51)
