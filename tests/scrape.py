"""What `/metrics` says, by sample as it is written there: `name{label="value"}`."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping

from tests.readers import ask

WAIT = 30.0
Samples = Mapping[str, float]


async def exposition(url: str, accept: str = "") -> str:
    """The whole text."""
    async with ask("GET", f"{url}/metrics", headers={"Accept": accept}) as answer:
        assert answer.status == 200
        return (await answer.body()).decode()


async def scrape(url: str) -> Samples:
    """The value of each sample; 0 of one that is not there."""
    samples: defaultdict[str, float] = defaultdict(float)
    for line in (await exposition(url)).splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            samples[name] = float(value)
    return samples


async def moved(url: str, before: Samples, wanted: Samples) -> None:
    """Returns once each of these samples has changed by so much since then. What is counted at the
    end of a connection or of an answer may come a moment after its client has seen that.
    """
    changed: Samples = {}
    try:
        async with asyncio.timeout(WAIT):
            while changed != wanted:
                now = await scrape(url)
                changed = {name: now[name] - before[name] for name in wanted}
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"changed by {changed}, and not by {wanted}") from None
