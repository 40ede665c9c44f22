"""The load generator for rooms: raw sockets and epoll, one thread, one JSON line of results.

`--count` subscribers follow one room, by WebSocket or streamed HTTP; then this process publishes to
it, over as many connections as `--window` has, either as fast as at most `--window` publishes are
undelivered or at `--rate`. Each publish carries a mark (`#t=`) and its clock, which is its name:
whoever hears it first says where in the room's order it stands, and all others must agree.

Most subscribers receive, byte for byte, what another has received before: such a piece is looked
up, not read again. So three quarters of what this costs, 3 to 5 us a delivery, are the kernel's.

What is measured lasts from nothing under way to nothing under way, so no delivery is counted whose
work is not, nor the other way round.
"""

import json
import os
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict

from bench.plan import Audience, Heard, Spread
from bench.proc import on_cpu, unhindered, usage
from bench.wire import (
    MARK,
    Head,
    Units,
    bearer,
    blocks,
    chunks,
    frames,
    request,
    stamps,
    to_server,
)

_READ = 1 << 12
_BATCH = 64  # sockets read before looking whether to publish: that must not wait for thousands
_CONNECTING = 100  # connections on their way at once
_SILENCE = 10.0  # seconds without any delivery after which what is missing is lost
_PIECES = 4096  # remembered
UPGRADE = (
    *("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"),
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


def greeting(plan: Audience) -> bytes:
    """The request that follows the room."""
    headers = UPGRADE if plan.websocket else ("Accept: text/event-stream",)
    headers = (*headers, *bearer(plan.token))
    return request("GET", plan.follow, f"127.0.0.1:{plan.port}", b"", *headers)


class Subscriber:
    """One connection that follows the room.

    Attributes:
        place: how many of the room's messages it is past.
        heard: how many it was sent, which is the same unless the server is wrong.
        rest: the beginning of a frame, chunk or event that has not come whole.
    """

    __slots__ = ("_room", "_split", "jumped", "place", "rest", "sock")

    def __init__(self, room: "Room", port: int) -> None:
        self._room = room
        self._split: Callable[[bytes], Units] = frames
        self.place = self.jumped = 0
        self.rest = b""
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.sock.connect_ex(("127.0.0.1", port))

    @property
    def heard(self) -> int:
        return self.place - self.jumped

    def connected(self) -> None:
        """The connection is up, or refused."""
        if error := self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._room.lose(self, os.strerror(error))
        else:
            self.sock.send(self._room.greeting)

    def answer(self, data: bytes) -> bool:
        """Takes a piece of the response's head; whether it is whole."""
        self.rest += data
        top, found, self.rest = self.rest.partition(b"\r\n\r\n")
        if not found:
            self.rest = top
            return False
        plan, head = self._room.plan, Head.parse(top)
        self._room.statuses[str(head.status)] += 1
        if not plan.websocket:
            self._split = chunks if head.chunked else blocks
        elif plan.hello:
            self.sock.send(to_server(1, plan.hello.encode()))
        self.take(b"")
        return True

    def take(self, data: bytes) -> None:
        """Reads a piece, and remembers what it says for those who receive it after this one."""
        room, place, whole = self._room, self.place, not self.rest
        text, self.rest, pings = self._split(self.rest + data)
        for payload in pings:
            self.sock.send(to_server(10, payload))
        found = stamps(text)
        for stamp in found:
            at = room.order.setdefault(stamp, len(room.order))
            if at != self.place:
                room.disorder += 1
                self.jumped += at - self.place
            self.place = at + 1
        room.delivered += len(found)
        if room.plan.rate:
            now = time.monotonic_ns()
            room.latencies += [now - stamp for stamp in found]
        if whole and found and not self.rest and not pings and self.place == place + len(found):
            if len(room.pieces) >= _PIECES:
                room.pieces.clear()
            room.pieces[data] = (place, found)


class Publisher:
    """A connection that publishes, one request after the other."""

    def __init__(self, room: "Room") -> None:
        self._room = room
        self._answer = b""
        self.sock = socket.create_connection(("127.0.0.1", room.plan.port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def publish(self, stamp: int) -> None:
        """Sends a message with this clock in it."""
        plan = self._room.plan
        content = b'{"content":"%b%020d ' % (MARK, stamp)
        body = content.ljust(plan.body - 2, b"x") + b'"}'
        self.sock.sendall(request("POST", plan.publish, "127.0.0.1", body, *bearer(plan.token)))

    def take(self, data: bytes) -> None:
        """Takes a piece of the response; when it is whole, is free for the next request."""
        self._answer += data
        top, found, body = self._answer.partition(b"\r\n\r\n")
        if found:
            head = Head.parse(top)
            if len(body) >= int(head.headers.get("content-length", "0")):
                self._room.statuses[str(head.status)] += 1
                self._answer = b""
                self._room.free.append(self)


class Room:
    """All connections of one plan, and what they heard.

    Attributes:
        order: the place of each message, by its clock.
        pieces: what was read before: from which place, and the clocks in it.
        free: publishers that wait for nothing.
    """

    def __init__(self, plan: Audience) -> None:
        self.plan = plan
        self.greeting = greeting(plan)
        self.order: dict[int, int] = {}
        self.pieces: dict[bytes, tuple[int, list[int]]] = {}
        self.free: deque[Publisher] = deque()
        self.delivered = self.disorder = self.published = self.bytes = 0
        self.latencies: list[int] = []
        self.statuses: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self._epoll = select.epoll()
        self._subscribers: list[Subscriber] = []
        self._opening: dict[int, Subscriber] = {}
        self._live: dict[int, Subscriber] = {}
        self._publishers: dict[int, Publisher] = {}

    def run(self) -> Heard:
        """Runs the whole plan and returns what it measured."""
        plan = self.plan
        before = usage(plan.pid)
        self._connect()
        self._poll_for(0.5)  # the server may still be at it
        idle = usage(plan.pid)
        if plan.seconds:
            for _ in range(plan.window):
                publisher = Publisher(self)
                self._publishers[publisher.sock.fileno()] = publisher
                self._epoll.register(publisher.sock, select.EPOLLIN)
                self.free.append(publisher)
            self._publish_for(plan.warmup)
        self.latencies.clear()
        counts, clocks = self._counts(), self._clocks()
        self._publish_for(plan.seconds)
        seconds, server, own, helper = (
            end - begin for begin, end in zip(clocks, self._clocks(), strict=True)
        )
        publishes, deliveries, size = (
            end - begin for begin, end in zip(counts, self._counts(), strict=True)
        )
        missing = [self.published - subscriber.heard for subscriber in self._subscribers]
        return Heard(
            seconds=seconds,
            subscribers=len(self._live),
            publishes=publishes,
            deliveries=deliveries,
            bytes=size,
            server_cpu=server,
            load_cpu=own,
            helper_cpu=helper,
            connect_cpu=idle.cpu - before.cpu,
            rss_before=before.rss,
            rss_idle=idle.rss,
            latency_ms=Spread.of(self.latencies),
            lost=sum(max(count, 0) for count in missing),
            extra=sum(max(-count, 0) for count in missing),
            disorder=self.disorder,
            statuses=dict(self.statuses),
            errors=dict(self.errors),
        )

    def lose(self, subscriber: Subscriber, why: str) -> None:
        """This connection is over, and should not be."""
        self.errors[why] += 1
        self._opening.pop(subscriber.sock.fileno(), None)
        self._live.pop(subscriber.sock.fileno(), None)
        subscriber.sock.close()

    def _counts(self) -> tuple[int, int, int]:
        return self.published, self.delivered, self.bytes

    def _clocks(self) -> tuple[float, float, float, float]:
        servers = [pid for pid in (self.plan.pid, self.plan.also) if pid]
        helper = on_cpu(self.plan.helper)
        return time.monotonic(), usage(*servers).cpu, time.process_time(), helper

    def _connect(self) -> None:
        deadline = time.monotonic() + 120
        left = self.plan.count
        while (left or self._opening) and time.monotonic() < deadline:
            while left and len(self._opening) < _CONNECTING:
                left -= 1
                port = self.plan.other if self.plan.other and left % 2 else self.plan.port
                subscriber = Subscriber(self, port)
                self._subscribers.append(subscriber)
                self._opening[subscriber.sock.fileno()] = subscriber
                self._epoll.register(subscriber.sock, select.EPOLLOUT)
            self._poll(0.05)

    def _publish_for(self, seconds: float) -> None:
        """Publishes for so long; returns when all of it has arrived, or nothing does any more."""
        plan, due = self.plan, deque[int]()
        begin = progress = time.monotonic()
        end, seen, ticks = begin + seconds, self._done(), 0
        while True:
            now = time.monotonic()
            if seen != (seen := self._done()):
                progress = now
            if now - progress > _SILENCE or (now >= end and not due and self._quiet()):
                return
            wake = now + 0.05
            if now < end and plan.rate:
                while now >= (wake := begin + ticks / plan.rate):
                    due.append(time.monotonic_ns())
                    ticks += 1
            while self.free and (due or (now < end and not plan.rate and self._open())):
                self.published += 1
                self.free.popleft().publish(due.popleft() if due else time.monotonic_ns())
            self._poll(min(max(wake - now, 0), 0.05))

    def _done(self) -> tuple[int, int]:
        return self.delivered, sum(self.statuses.values())

    def _open(self) -> bool:
        """Whether fewer publishes than the window has are undelivered."""
        undelivered = self.published * self.plan.count - self.delivered
        return undelivered <= (self.plan.window - 1) * self.plan.count

    def _quiet(self) -> bool:
        """Whether all that was published has been answered and has arrived."""
        answered = len(self.free) == len(self._publishers)
        return answered and self.delivered >= self.published * self.plan.count

    def _poll_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._poll(min(left, 0.05))

    def _poll(self, timeout: float) -> None:
        """Handles what is ready, waiting for it for at most so many seconds."""
        live, pieces, rate = self._live, self.pieces, self.plan.rate
        for number, events in self._epoll.poll(timeout, _BATCH):
            subscriber = live.get(number)
            if subscriber is None:
                self._other(number, events)
                continue
            try:
                data = os.read(number, _READ)
            except OSError as error:
                self.lose(subscriber, str(error))
                continue
            self.bytes += len(data)
            place, found = pieces.get(data, (-1, []))
            if place == subscriber.place and not subscriber.rest:
                subscriber.place += len(found)
                self.delivered += len(found)
                if rate:
                    now = time.monotonic_ns()
                    self.latencies += [now - stamp for stamp in found]
            elif data:
                subscriber.take(data)
            else:
                self.lose(subscriber, "closed by the server")

    def _other(self, number: int, events: int) -> None:
        """A connection that is opening, or one that publishes."""
        opening = self._opening.get(number)
        if opening and events & select.EPOLLOUT:
            self._epoll.modify(number, select.EPOLLIN)
            opening.connected()
            return
        data = os.read(number, _READ)
        if not opening:
            if not data:
                raise ConnectionError("a publisher's connection was closed")
            self._publishers[number].take(data)
        elif not data:
            self.lose(opening, "closed before a response")
        elif opening.answer(data):
            self._live[number] = self._opening.pop(number)


def main() -> None:
    plan = Audience.parse("a load generator for rooms; see the module's docstring")
    unhindered()
    print(json.dumps(asdict(Room(plan).run())))


if __name__ == "__main__":
    main()
