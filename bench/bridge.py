"""What the bridge costs: an instance with Redis beside one without, two beside one, idle rooms."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from bench.cases import RIVULET, Bench, Case, Outcome
from bench.costs import MEASURES, costs
from bench.fanout import PEERS, WEBSOCKET, Service, aimed, listen, serving
from bench.measure import Server, run_load, start
from bench.plan import Audience, Heard, Lots

ALONE, BRIDGED = "alone", "with Redis"
TWO = "two instances"
P50 = "p50 latency, ms"
REDIS = "Redis: CPU us an event"
BUSY = "CPU ms a second"
_SERVICE = PEERS[WEBSOCKET][RIVULET]


@contextmanager
def _redis(bench: Bench, wanted: bool = True) -> Iterator[tuple[Server | None, Mapping[str, str]]]:
    """A fresh Redis beside the load, and what tells a server of it."""
    if not wanted:
        yield None, {}
        return
    with start(["-m", "bench.redis_server"], bench.cores.load, {}) as redis:
        yield redis, {"RIVULET_REDIS__URL": f"redis://127.0.0.1:{redis.port}"}


def _service(env: Mapping[str, str]) -> Service:
    return replace(_SERVICE, env={**_SERVICE.env, **env})


def _heard(bench: Bench, plan: Audience, instances: int) -> Heard:
    """One run: 0 instances are one without Redis."""
    with _redis(bench, instances > 0) as (redis, env), serving(bench, _service(env)) as server:
        warm = Audience(count=5, seconds=0)
        listen(bench, aimed(warm, server, _SERVICE, WEBSOCKET))
        plan = replace(plan, helper=redis.pid if redis else 0)
        if instances < 2:
            return listen(bench, aimed(plan, server, _SERVICE, WEBSOCKET))
        with serving(bench, _service(env)) as other:
            listen(bench, aimed(warm, other, _SERVICE, WEBSOCKET))
            plan = replace(plan, other=other.port, also=other.pid)
            return listen(bench, aimed(plan, server, _SERVICE, WEBSOCKET))


def _redis_share(run: Heard) -> float:
    return run.helper_cpu / max(run.publishes, 1) * 1e6


def bridge_cost(bench: Bench, count: int = 1000) -> Outcome:
    """One instance with Redis and without: a room of 1,000 WebSockets, and 50 streams of tokens."""

    @contextmanager
    def bridged() -> Iterator[Mapping[str, str]]:
        with _redis(bench) as (_, env):
            yield env

    outcome = costs(bench, {ALONE: nullcontext, BRIDGED: bridged}, count)
    for measure in MEASURES:
        outcome.at_least(1 / 2, measure, ALONE, BRIDGED)
    return outcome


def bridge_two(bench: Bench, count: int = 1000) -> Outcome:
    """Two instances of 1,000 WebSockets each, one writer at 10 a second; beside them one instance
    without Redis that has them all, and one with half of them.
    """
    outcome, plan = Outcome(), Audience(count=count, rate=10, seconds=bench.seconds)
    whole, half = f"{ALONE}, {2 * count:,}", f"{ALONE}, {count:,}"
    for _ in range(bench.runs):
        for peer, instances, readers in ((half, 0, 1), (whole, 0, 2), (TWO, 2, 2)):
            run = _heard(bench, replace(plan, count=readers * count), instances)
            outcome.crowds.setdefault(peer, []).append(run)
    for peer, runs in outcome.crowds.items():
        outcome.add(P50, peer, [run.latency_ms.p50 for run in runs if run.latency_ms])
    outcome.add(REDIS, TWO, [_redis_share(run) for run in outcome.crowds[TWO]])
    added = outcome.value(P50, TWO) - outcome.value(P50, whole)
    outcome.at_most(3, "ms", "added p50 latency", added)
    wrong = max(run.wrong for run in outcome.crowds[TWO])
    outcome.at_most(0, "", "lost, doubled or out of order", wrong)
    return outcome


def bridge_rooms(bench: Bench, rooms: int = 10_000, busy: int = 100) -> Outcome:
    """10 events a second in each of 100 rooms, of 100 rooms and of 10,000, each with a reader."""
    outcome, peers = Outcome(), {f"{count:,} rooms": count for count in (busy, rooms)}
    for _ in range(bench.runs):
        for peer, count in peers.items():
            with _redis(bench) as (redis, env), serving(bench, _service(env)) as server:
                assert redis is not None
                plan = Lots(server.port, count, busy, bench.seconds, server.pid, redis.pid)
                run = Heard.parse(run_load("bench.many_rooms", plan, bench.cores.load))
            outcome.crowds.setdefault(peer, []).append(run)
    for peer, runs in outcome.crowds.items():
        outcome.add(BUSY, peer, [run.server_cpu / run.seconds * 1000 for run in runs])
        outcome.add(REDIS, peer, [_redis_share(run) for run in runs])
        outcome.add(f"Redis: {BUSY}", peer, [run.helper_cpu / run.seconds * 1000 for run in runs])
    few, many = peers
    idle = outcome.value(BUSY, many) - outcome.value(BUSY, few)
    outcome.at_most(20, "ms a second", f"CPU of {rooms - busy:,} idle rooms", idle)
    outcome.add("kB an idle room", many, [run.kilobytes for run in outcome.crowds[many]])
    wrong = max(run.wrong for run in outcome.crowds[many])
    outcome.at_most(0, "", "lost or doubled", wrong)
    return outcome


BRIDGE: dict[str, Case] = {
    "bridge_cost": bridge_cost,
    "bridge_two": bridge_two,
    "bridge_rooms": bridge_rooms,
}
