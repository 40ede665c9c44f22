"""The load generator for many rooms: raw sockets and epoll, one thread, one JSON line of results.

Each of `--count` WebSockets joins as many of the `--rooms` as the others, so that each room has one
reader. Then `--busy` of them get `--rate` events a second, in one publish each second; the others
stay idle. What is measured lasts `--seconds`, with the same publishes under way at both ends.
"""

import json
import select
import socket
import time
from collections import Counter
from dataclasses import asdict

from bench.audience import UPGRADE
from bench.plan import Heard, Lots, Spread
from bench.proc import on_cpu, unhindered, usage
from bench.wire import MARK, exchange, frames, request, stamps, to_server

_JOINED = b'{"type":"joined"'
_ROOM = "/api/v1/rooms/{}/messages"
_SILENCE = 10.0  # seconds without any delivery after which what is missing is lost


class Reader:
    """A WebSocket in many rooms."""

    def __init__(self, plan: Lots, rooms: list[str]) -> None:
        self.sock = socket.create_connection(("127.0.0.1", plan.port))
        self.sock.sendall(request("GET", "/ws", f"127.0.0.1:{plan.port}", b"", *UPGRADE))
        self.rest = b""
        while b"\r\n\r\n" not in self.rest:
            self.rest += self.sock.recv(1 << 16)
        self.rest = self.rest.partition(b"\r\n\r\n")[2]
        for room in rooms:
            self.sock.sendall(to_server(1, b'{"type":"join","room":"%b"}' % room.encode()))
            while not self.read().startswith(_JOINED):
                pass

    def read(self) -> bytes:
        """What has come whole; waits for some. Answers pings."""
        data = self.sock.recv(1 << 18)
        if not data:
            raise ConnectionError("closed by the server")
        text, self.rest, pings = frames(self.rest + data)
        for payload in pings:
            self.sock.send(to_server(10, payload))
        return text


class Crowd:
    """All readers of one plan, and what they heard."""

    def __init__(self, plan: Lots) -> None:
        self.plan = plan
        self.delivered = self.published = 0
        self.latencies: list[int] = []
        self.statuses: Counter[str] = Counter()
        self._epoll = select.epoll()
        self._readers: dict[int, Reader] = {}

    def run(self) -> Heard:
        """Runs the whole plan and returns what it measured."""
        plan, before = self.plan, usage(self.plan.pid)
        rooms = [f"r{number}" for number in range(plan.rooms)]
        for number in range(plan.count):
            reader = Reader(plan, rooms[number :: plan.count])
            self._readers[reader.sock.fileno()] = reader
            self._epoll.register(reader.sock, select.EPOLLIN)
        self._read_for(1.0)  # the server may still be at it
        idle = usage(plan.pid)
        self._publish_for(1.0)
        self.latencies.clear()
        counts, clocks = self._counts(), self._clocks()
        self._publish_for(plan.seconds)
        seconds, server, helper, own = (
            end - begin for begin, end in zip(clocks, self._clocks(), strict=True)
        )
        publishes, deliveries = (
            end - begin for begin, end in zip(counts, self._counts(), strict=True)
        )
        missing = self.published - self.delivered
        return Heard(
            seconds=seconds,
            subscribers=plan.rooms,
            publishes=publishes,
            deliveries=deliveries,
            bytes=0,
            server_cpu=server,
            load_cpu=own,
            helper_cpu=helper,
            connect_cpu=idle.cpu - before.cpu,
            rss_before=before.rss,
            rss_idle=idle.rss,
            latency_ms=Spread.of(self.latencies),
            lost=max(missing, 0),
            extra=max(-missing, 0),
            disorder=0,
            statuses=dict(self.statuses),
            errors={},
        )

    def _counts(self) -> tuple[int, int]:
        return self.published, self.delivered

    def _clocks(self) -> tuple[float, float, float, float]:
        plan = self.plan
        cpu = usage(plan.pid).cpu, on_cpu(plan.helper)
        return time.monotonic(), *cpu, time.process_time()

    def _publish_for(self, seconds: float) -> None:
        """Publishes for so long, to one room after the other; returns when all has arrived."""
        plan, begin = self.plan, time.monotonic()
        for number in range(round(plan.busy * seconds)):
            self._read_for(begin + number / plan.busy - time.monotonic())
            content = b'{"content":"%b%020d"}' % (MARK, time.monotonic_ns())
            body = b"[%b]" % b",".join([content] * plan.rate)
            path = _ROOM.format(f"r{number % plan.busy}")
            answer = exchange(("127.0.0.1", plan.port), request("POST", path, "localhost", body))
            self.statuses[str(answer.head.status)] += 1
            self.published += plan.rate
        last = time.monotonic()
        while self.delivered < self.published and time.monotonic() < last + _SILENCE:
            self._read_for(0.02)

    def _read_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            for number, _ in self._epoll.poll(left):
                found, now = stamps(self._readers[number].read()), time.monotonic_ns()
                self.delivered += len(found)
                self.latencies += [now - stamp for stamp in found]


def main() -> None:
    plan = Lots.parse("a load generator for many rooms; see the module's docstring")
    unhindered()
    print(json.dumps(asdict(Crowd(plan).run())))


if __name__ == "__main__":
    main()
