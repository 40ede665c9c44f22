"""The load generator: raw sockets and epoll, one thread, one JSON line of results.

Two kinds of load. *Streams*: `--streams` connections each send the same request, read the answer to
its end and send it again. *Readers* (`--attach PATH`): one such request starts one generation, and
`--readers` connections attach to it by PATH, in which `{id}` is the answer's `X-Stream-Id`.

Every token is counted by the mark the upstream puts into it (`#t=`), across any boundary. What is
reported is what happened in the window of `--seconds` that begins when all connections are up and
`--warmup` has passed: tokens, bytes, CPU seconds of the server (`--pid`), of the upstream
(`--helper`) and of the load itself. An answer that ended with another number of tokens than
`--expect` is counted in `lost` (or `extra`), whenever it ended.
"""

import json
import os
import select
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace

from bench.plan import Plan, Result, Spread
from bench.proc import unhindered, usage
from bench.wire import ChunkedBody, Head, MarkCounter, bearer, request

_BUFFER = 1 << 18


class Stream:
    """One connection and the answer that is coming on it."""

    def __init__(self, load: "Load", message: bytes, repeat: bool) -> None:
        self._load = load
        self._message = message
        self._repeat = repeat
        self.head: Head | None = None
        self.tokens = 0

    def open(self) -> None:
        """Connects; the request is sent once the connection is up."""
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.connect_ex(("127.0.0.1", self._load.plan.port))
        self._load.watch(self)

    def connected(self) -> None:
        """The connection is up, or refused."""
        if error := self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._fail(os.strerror(error))
        else:
            self._send()

    def _send(self) -> None:
        self._top = b""
        self.head = None
        self._coding = ChunkedBody()
        self._marks = MarkCounter()
        self._left: int | None = None  # of a body with a known length
        self.tokens = 0
        self._last = 0
        self._sent = time.monotonic_ns()
        self._load.started += 1
        self.sock.send(self._message)

    def readable(self, buffer: memoryview) -> None:
        """Takes what the socket has."""
        try:
            size = self.sock.recv_into(buffer)
        except OSError as error:
            self._fail(str(error))
            return
        now = time.monotonic_ns()
        data = bytes(buffer[:size])
        self._load.bytes += size
        try:
            if not self.head:
                self._top += data
                top, found, data = self._top.partition(b"\r\n\r\n")
                if not found:
                    if not size:
                        self._fail("closed before a response")
                    return
                self.head = Head.parse(top)
                self._load.answered(self.head)
                if length := self.head.headers.get("content-length"):
                    self._left = int(length)
            if self.head.chunked:
                before = self._coding.chunks
                body = self._coding.feed(data)
                self._load.chunks += self._coding.chunks - before
                ended = self._coding.ended
            else:
                body = data
                if self._left is not None:
                    self._left -= len(data)
                ended = not size if self._left is None else self._left == 0
        except ValueError as error:
            self._fail(str(error))
            return
        if body:
            self._count(body, now)
        if ended:
            self._end()
        elif not size:
            self._fail("cut before the end of the response")

    def _count(self, body: bytes, now: int) -> None:
        load = self._load
        if load.plan.clock:
            stamps = self._marks.stamps(body)
            new = len(stamps)
            if load.in_window:
                load.latencies += [now - stamp for stamp in stamps]
        else:
            new = self._marks.count(body)
        if not new:
            return
        if load.in_window:
            if self.tokens:
                load.gaps.append(now - self._last)
            else:
                load.firsts.append(now - self._sent)
        self._last = now
        self.tokens += new
        load.tokens += new

    def _end(self) -> None:
        load = self._load
        load.finished += 1
        if expect := load.plan.expect:
            load.lost += max(expect - self.tokens, 0)
            load.extra += max(self.tokens - expect, 0)
        if not self._repeat:
            self.close()
        elif self.head and self.head.keep_alive:
            self._send()
        else:
            self.close()
            self.open()

    def _fail(self, why: str) -> None:
        self._load.errors[why] += 1
        self.close()

    def close(self) -> None:
        self._load.forget(self)
        self.sock.close()


class Load:
    """All connections of one plan, and what they counted."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.in_window = False
        self.tokens = self.bytes = self.chunks = 0
        self.started = self.finished = self.lost = self.extra = self.heads = 0
        self.firsts: list[int] = []
        self.gaps: list[int] = []
        self.latencies: list[int] = []
        self.statuses: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self._epoll = select.epoll()
        self._streams: dict[int, Stream] = {}
        self._buffer = memoryview(bytearray(_BUFFER))
        self._rss = usage(plan.pid).rss
        self._peak = self._rss
        self._next_sample = 0.0

    def watch(self, stream: Stream) -> None:
        self._streams[stream.sock.fileno()] = stream
        self._epoll.register(stream.sock, select.EPOLLOUT)

    def forget(self, stream: Stream) -> None:
        self._streams.pop(stream.sock.fileno(), None)
        self._epoll.unregister(stream.sock)

    def answered(self, head: Head) -> None:
        self.heads += 1
        self.statuses[str(head.status)] += 1

    def run(self) -> Result:
        """Runs the whole plan and returns what it measured.

        Raises RuntimeError where the generation to attach to did not start.
        """
        plan = self.plan
        message = self._message("POST", plan.path, plan.body)
        streams = [Stream(self, message, repeat=not plan.attach) for _ in range(plan.streams)]
        self._open(streams)
        if plan.attach:
            self._wait_for_heads(len(streams))
            head = streams[0].head
            if not head or head.status != 200:
                raise RuntimeError(f"no generation: {head or dict(self.errors)}")
            path = plan.attach.replace("{id}", head.headers["x-stream-id"])
            get = self._message("GET", path)
            self._open([Stream(self, get, repeat=False) for _ in range(plan.readers)])
            self._wait_for_heads(len(streams) + plan.readers)
        self._poll_for(plan.warmup)
        result = self._window(streams[0])
        deadline = time.monotonic() + plan.drain
        while self._streams and time.monotonic() < deadline:
            self._poll(0.05)
        return replace(
            result,
            started=self.started,
            finished=self.finished,
            lost=self.lost,
            extra=self.extra,
            statuses=dict(self.statuses),
            errors=dict(self.errors),
        )

    def _window(self, first: Stream) -> Result:
        """The measured seconds: counts everything from now until they are over."""
        self.in_window = True
        before, generated = self._counts(), first.tokens
        clocks = self._clocks()
        self._poll_for(self.plan.seconds)
        seconds, server, upstream, own = (
            end - begin for begin, end in zip(clocks, self._clocks(), strict=True)
        )
        self.in_window = False
        tokens, answers, size, chunks = (
            end - begin for begin, end in zip(before, self._counts(), strict=True)
        )
        return Result(
            seconds=seconds,
            tokens=tokens,
            generated=first.tokens - generated if self.plan.attach else tokens,
            answers=answers,
            bytes=size,
            chunks=chunks,
            connections=len(self._streams),
            server_cpu=server,
            upstream_cpu=upstream,
            load_cpu=own,
            rss_before=self._rss,
            rss_peak=self._peak,
            first_ms=Spread.of(self.firsts),
            latency_ms=Spread.of(self.latencies),
            gap_ms=Spread.of(self.gaps),
        )

    def _counts(self) -> tuple[int, int, int, int]:
        return self.tokens, self.finished, self.bytes, self.chunks

    def _clocks(self) -> tuple[float, float, float, float]:
        """Now: wall, the server's CPU, the upstream's, our own."""
        plan = self.plan
        return time.monotonic(), usage(plan.pid).cpu, usage(plan.helper).cpu, time.process_time()

    def _message(self, method: str, path: str, body: str = "") -> bytes:
        host = f"127.0.0.1:{self.plan.port}"
        return request(method, path, host, body.encode(), *bearer(self.plan.token))

    def _open(self, streams: Sequence[Stream]) -> None:
        """Opens them evenly over the ramp, so that they do not go in step afterwards."""
        begin = time.monotonic()
        for i, stream in enumerate(streams):
            self._poll_for(begin + i * self.plan.ramp / len(streams) - time.monotonic())
            stream.open()

    def _wait_for_heads(self, count: int) -> None:
        deadline = time.monotonic() + 30
        while self.heads < count and not self.errors and time.monotonic() < deadline:
            self._poll(0.05)

    def _poll_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._poll(min(left, 0.05))

    def _poll(self, timeout: float) -> None:
        """Handles what is ready, waiting for it for at most so many seconds."""
        for number, events in self._epoll.poll(timeout):
            stream = self._streams.get(number)
            if not stream:
                continue
            if events & select.EPOLLOUT:
                self._epoll.modify(number, select.EPOLLIN)
                stream.connected()
            else:
                stream.readable(self._buffer)
        if self.plan.pid and time.monotonic() > self._next_sample:
            self._next_sample = time.monotonic() + 0.25
            self._peak = max(self._peak, usage(self.plan.pid).rss)


def main() -> None:
    plan = Plan.parse("a load generator; see the module's docstring")
    unhindered()
    print(json.dumps(asdict(Load(plan).run())))


if __name__ == "__main__":
    main()
