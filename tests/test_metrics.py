"""Metrics: each that an operator is promised is there, and moves when the thing happens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app import build
from handlers.keys import STATE
from handlers.metrics import ROWS
from streaming.config import Config
from streaming.config import Delivery as DeliveryConfig
from streaming.delivery import Delivery
from streaming.log import Log
from streaming.metrics import Histogram, Metrics
from tests.clients import Kind, asked, attached, named, once, start, stop, whole
from tests.inside import in_process
from tests.people import joined, new_room, on_socket, publish
from tests.processes import Server, UpstreamProcess, until
from tests.raw_socket import dialled
from tests.readers import ask, connect
from tests.redis_server import RedisServer
from tests.scrape import exposition, moved, scrape
from tests.test_feed import Slow, live
from tests.test_floors import modules

StartServer = Callable[..., Server]
CHAT = Kind("chat")

# What section 7 of the design names, and the brief of operators, with its type.
PROMISED = {
    "rivulet_connections": "gauge", "rivulet_connection_seconds": "histogram",
    "rivulet_subscriptions": "gauge", "rivulet_rooms": "gauge",
    "rivulet_events_in": "counter", "rivulet_events_out": "counter",
    "rivulet_deliveries": "counter", "rivulet_lag_cuts": "counter",
    "rivulet_recoveries": "counter", "rivulet_gaps": "counter",
    "rivulet_requests": "counter", "rivulet_request_seconds": "histogram",
    "rivulet_first_token_seconds": "histogram", "rivulet_token_gap_seconds": "histogram",
    "rivulet_tokens": "counter", "rivulet_generations": "counter",
    "rivulet_generations_running": "gauge", "rivulet_upstream_errors": "counter",
    "rivulet_retries": "counter", "rivulet_part_ready": "gauge", "rivulet_draining": "gauge",
    "process_cpu_seconds": "counter", "process_resident_memory_bytes": "gauge",
    "process_open_fds": "gauge",
}  # fmt: skip


@pytest.fixture(scope="module")
def counting(
    tmp_path_factory: pytest.TempPathFactory, upstream: UpstreamProcess
) -> Iterator[Server]:
    """A server that nobody else uses, with a fallback, short logs and little patience."""
    config = {
        "model": {"name": "up:", "base_url": upstream.base},
        "upstreams": [{"name": "second", "base_url": "", "models": ["demo"]}],
        "generation": {"retries": 1, "backoff": 0.01, "max_bytes": 2**24},
        "delivery": {"write_timeout": 1.0},
        "rooms": {"events": 5},
        "limits": {"prompt_chars": 10**7},
    }
    process = Server(tmp_path_factory.mktemp("counting"), config)
    yield process
    process.stop()


# --- the exposition -----------------------------------------------------------------------------


async def test_all_that_is_promised_is_there(counting: Server) -> None:
    """Under its name, with its type and a help line, from the first scrape on; as OpenMetrics too
    where a client asks for that.
    """
    families = {f.name: f for f in text_string_to_metric_families(await exposition(counting.url))}
    assert {name: families[name].type for name in PROMISED} == PROMISED
    assert all(family.documentation for family in families.values())
    assert {row.name.removesuffix("_total") for row in ROWS} < families.keys()
    for version in ("1.0.0", "latest"):
        accept = f"application/openmetrics-text; version={version}, text/plain; version=x"
        assert (await exposition(counting.url, accept)).endswith("# EOF\n")


async def test_no_label_is_a_clients_word(counting: Server) -> None:
    """However many rooms, users, models and paths there are."""
    for n in range(3):
        async with joined(counting.url, f"label{n}", f"label{n}"):
            pass
        await whole(counting.url, "/api/v1/generate", f"label{n}")
        async with ask("PURGE", f"{counting.url}/label{n}?label{n}") as answer:
            assert answer.status == 404
    text = await exposition(counting.url)
    assert "label" not in text.lower()
    assert 'rivulet_requests_total{route="/ws/{room}",status="101"}' in text
    assert 'rivulet_requests_total{route="",status="404"}' in text


async def test_each_worker_says_which_it_is(
    server: StartServer, redis_server: Callable[..., RedisServer]
) -> None:
    """A scrape gets one of them: its samples are a series of their own."""
    several = server(redis={"url": redis_server().url}, arguments=("--workers", "2"))
    lines = (await exposition(several.url)).splitlines()
    assert all('worker="' in line for line in lines if not line.startswith("#"))


# --- what moves them ----------------------------------------------------------------------------


async def test_who_connects(counting: Server) -> None:
    """Connections by transport, what they follow, the rooms; and how long they have lasted."""
    room, before = new_room(), await scrape(counting.url)
    async with AsyncExitStack() as stack:
        for transport in ("ws", "ws", "sse", "ndjson"):
            await stack.enter_async_context(joined(counting.url, room, transport=transport))
        async with on_socket(counting.url, "/ws") as socket:
            for name in (room, new_room()):
                assert (await socket.call("join", room=name))["type"] == "joined"
            here = {
                'rivulet_connections{transport="websocket"}': 3.0,
                'rivulet_connections{transport="sse"}': 1.0,
                'rivulet_connections{transport="ndjson"}': 1.0,
                "rivulet_subscriptions": 6.0,
                "rivulet_rooms": 2.0,
            }
            await moved(counting.url, before, here)
    gone = dict.fromkeys(here, 0.0) | {"rivulet_rooms": 2.0}
    lasted = 'rivulet_connection_seconds_count{transport="websocket"}'
    await moved(counting.url, before, gone | {lasted: 3.0})


async def test_what_is_published(counting: Server) -> None:
    """Each event comes in once, is encoded once for all who read alike, and delivered to each."""
    room = new_room()
    async with AsyncExitStack() as stack:
        readers = [
            await stack.enter_async_context(joined(counting.url, room, transport=transport))
            for transport in ("ws", "ws", "ws", "sse")
        ]
        before = await scrape(counting.url)
        for n in range(4):
            await publish(counting.url, room, {"content": f"{n}"})
            await asyncio.gather(*(reader.hear("message") for reader in readers))
        wanted = {
            'rivulet_events_in_total{log="room"}': 4.0,
            "rivulet_events_out_total": 8.0,
            "rivulet_deliveries_total": 16.0,
            'rivulet_requests_total{route="/api/v1/rooms/{room}/messages",status="201"}': 4.0,
            "rivulet_lag_cuts_total": 0.0,
        }
        await moved(counting.url, before, wanted)


async def test_what_is_generated(counting: Server) -> None:
    """Running ones, then their ending, their tokens, the first of them, and the gaps between."""
    before = await scrape(counting.url)
    running = {"rivulet_generations_running": 1.0}
    async with asked(counting.url, CHAT, named("tokens=10,rate=20,delay=0.3")) as answer:
        await moved(counting.url, before, running)
        await answer.body()
    after = {
        "rivulet_generations_running": 0.0,
        'rivulet_generations_total{ending="finished"}': 1.0,
        'rivulet_tokens_total{kind="completion"}': 10.0,
        "rivulet_first_token_seconds_count": 1.0,
        'rivulet_first_token_seconds_bucket{le="0.25"}': 0.0,
        'rivulet_connection_seconds_count{transport="sse"}': 1.0,
        "rivulet_retries_total": 0.0,
    }
    await moved(counting.url, before, after)
    now = await scrape(counting.url)
    gaps = now["rivulet_token_gap_seconds_count"] - before["rivulet_token_gap_seconds_count"]
    assert 5 <= gaps <= 9  # tokens that came within `flush_interval` are one
    seconds = now["rivulet_token_gap_seconds_sum"] - before["rivulet_token_gap_seconds_sum"]
    assert 0.3 < seconds < 5
    name = 'rivulet_events_in_total{log="answer"}'
    assert now[name] - before[name] >= 10
    async with asked(counting.url, CHAT, named("tokens=1000,rate=20")) as answer:
        await stop(counting.url, answer.headers["x-stream-id"])
    cancelled = {'rivulet_generations_total{ending="cancelled"}': 1.0}
    await moved(counting.url, now, cancelled)


async def test_what_fails_upstream(counting: Server) -> None:
    """Each call that failed, by upstream and code; each that was made again; and the answer."""
    before = await scrape(counting.url)
    assert (await start(counting.url, CHAT, named("status=500"))).ending == "failed"
    assert (await start(counting.url, CHAT, named("status=500,then,tokens=2"))).code == ""
    assert (await start(counting.url, CHAT, "demo:fail=midway,tokens=5,rate=0")).ending == "failed"
    wanted = {
        'rivulet_upstream_errors_total{code="upstream_failed",upstream="default"}': 3.0,
        'rivulet_upstream_errors_total{code="upstream_failed",upstream="demo"}': 1.0,
        "rivulet_retries_total": 2.0,
        'rivulet_generations_total{ending="failed"}': 2.0,
        'rivulet_generations_total{ending="finished"}': 1.0,
    }
    await moved(counting.url, before, wanted)


async def test_who_comes_back(counting: Server) -> None:
    """A recovery for one that missed nothing, in a room or in an answer; a gap for one too late."""
    room, before = new_room(), await scrape(counting.url)
    _, first = await publish(counting.url, room, {"content": "0"})
    async with joined(counting.url, room, after=first["id"]):
        pass
    for n in range(10):
        await publish(counting.url, room, {"content": f"{n}"})
    async with joined(counting.url, room, after=first["id"]):
        pass
    seen = await start(counting.url, CHAT, named("tokens=5"))
    back = {"Last-Event-ID": f"{seen.stream_id}-2"}
    async with attached(counting.url, seen.stream_id, CHAT, headers=back) as answer:
        await answer.body()
    wanted = {"rivulet_recoveries_total": 2.0, "rivulet_gaps_total": 1.0}
    await moved(counting.url, before, wanted)


async def test_who_is_too_slow(counting: Server) -> None:
    """A lag cut for each: one that stalls on a stream, one on a WebSocket."""
    model, prompt = named("echo=10000"), "x" * 8_000_000
    before = await scrape(counting.url)
    async with connect(counting.url, receive_buffer=2048) as connection:
        async with asked(counting.url, CHAT, model, message=prompt) as answer:
            stream_id = answer.headers["x-stream-id"]
            reading = asyncio.ensure_future(answer.body())
            path = f"/api/v1/streams/{stream_id}/events?dialect=chat"
            await connection.request("GET", path)
            await reading
        await once(counting.url, stream_id, "state", "finished")
        await moved(counting.url, before, {"rivulet_lag_cuts_total": 1.0})
    room = new_room()
    async with dialled(counting.url, f"/ws/{room}", receive_buffer=2048):
        for n in range(100):
            await publish(counting.url, room, {"content": f"{n}" + "x" * 100_000})
        await moved(counting.url, before, {"rivulet_lag_cuts_total": 2.0})


async def test_which_part_works(
    server: StartServer, redis_server: Callable[..., RedisServer], tmp_path: Path
) -> None:
    """1 for Redis while it is there, 0 while it is away; the same of the history's file."""
    redis = redis_server()
    bridged = server(redis={"url": redis.url, "lease": 1.0})
    bridge = 'rivulet_part_ready{part="bridge"}'
    assert (await scrape(bridged.url))[bridge] == 1
    before = await scrape(bridged.url)
    redis.kill()
    await moved(bridged.url, before, {bridge: -1.0})
    kept = server(history={"path": str(tmp_path / "history.db")})
    assert (await scrape(kept.url))['rivulet_part_ready{part="history"}'] == 1


async def test_a_drain_shows() -> None:
    """In the metric; and `/ready` names all that is wrong, the drain first."""

    class Away:
        ready = False

    application = build(Config())
    async with in_process(application) as url:
        assert (await scrape(url))["rivulet_draining"] == 0
        application[STATE].needs = {"bridge_unavailable": Away()}
        application[STATE].draining = True
        samples = await scrape(url)
        assert samples["rivulet_draining"] == 1
        assert samples['rivulet_part_ready{part="bridge"}'] == 0
        async with ask("GET", f"{url}/ready") as answer:
            assert await answer.json() == {"status": "draining", "also": ["bridge_unavailable"]}
        application[STATE].draining = False


# --- what counting costs ------------------------------------------------------------------------


class Watched(Metrics):
    """Counts how often anything is counted."""

    touched = 0

    def __setattr__(self, name: str, value: object) -> None:
        type(self).touched += 1
        super().__setattr__(name, value)


async def test_a_flush_counts_once_however_many_read() -> None:
    """Twice for one event to one reader, and twice to five hundred."""

    async def touched(readers: int) -> int:
        log, metrics, transport = Log({"stream_id": "g"}), Watched(), Slow(0)
        delivery = Delivery(DeliveryConfig(), metrics)
        for _ in range(readers):
            live(log, transport, delivery)
        before = Watched.touched
        log.append("message", {})
        await until(lambda: len(transport.writes) == readers)
        assert (metrics.encoded, metrics.deliveries) == (1, readers)
        return Watched.touched - before

    assert await touched(1) == await touched(500) == 2


def test_nothing_that_counts_knows_of_locks() -> None:
    """The package whose counters take one is known only where they are told."""
    everywhere = modules("streaming") | modules("handlers")
    knowing = {n for n, names in everywhere.items() if "prometheus_client" in str(names)}
    assert knowing == {"metrics"} and "prometheus_client" not in str(modules("streaming"))
    assert {n.partition(".")[0] for n in modules("streaming")["metrics"]} == {
        "__future__",
        "bisect",
        "collections",
    }


def test_a_histogram_counts_as_prometheus_own() -> None:
    """Values below, on, between and above the bounds."""
    ours = Histogram(0.1, 1.0, 5.0)
    registry = prometheus_client.CollectorRegistry()
    theirs = prometheus_client.Histogram("x", "x", buckets=ours.bounds, registry=registry)
    for value in (0.0, 0.05, 0.1, 0.2, 1.0, 4.9, 5.0, 5.1, 100.0):
        ours.observe(value)
        theirs.observe(value)
    (family,) = theirs.collect()
    cumulative = [sample.value for sample in family.samples if sample.name == "x_bucket"]
    assert [sum(ours.counts[: n + 1]) for n in range(4)] == cumulative
    assert ours.sum == pytest.approx(116.35)
