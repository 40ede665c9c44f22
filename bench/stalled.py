"""What readers that stall cost those who do not: a room with a thousand of them, and without."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from bench.audience import greeting
from bench.cases import RIVULET, Bench, Case, Outcome
from bench.fanout import LATENCY, PEERS, sample
from bench.plan import Audience, Heard
from bench.wire import exchange, request

BESIDE = f"{RIVULET}, beside 1,000 that stall"
STALLED = 1000
FILL = b'{"type": "fill", "data": "%b"}' % (b"x" * 60_000)  # of a type that the load does not count
HIGH_WATER = 65536  # bytes that wait in the server before a reader is on its own


@contextmanager
def stalled(plan: Audience, count: int) -> Iterator[None]:
    """So many readers of the room who read nothing of what fills it: more than the kernel may hold
    for one, so all of them have stalled.
    """
    address = ("127.0.0.1", plan.port)
    kernel = int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[-1])
    fills = (kernel + HIGH_WATER) // len(FILL) + 2
    with ExitStack() as held:
        readers = [held.enter_context(socket.socket()) for _ in range(count)]
        for reader in readers:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            # A network's segments: with loopback's of 64 KB the kernel holds 4 MB for each of them,
            # passes its bound for all of TCP (tcp_mem), and refuses those who read as well.
            reader.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
            reader.connect(address)
            reader.sendall(greeting(plan))
        for _ in range(fills if readers else 0):
            answer = exchange(address, request("POST", plan.publish, "localhost", FILL))
            assert answer.head.status == 201
        yield


def hear(bench: Bench, transport: str, count: int, plan: Audience) -> Heard:
    """One run beside so many that stall, whom the server does not cut yet."""
    patient = {"RIVULET_DELIVERY__WRITE_TIMEOUT": "3600"}
    crowd = partial(stalled, count=count)
    return sample(bench, transport, RIVULET, plan, patient, crowd)


def beside_stalled(bench: Bench) -> Outcome:
    """50 publishes a second to 100 readers, beside 1,000 that take nothing, and alone."""
    outcome = Outcome()
    # Long runs: the one in a hundred that takes longest must be many to be compared.
    plan = Audience(count=100, rate=50, seconds=5 * bench.seconds)
    for transport in PEERS:
        runs: dict[str, list[Heard]] = {RIVULET: [], BESIDE: []}
        for _ in range(bench.runs):
            for name, count in ((RIVULET, 0), (BESIDE, STALLED)):
                runs[name].append(hear(bench, transport, count, plan))
        measure = LATENCY.format(transport)
        for name, heard in runs.items():
            late = [run.latency_ms.p99 for run in heard if run.latency_ms]
            outcome.add(measure, name, late)
        outcome.crowds |= {f"{name}, {transport}": heard for name, heard in runs.items()}
        ratio = outcome.value(measure, BESIDE) / outcome.value(measure, RIVULET)
        outcome.at_most(1.1, "x", f"{transport}: p99 beside 1,000 that stall, of p99 alone", ratio)
        wrong = max(run.wrong for run in runs[BESIDE])
        outcome.at_most(0, "", f"{transport}: lost, doubled or out of order", wrong)
    return outcome


CROWDED: dict[str, Case] = {"stalled": beside_stalled}
