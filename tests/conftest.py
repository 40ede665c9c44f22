"""Fixtures: real processes on loopback, ports from the system. One set a worker under pytest-xdist.

Under CI a skipped test is a failure: what was not run was not seen working.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests import processes
from tests.bridged import Instances
from tests.browser import Browser
from tests.front import Front
from tests.nginx import Way
from tests.processes import Server, UpstreamProcess
from tests.redis_cluster import RedisCluster
from tests.redis_server import RedisServer, Wire
from tests.tokens import SECRET

SOAK = os.environ.get("SOAK") == "1"
CLUSTER = os.environ.get("CLUSTER") == "1"
CI = os.environ.get("CI", "").lower() in ("1", "true")
collect_ignore = [] if SOAK else ["test_image.py"]  # minutes of making a Debian
StartServer = Callable[..., Server]
StartNginx = Callable[..., Way]


@pytest.fixture(scope="session")
def upstream() -> Iterator[UpstreamProcess]:
    """The upstream with every fault."""
    process = UpstreamProcess()
    yield process
    process.stop()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers for one test: `server(model={"base_url": ...}, generation={"linger": 1.0})`.

    `env` and `arguments` go to the process, `upstreams` is a list of tables, any other name is a
    section of the configuration.
    """
    started: list[Server] = []

    def start(
        *, env: dict[str, str] | None = None, arguments: tuple[str, ...] = (), **config: Any
    ) -> Server:
        started.append(Server(tmp_path, config, env, arguments))
        return started[-1]

    yield start
    for process in started:
        process.stop()


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server as it comes: the embedded demo model, every default."""
    process = Server(tmp_path_factory.mktemp("demo"), {})
    yield process
    process.stop()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server in token mode."""
    config = {"auth": {"mode": "token", "jwt_secret": SECRET}, "server": {"drain": 0.0}}
    process = Server(tmp_path_factory.mktemp("guarded"), config)
    yield process
    process.stop()


@pytest.fixture(scope="session")
def relay_server(
    tmp_path_factory: pytest.TempPathFactory, upstream: UpstreamProcess
) -> Iterator[Server]:
    """A server whose default model is the upstream, with a key and quick retries."""
    config = {
        "model": {"name": "up:", "base_url": upstream.base, "api_key": "sk-test"},
        "generation": {"backoff": 0.01, "backoff_max": 0.05},
    }
    process = Server(tmp_path_factory.mktemp("relay"), config)
    yield process
    process.stop()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """Starts a Redis for one test: `redis_server(appendonly="yes")`."""
    started: list[RedisServer] = []

    def start(**options: str) -> RedisServer:
        started.append(RedisServer(tmp_path / f"redis{len(started)}", **options))
        return started[-1]

    yield start
    for each in started:
        each.stop()


@pytest.fixture
async def wire() -> AsyncIterator[Callable[[RedisServer], Any]]:
    """Puts a wire before a Redis: `await wire(redis)`."""
    started: list[Wire] = []

    async def start(redis: RedisServer) -> Wire:
        started.append(Wire(redis.port))
        await started[-1].start()
        return started[-1]

    yield start
    for each in started:
        await each.stop()


@pytest.fixture
async def instances(tmp_path: Path, upstream: UpstreamProcess) -> AsyncIterator[Callable[..., Any]]:
    """Starts instances that share a Redis, for one test: `await instances(redis.url, 2)`."""
    started: list[Instances] = []

    async def start(url: str, count: int, **config: Any) -> Instances:
        directory = tmp_path / f"instances{len(started)}"
        directory.mkdir()
        started.append(Instances(directory, upstream, url, **config))
        await started[-1].add(count)
        return started[-1]

    yield start
    for each in started:
        await asyncio.to_thread(each.stop)


@pytest.fixture(scope="module")
def trio(
    tmp_path_factory: pytest.TempPathFactory, upstream: UpstreamProcess
) -> Iterator[Instances]:
    """Three instances on one Redis, for tests that do them no harm; CLUSTER=1: on a cluster."""
    directory = tmp_path_factory.mktemp("trio")
    redis = (RedisCluster if CLUSTER else RedisServer)(directory / "redis")
    three = Instances(directory, upstream, redis.url)
    asyncio.run(three.add(3))
    yield three
    three.stop()
    redis.stop()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client without a limit on connections."""
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=100)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield session


@pytest.fixture
async def front() -> AsyncIterator[Callable[[str], Any]]:
    """Puts a front before a server: `await front(server.url)`; see tests/front.py."""
    started: list[Front] = []

    async def start(url: str) -> Front:
        started.append(Front(url))
        await started[-1].start()
        return started[-1]

    yield start
    for each in started:
        await each.stop()


@pytest.fixture(params=[False, True], ids=["one nginx", "two nginx"])
def nginx(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StartNginx]:
    """Puts nginx, and then two in a row, before instances: `nginx(a.url, b.url)`; see `Way` in
    tests/nginx.py for what more it takes.
    """
    started: list[Way] = []

    def start(*targets: str, **more: Any) -> Way:
        started.append(Way(tmp_path, targets, request.param, **more))
        return started[-1]

    yield start
    for way in started:
        way.stop()


@pytest.fixture
async def browser(tmp_path: Path) -> AsyncIterator[Browser]:
    """Headless Chromium: `await browser.run(front, "return 1 + 1")`; see tests/browser.py."""
    async with Browser(tmp_path) as each:
        yield each


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    for process in processes.running:
        process.shown = len(process.stderr)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not hasattr(report, "wasxfail"):
        refuse_skip(report)
    if report.failed:
        for process in processes.running:
            lines = process.stderr[process.shown :][-200:]
            if lines:
                report.sections.append((f"stderr of {process}", "\n".join(lines)))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    refuse_skip(report)
    return report


def refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if CI and report.skipped:
        why: object = report.longrepr
        report.outcome, report.longrepr = "failed", f"CI takes a skip for a failure: {why}"
