"""What a room costs: one with thousands of subscribers, beside the same in other servers."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory

from bench.cases import FASTAPI, RIVULET, Bench, Case, Outcome
from bench.measure import Server, run_load, start
from bench.plan import Audience, Heard

NCHAN, SSE_STARLETTE, SOCKETIO = "nchan", "sse-starlette", "python-socketio"
SEND_STR, SSE_SEND, NODE = "aiohttp send_str", "aiohttp_sse.send", "Node's ws"
WEBSOCKET, SSE = "WebSocket", "SSE"


_HERE = {WEBSOCKET: "/ws", SSE: "/events"}


@dataclass(frozen=True)
class Service:
    """A peer: how it is started and where its room is.

    Attributes:
        follow: paths of the room's stream, by transport.
        hello: what a subscriber must say first.
        program: what runs `arguments`.
    """

    arguments: Sequence[str]
    follow: Mapping[str, str] = field(default_factory=lambda: _HERE)
    publish: str = "/publish"
    hello: str = ""
    program: str = sys.executable
    env: Mapping[str, str] = field(default_factory=dict)


_ROOM = "/api/v1/rooms/room"
_RIVULET = Service(
    ["app.py", "--port", "0"],
    {WEBSOCKET: "/ws/room", SSE: f"{_ROOM}/events"},
    f"{_ROOM}/messages",
    env={"RIVULET_SERVER__ACCESS_LOG": "false"},  # the peers have none either
)
_NCHAN = Service(["-m", "bench.peers.nchan"])
_AIOHTTP = Service(["-m", "bench.peers.aiohttp_room"])
_FASTAPI = Service(["-m", "bench.peers.fastapi_room"])
_NODE = Service(["bench/peers/ws_room.mjs"], program="node")
_SOCKETIO = Service(
    ["-m", "bench.peers.socketio_room"],
    {WEBSOCKET: "/socket.io/?EIO=4&transport=websocket"},
    hello="40",
)

PEERS: dict[str, dict[str, Service]] = {
    WEBSOCKET: {
        RIVULET: _RIVULET,
        NCHAN: _NCHAN,
        NODE: _NODE,
        SEND_STR: _AIOHTTP,
        FASTAPI: _FASTAPI,
        SOCKETIO: _SOCKETIO,
    },
    SSE: {RIVULET: _RIVULET, NCHAN: _NCHAN, SSE_SEND: _AIOHTTP, SSE_STARLETTE: _FASTAPI},
}


@contextmanager
def serving(bench: Bench, service: Service) -> Iterator[Server]:
    """A fresh server of this kind."""
    with TemporaryDirectory() as folder:
        env = {"TMPDIR": folder, **service.env}
        with start(service.arguments, bench.cores.server, env, service.program) as server:
            yield server


def aimed(plan: Audience, server: Server, service: Service, transport: str) -> Audience:
    """The plan, with where and what the server is."""
    return replace(
        plan,
        port=server.port,
        follow=service.follow[transport],
        publish=service.publish,
        websocket=transport == WEBSOCKET,
        hello=service.hello,
        pid=server.pid,
    )


def listen(bench: Bench, plan: Audience) -> Heard:
    """One run of the load."""
    return Heard.parse(run_load("bench.audience", plan, bench.cores.load))


def sample(
    bench: Bench,
    transport: str,
    peer: str,
    plan: Audience,
    env: Mapping[str, str] | None = None,
    beside: Callable[[Audience], AbstractContextManager[None]] | None = None,
) -> Heard:
    """One run against a fresh server of this peer, which has had some subscribers before; within
    `beside`, which is told of the plan.
    """
    service = PEERS[transport][peer]
    service = replace(service, env={**service.env, **(env or {})})
    with serving(bench, service) as server:
        few = Audience(count=5, seconds=0)
        listen(bench, aimed(few, server, service, transport))  # its imports
        full = aimed(plan, server, service, transport)
        with beside(full) if beside else nullcontext():
            return listen(bench, full)


Measure = Callable[[Heard], float]
DELIVERIES = "{}: deliveries per CPU-second"
LATENCY = "{}: p99 latency, ms"
MEMORY = "{}: kB an idle connection"
CONNECTS = "{}: connects per CPU-second"


def _measured(bench: Bench, plan: Audience, measures: Mapping[str, Measure]) -> Outcome:
    """All peers on both transports, taking turns; nothing may be wrong in any run of ours."""
    outcome = Outcome()
    for transport, peers in PEERS.items():
        runs: dict[str, list[Heard]] = {peer: [] for peer in peers}
        for _ in range(bench.runs):
            for peer in peers:
                runs[peer].append(sample(bench, transport, peer, plan))
        for measure, pick in measures.items():
            for peer in peers:
                outcome.add(measure.format(transport), peer, [pick(run) for run in runs[peer]])
        outcome.crowds |= {f"{peer}, {transport}": heard for peer, heard in runs.items()}
        wrong = max(run.wrong + plan.count - run.subscribers for run in runs[RIVULET])
        outcome.at_most(0, "", f"{transport}: lost, doubled or out of order", wrong)
    return outcome


def _saturated(bench: Bench, count: int, nchan: float) -> Outcome:
    plan = Audience(count=count, seconds=bench.seconds)
    outcome = _measured(bench, plan, {DELIVERIES: lambda run: run.deliveries_per_cpu})
    for transport, times, peer in (
        (WEBSOCKET, nchan, NCHAN),
        (WEBSOCKET, 4, FASTAPI),
        (SSE, nchan, NCHAN),
        (SSE, 8, SSE_STARLETTE),
    ):
        outcome.at_least(times, DELIVERIES.format(transport), peer)
    return outcome


def fanout1000(bench: Bench) -> Outcome:
    """One room, 1,000 subscribers, 200 bytes of JSON, at most 4 publishes undelivered."""
    return _saturated(bench, 1000, 1.5)


def fanout5000(bench: Bench) -> Outcome:
    """The same with 5,000 subscribers."""
    return _saturated(bench, 5000, 2)


def steady(bench: Bench) -> Outcome:
    """20 publishes a second to 1,000 subscribers."""
    plan = Audience(count=1000, rate=20, seconds=bench.seconds)
    picks: dict[str, Measure] = {
        DELIVERIES: lambda run: run.deliveries_per_cpu,
        LATENCY: lambda run: run.latency_ms.p99 if run.latency_ms else 0,
    }
    outcome = _measured(bench, plan, picks)
    for transport in PEERS:
        outcome.at_least(1, DELIVERIES.format(transport), NCHAN)
        ours, theirs = (outcome.value(LATENCY.format(transport), peer) for peer in (RIVULET, NCHAN))
        outcome.at_most(theirs, "ms", f"{transport}: p99 latency, nchan's", ours)
    return outcome


def idle(bench: Bench) -> Outcome:
    """5,000 connections on which nothing happens: their memory, and what connecting them costs."""
    picks: dict[str, Measure] = {
        MEMORY: lambda run: run.kilobytes,
        CONNECTS: lambda run: run.connects_per_cpu,
    }
    outcome = _measured(bench, Audience(count=5000, seconds=0), picks)
    for transport, most in ((WEBSOCKET, 14), (SSE, 13)):
        memory, connects = (
            outcome.value(measure.format(transport), RIVULET) for measure in (MEMORY, CONNECTS)
        )
        outcome.at_most(most, "kB", f"{transport}: memory of an idle connection", memory)
        outcome.no_less(2500, f"{transport}: connects per CPU-second", connects)
    return outcome


FANOUT: dict[str, Case] = {
    "fanout1000": fanout1000,
    "fanout5000": fanout5000,
    "steady": steady,
    "idle": idle,
}
