"""What the load generator is asked for and what it answers: plain data, one JSON line each."""

import argparse
import json
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

P = TypeVar("P", bound="Options")


class Options:
    """A dataclass of plain values that travels as a command line."""

    @classmethod
    def parse(cls: type[P], about: str) -> P:
        """Reads this process's command line."""
        parser = argparse.ArgumentParser(description=about)
        options: Any = cls
        for option in fields(options):
            if option.type is bool:
                parser.add_argument(f"--{option.name}", action="store_true")
            else:
                assert callable(option.type)
                parser.add_argument(f"--{option.name}", type=option.type, default=option.default)
        return cls(**vars(parser.parse_args()))

    def arguments(self) -> list[str]:
        """The command line that `parse` reads."""
        values = vars(self).items()
        return [
            f"--{name}" if value is True else f"--{name}={value}"
            for name, value in values
            if value is not False
        ]


@dataclass(frozen=True)
class Plan(Options):
    """What the load generator is to do; its command line's options, one for one.

    Attributes:
        path, body: of the POST that each stream sends; body is JSON.
        attach: path by which readers attach, `{id}` in it is the first answer's `X-Stream-Id`.
        seconds: the measured window, after `ramp` (connections open evenly) and `warmup`.
        drain: seconds after the window in which answers may still end, to be counted whole.
        expect: tokens of a whole answer; 0: not known.
        clock: read the clock in each token, for its latency (costs the load some CPU).
        pid, helper: the server and the upstream.
        token: with which the load comes in.
    """

    port: int = 0
    path: str = "/"
    body: str = ""
    streams: int = 1
    readers: int = 0
    attach: str = ""
    seconds: float = 4.0
    ramp: float = 1.0
    warmup: float = 0.5
    drain: float = 0.0
    expect: int = 0
    clock: bool = False
    pid: int = 0
    helper: int = 0
    token: str = ""


@dataclass(frozen=True)
class Spread:
    """How some times were spread, in milliseconds."""

    count: int
    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, nanoseconds: list[int]) -> "Spread | None":
        """None where there was nothing to measure."""
        if not nanoseconds:
            return None
        ordered = sorted(nanoseconds)
        count = len(ordered)
        p99 = min(count * 99 // 100, count - 1)
        return cls(count, ordered[count // 2] / 1e6, ordered[p99] / 1e6, ordered[-1] / 1e6)


@dataclass(frozen=True)
class Result:
    """What one plan measured; all counts are the window's unless said otherwise.

    Attributes:
        tokens: tokens received by all connections.
        generated: the same, of the first connection where readers were attached to it.
        answers: answers read to their end.
        connections: open at the window's end.
        server_cpu, upstream_cpu, load_cpu: CPU seconds of the three.
        rss_before, rss_peak: the server's resident bytes, before the load and at their highest.
        first_ms: from request to first token.
        latency_ms: from the upstream's clock in a token to its arrival (with `--clock`).
        gap_ms: between two arrivals of tokens on a connection.
        started, finished: requests sent and answers read to their end, in the whole run.
        lost, extra: tokens too few or too many in finished answers, in the whole run.
        statuses, errors: of all responses, and what broke a connection, in the whole run.
    """

    seconds: float
    tokens: int
    generated: int
    answers: int
    bytes: int
    chunks: int
    connections: int
    server_cpu: float
    upstream_cpu: float
    load_cpu: float
    rss_before: int
    rss_peak: int
    first_ms: Spread | None
    latency_ms: Spread | None
    gap_ms: Spread | None
    started: int = 0
    finished: int = 0
    lost: int = 0
    extra: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, line: str) -> "Result":
        """Reads the line that `main` prints."""
        values = json.loads(line)
        for name in ("first_ms", "latency_ms", "gap_ms"):
            values[name] = values[name] and Spread(**values[name])
        return cls(**values)

    @property
    def tokens_per_cpu(self) -> float:
        """Tokens per CPU-second of the server (a hundredth of a second is the clock's step)."""
        return self.tokens / max(self.server_cpu, 0.01)

    @property
    def answers_per_cpu(self) -> float:
        return self.answers / max(self.server_cpu, 0.01)

    @property
    def server_busy(self) -> float:
        """The server's share of one core."""
        return self.server_cpu / self.seconds

    @property
    def load_busy(self) -> float:
        """The load's and the upstream's share of the core they have in common."""
        return (self.load_cpu + self.upstream_cpu) / self.seconds


@dataclass(frozen=True)
class Audience(Options):
    """What the load generator for rooms is to do; its command line's options, one for one.

    Attributes:
        follow, publish: paths of the room's stream and of the POST to it.
        websocket: the stream is a WebSocket; else it is streamed HTTP.
        hello: text to send on each WebSocket once it is open.
        count: subscribers.
        body: bytes of JSON in each publish.
        window: publishes that may be undelivered, where there is no rate.
        rate: publishes a second.
        seconds: the measured time; 0 only connects.
        pid, helper: the server and its Redis.
        other, also: port and pid of a second server, which every other subscriber follows.
        token: with which the load comes in.
    """

    port: int = 0
    follow: str = "/"
    publish: str = "/"
    websocket: bool = False
    hello: str = ""
    count: int = 1
    body: int = 200
    window: int = 4
    rate: float = 0.0
    seconds: float = 4.0
    warmup: float = 0.5
    pid: int = 0
    token: str = ""
    helper: int = 0
    other: int = 0
    also: int = 0


@dataclass(frozen=True)
class Lots(Options):
    """What the load generator for many rooms is to do; its command line's options, one for one.

    Attributes:
        rooms, busy: how many there are, and to how many of them something is published.
        pid, helper: the server and its Redis.
        count: WebSockets, which share the rooms among them.
        rate: events a second in a busy room, in one publish.
    """

    port: int = 0
    rooms: int = 100
    busy: int = 100
    seconds: float = 4.0
    pid: int = 0
    helper: int = 0
    count: int = 100
    rate: int = 10


@dataclass(frozen=True)
class Heard:
    """What one audience measured, from nothing under way to nothing under way.

    Attributes:
        publishes, deliveries, bytes: of the measured time; bytes are what subscribers received.
        server_cpu, load_cpu, helper_cpu: CPU seconds of server (or both servers), load and Redis.
        connect_cpu: the server's, for connecting all subscribers.
        rss_before, rss_idle: the server's resident bytes, before the first subscriber and with all.
        latency_ms: from publishing to arrival, at a steady rate.
        lost, extra: deliveries too few or too many for a subscriber, in the whole run.
        disorder: times that a subscriber's next message was not the next one of the room.
        statuses, errors: of all responses, and what broke a connection, in the whole run.
    """

    seconds: float
    subscribers: int
    publishes: int
    deliveries: int
    bytes: int
    server_cpu: float
    load_cpu: float
    connect_cpu: float
    rss_before: int
    rss_idle: int
    latency_ms: Spread | None
    lost: int
    extra: int
    disorder: int
    statuses: dict[str, int]
    errors: dict[str, int]
    helper_cpu: float = 0.0

    @classmethod
    def parse(cls, line: str) -> "Heard":
        """Reads the line that `main` prints."""
        values = json.loads(line)
        values["latency_ms"] = values["latency_ms"] and Spread(**values["latency_ms"])
        return cls(**values)

    @property
    def deliveries_per_cpu(self) -> float:
        """Deliveries per CPU-second of the server."""
        return self.deliveries / max(self.server_cpu, 0.01)

    @property
    def connects_per_cpu(self) -> float:
        """Connections per CPU-second of the server."""
        return self.subscribers / max(self.connect_cpu, 0.01)

    @property
    def kilobytes(self) -> float:
        """The server's memory for a connection on which nothing happens."""
        return (self.rss_idle - self.rss_before) / self.subscribers / 1000

    @property
    def wrong(self) -> int:
        """Deliveries lost, doubled or out of order."""
        return self.lost + self.extra + self.disorder
