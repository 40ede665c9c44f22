"""An OpenAI-compatible upstream that writes prepared bytes: `python -m bench.upstream --port 0`.

It must cost far less than what is measured in front of it, so nothing is rendered per token: the
events are built once, and with `t=1` only the clock inside them is filled in. The model's name says
what an answer is like: `fake:k=100:r=50:b=1:t=1` gives 100 tokens (k), 50 a second (r; 0: as fast
as the socket takes them), b events in each write, and with `t=1` each token's text is `#t=` and 20
digits of CLOCK_MONOTONIC nanoseconds, read just before the write. Each event is an HTTP chunk of
its own, as real servers send them. At rate 0 a write has at least 208 events, whatever b says.

Any POST is taken for a chat completion. `GET /stats` tells how many there were, any other GET gives
a model list.
"""

import argparse
import asyncio
import json
import select
import selectors
import socket
import sys
import time
from dataclasses import dataclass
from functools import cache

from bench.wire import DIGITS, MARK, ChunkedBody

_ENVELOPE = (
    b'data: {"id":"chatcmpl-AVz3kQm7Xw2Lr9TnB4cYdHpJ6sGfE","object":"chat.completion.chunk",'
    b'"created":1732147200,"model":"gpt-4o-mini-2024-07-18","service_tier":"default",'
    b'"system_fingerprint":"fp_0705bf87c0","choices":[%b],"usage":%b}\n\n'
)
_CHOICE = b'{"index":0,"delta":%b,"logprobs":null,"finish_reason":%b}'
_WORDS = (
    *(b" the", b" server", b" of", b" streaming", b".", b" and", b" token", b" a"),
    *(b" response", b",", b" in", b" model", b" to", b" connection", b" is", b"\\n"),
)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(delta: bytes, finish: bytes = b"null") -> bytes:
    return _chunk(_ENVELOPE % (_CHOICE % (delta, finish), b"null"))


_BLANK = b"@" * DIGITS  # where the clock goes
_STAMPED = _event(b'{"content":"%b%b"}' % (MARK, _BLANK))
_PLAIN = [_event(b'{"content":"%b"}' % word) for word in _WORDS]
_BLOCK = 13 * len(_WORDS)  # events in a write at rate 0: about 64 KB, and whole rounds of the words
_PLAIN_BLOCK = b"".join(_PLAIN) * (_BLOCK // len(_WORDS))
_ROLE = _event(b'{"role":"assistant","content":"","refusal":null}')
_FINISH = _event(b"{}", b'"stop"')
_DONE = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
_USAGE = b'{"prompt_tokens":12,"completion_tokens":%d,"total_tokens":%d}'
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"x-request-id: req_bench\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_MODELS = {"object": "list", "data": [{"id": "fake", "object": "model", "created": 0}]}


@cache
def _stamped_events(count: int) -> bytes:
    return _STAMPED * count


@dataclass(frozen=True)
class Answer:
    """What one answer is like: the fields of the model's name (see above)."""

    tokens: int = 100
    rate: float = 0.0
    batch: int = 1
    stamped: bool = False

    @classmethod
    def named(cls, model: str) -> "Answer":
        """Reads `fake:k=100:r=50:b=1:t=1`; a part that is missing has its default."""
        parts = dict(part.split("=", 1) for part in model.split(":") if "=" in part)
        return cls(
            tokens=int(parts.get("k", 100)),
            rate=float(parts.get("r", 0)),
            batch=max(int(parts.get("b", 1)), 1),
            stamped=parts.get("t") == "1",
        )

    def events(self, first: int, count: int) -> bytes:
        """The events of tokens `first` to `first + count`, as they go on the wire."""
        if self.stamped:
            return _stamped_events(count).replace(_BLANK, b"%020d" % time.monotonic_ns())
        if count == _BLOCK:  # blocks start at a multiple of the words, so they are all alike
            return _PLAIN_BLOCK
        return b"".join(_PLAIN[i % len(_PLAIN)] for i in range(first, first + count))

    def ending(self, with_usage: bool) -> bytes:
        """What follows the last token: the finish event, the usage where it was asked, [DONE]."""
        usage = _USAGE % (self.tokens, self.tokens + 12)
        return _FINISH + (_chunk(_ENVELOPE % (b"", usage)) if with_usage else b"") + _DONE


class Stats:
    """How many answers were asked for and how many tokens were written, for `GET /stats`."""

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0


class Connection(asyncio.Protocol):
    """One client: reads requests one after the other and writes each one's answer."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self._loop = asyncio.get_running_loop()
        self._incoming = b""
        self._answer: Answer | None = None
        self._with_usage = False
        self._sent = 0
        self._started = 0.0
        self._paused = False
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=0)  # paused as soon as the socket takes no more
        # asyncio does it only for sockets made with the protocol named; Nagle's 40 ms would be
        # taken for the server's time to first token.
        connected = transport.get_extra_info("socket")
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        self._answer = None
        if self._timer:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._incoming += data
        self._next_request()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._write_tokens()

    def _next_request(self) -> None:
        """Answers the first whole request that has come, unless an answer is still going out."""
        head, found, rest = self._incoming.partition(b"\r\n\r\n")
        if self._answer or not found:
            return
        lines = head.lower().split(b"\r\n")
        sizes = [int(line[15:]) for line in lines if line.startswith(b"content-length:")]
        if b"transfer-encoding: chunked" in lines:
            if not rest.endswith(b"0\r\n\r\n"):
                return
            body, self._incoming = ChunkedBody().feed(rest), b""
        else:
            size = sizes[0] if sizes else 0
            if len(rest) < size:
                return
            body, self._incoming = rest[:size], rest[size:]
        if head.startswith(b"GET"):
            self._write_json(vars(self._stats) if b"/stats" in lines[0] else _MODELS)
            self._next_request()
        else:
            self._start(json.loads(body))

    def _start(self, asked: dict[str, object]) -> None:
        self._stats.requests += 1
        answer = Answer.named(str(asked.get("model", "")))
        if asked.get("stream") is not True:
            text = b"".join(_WORDS[i % len(_WORDS)] for i in range(answer.tokens)).decode()
            message = {"role": "assistant", "content": text.replace("\\n", "\n")}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = json.loads(_USAGE % (answer.tokens, answer.tokens + 12))
            kind = {"id": "chatcmpl-x", "object": "chat.completion", "created": 0, "model": "fake"}
            self._write_json({**kind, "choices": [choice], "usage": usage})
            self._next_request()
            return
        options = asked.get("stream_options")
        self._with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        self._answer = answer
        self._sent = 0
        self._started = self._loop.time()
        self._transport.write(_STREAM_HEAD + _ROLE)
        self._write_tokens()

    def _write_tokens(self) -> None:
        """Writes what is due and the socket takes; then waits for the clock or for the socket."""
        answer = self._answer
        while answer and not self._paused:
            if answer.rate:
                due = self._started + self._sent / answer.rate
                if due > self._loop.time():
                    self._timer = self._loop.call_at(due, self._write_tokens)
                    return
            size = answer.batch if answer.rate else max(answer.batch, _BLOCK)
            count = min(size, answer.tokens - self._sent)
            data = answer.events(self._sent, count)
            self._sent += count
            self._stats.tokens += count
            if self._sent == answer.tokens:
                data += answer.ending(self._with_usage)
                answer = self._answer = None
            self._transport.write(data)
        if not self._answer:
            self._next_request()

    def _write_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self._transport.write(head % len(body) + body)


class FineSelector(selectors.EpollSelector):
    """epoll waits whole milliseconds, which would bundle the tokens of streams that merely are due
    in the same one. `select` on the epoll descriptor itself waits microseconds."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            select.select([self.fileno()], [], [], timeout)
        return super().select(0)


def listening(port: int) -> None:
    """Says where this process listens, in the one JSON line that `measure.start` waits for."""
    line = {"level": "info", "event": "listening", "url": f"http://127.0.0.1:{port}"}
    print(json.dumps(line), file=sys.stderr, flush=True)


async def serve(port: int) -> None:
    """Serves until the process is ended."""
    stats = Stats()
    sock = socket.create_server(("127.0.0.1", port), backlog=4096)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(stats), sock=sock)
    listening(sock.getsockname()[1])
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description="a prepared OpenAI-compatible upstream")
    parser.add_argument("--port", type=int, default=0)
    port = parser.parse_args().port
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(FineSelector())) as runner:
        runner.run(serve(port))


if __name__ == "__main__":
    main()
