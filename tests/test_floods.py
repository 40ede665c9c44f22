"""Floods: whatever comes, memory is bounded, those who are in are served as before, `/health`
answers, and afterwards nothing of it is left.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from tests.conftest import SOAK, StartServer
from tests.people import Follower, joined, on_socket
from tests.processes import Process, until
from tests.readers import ask
from tests.scrape import scrape
from tests.test_gate import FEW, MB, limits, until_served

MOST = 2000 if SOAK else FEW  # connections
FLOOD = 20_000 if SOAK else 1600
AT_ONCE = 500 if SOAK else 100
READERS = 10
RATE = 50.0  # events a second in their room
CALM = 5.0 if SOAK else 1.5  # seconds in which nothing else happens


@asynccontextmanager
async def readers(url: str) -> AsyncIterator[list[float]]:
    """People in a busy room: the gaps that they see between one event and the next."""
    gaps: list[float] = []

    async def read(follower: Follower) -> None:
        last = 0.0
        while True:
            await follower.hear("message")
            now = time.monotonic()
            if last:
                gaps.append(now - last)
            last = now

    async def talk() -> None:
        async with on_socket(url, "/ws/busy", user_id="talker") as socket:
            while True:
                await socket.say(content="Good morning")
                await asyncio.sleep(1 / RATE)

    async with AsyncExitStack() as stack:
        people = [
            await stack.enter_async_context(joined(url, "busy", f"p{n}", ("ws", "sse")[n % 2]))
            for n in range(READERS)
        ]
        tasks = [asyncio.ensure_future(each) for each in (*map(read, people), talk())]
        try:
            yield gaps
            assert not any(task.done() for task in tasks)  # nobody was cut
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def p99(gaps: list[float]) -> float:
    assert len(gaps) > 20
    return sorted(gaps)[int(len(gaps) * 0.99)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "count", "outcomes"),
    [
        ("attempts", FLOOD, ["503", "200"]),
        ("storm", FLOOD, ["retry", "200"]),
        ("slowloris", MOST, ["cut"]),
        ("endless head", 2 * MOST, ["431", "cut"]),  # who sends on and on may be cut
        ("headers", FLOOD, ["431"]),
        ("slow body", MOST // 2, ["408"]),
        ("endless body", MOST // 2, ["413", "503", "cut"]),
    ],
)
async def test_a_flood(server: StartServer, kind: str, count: int, outcomes: list[str]) -> None:
    """All get the answer that is theirs, most of them a refusal. How far the readers' p99 may rise
    is generous where other tests run beside this.
    """
    guarded = server(**limits(MOST))
    url, files = guarded.url, guarded.files()
    async with readers(url) as gaps:
        await asyncio.sleep(CALM)
        calm, memory, worst, cpu = p99(gaps), guarded.rss(), 0, guarded.cpu()
        gaps.clear()
        command = [sys.executable, "-m", "tests.flood", kind, str(guarded.port)]
        # A few that send as fast as loopback takes it have a processor to themselves.
        greedy = kind.startswith("endless")
        flood = Process([*command, str(count), str(20 if greedy else AT_ONCE)], os.environ)
        while flood.child.poll() is None:
            async with ask("GET", f"{url}/health") as answer:
                assert answer.status == 200
            worst = max(worst, guarded.rss())
            await asyncio.sleep(0.02)
        flood.stop()
        came = Counter(json.loads(flood.stdout[0]))
        assert came.total() == count and came[outcomes[0]] and set(came) <= set(outcomes), came
        grown, during, cpu = (worst - memory) / MB, p99(gaps), guarded.cpu() - cpu
        print(f"{kind}: {came}, {cpu:.1f} s of CPU, {grown:.0f} MB more, ", end="")
        print(f"p99 {calm * 1e3:.1f} -> {during * 1e3:.1f} ms of {len(gaps)}")
        assert grown < 64
        assert during < 2 * calm + (0 if SOAK and not greedy else 0.25)
    await until_served(url)
    await until(lambda: guarded.files() <= files)
    assert not any("exception" in line for line in guarded.log_lines())
    samples = await scrape(url)
    assert not any(n for name, n in samples.items() if name.startswith("rivulet_connections"))
