"""An OpenAI-compatible upstream with every fault, in a process of its own.

    python -m tests.upstream --port 0        prints its URL as its first line

The model name says what a request gets (tests/behaviour.py). The text depends only on the question
and that name: `expected(model, prompt)`.

It writes every byte itself on raw sockets, and keeps a record: `GET /control/log[?model=]`, and
`GET /control/open`, how many answers are under way. Times are `time.monotonic()`, which all
processes of a machine share, and a client's going is noted when it happens, also while stalled.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

from tests.behaviour import NEVER, Behaviour, answer, choice_of, expected, prompt_of, tokens_of
from tests.sockets import rst

__all__ = ["Upstream", "answer", "expected"]


class Record:
    """What is remembered of one request."""

    def __init__(self, headers: dict[str, str], body: dict[str, Any]) -> None:
        self.seen = {
            "model": body.get("model", ""),
            "authorization": headers.get("authorization", ""),
            "headers": headers,
            "body": body,
            "opened_at": time.monotonic(),
            "first_token_at": None,
            "closed_at": None,
            "closed_by": None,
            "tokens_sent": 0,
        }

    def token(self) -> None:
        self.seen["first_token_at"] = self.seen["first_token_at"] or time.monotonic()
        self.seen["tokens_sent"] += 1

    def close(self, by: str) -> None:
        """Who ended it is who ended it first."""
        if self.seen["closed_by"] is None:
            self.seen.update(closed_at=time.monotonic(), closed_by=by)


class Reader(asyncio.StreamReader):
    """Says at once when the client has gone, also while nobody reads."""

    on_gone: Callable[[], object] | None = None

    def feed_eof(self) -> None:
        super().feed_eof()
        if self.on_gone:
            self.on_gone()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        if self.on_gone:
            self.on_gone()


class Body:
    """Writes one response: the head, then pieces of a body, then its end (or none)."""

    def __init__(self, writer: asyncio.StreamWriter, b: Behaviour) -> None:
        self.writer, self.b, self.chunked = writer, b, False

    async def head(self, status: int, content_type: str, **headers: object) -> None:
        """Without a `Content-Length` it is chunked, or with `close` ends with the connection."""
        self.chunked = "Content_Length" not in headers and not self.b.close
        if self.chunked:
            headers["Transfer_Encoding"] = "chunked"
        headers["Connection"] = "close" if self.b.close else "keep-alive"
        lines = [f"HTTP/1.1 {status} Upstream", f"Content-Type: {content_type}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.writer.write("\r\n".join([*lines, "\r\n"]).encode())
        await self.writer.drain()

    async def write(self, data: bytes) -> None:
        if not data:
            return  # an empty chunk would be the last one
        pieces = (data[i : i + 1] for i in range(len(data))) if self.b.split else (data,)
        for piece in pieces:
            self.writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self.chunked else piece)
            await self.writer.drain()
            await asyncio.sleep(0)

    async def end(self) -> None:
        if self.chunked:
            self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()

    async def whole(self, status: int, value: object, **headers: object) -> None:
        data = json.dumps(value, ensure_ascii=False).encode()
        await self.head(status, "application/json", Content_Length=len(data), **headers)
        await self.write(data)


def error(message: str, status: int = 500) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": f"code_{status}"}}


class Answer:
    """One request's answer."""

    def __init__(self, out: Body, record: Record, request: dict[str, Any]) -> None:
        self.out, self.b, self.record, self.request = out, out.b, record, request
        self.prompt = prompt_of(request["messages"])
        self.n = request.get("n") or 1
        asked = request.get("max_completion_tokens") or request.get("max_tokens") or 10**9
        self.choices = list(tokens_of(self.b, self.prompt, self.n, asked))
        short = asked < len(self.b.text(self.prompt))
        self.finish = self.b.finish or ("length" if short else "")
        self.finish = self.finish or ("tool_calls" if self.b.tool else "stop")

    def envelope(self, kind: str, **rest: object) -> dict[str, Any]:
        created = 1763719200
        head = {"id": "chatcmpl-up", "object": kind, "created": created, "model": "up-1"}
        return {**head, **rest}

    def usage(self) -> dict[str, int]:
        asked = sum(len(prompt_of([{**m, "role": "user"}])) for m in self.request["messages"]) // 4
        said = self.record.seen["tokens_sent"]
        return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}

    async def pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.b.comments and time.monotonic() < until - 0.05:
            await self.out.write(b": keepalive\n\n")
            await asyncio.sleep(0.05)
        await asyncio.sleep(max(0.0, until - time.monotonic()))

    def event(self, data: object, blank: bool = True) -> bytes:
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        comment = ": keepalive\n\n: another\n" if self.b.comments else ""
        block = f"{comment}data: {text}" + ("\n\n" if blank else "")
        return (block.replace("\n", "\r\n") if self.b.crlf else block).encode()

    def chunk(self, choice: dict[str, Any], blank: bool = True) -> bytes:
        return self.event(self.envelope("chat.completion.chunk", choices=[choice]), blank)

    async def fault(self, kind: str) -> bool:
        """Does it; says whether the answer is over."""
        if kind == "stall":
            await self.pause(3600)
        elif kind == "reset":
            self.record.close("server")
            rst(self.out.writer)
        elif kind == "drop":
            self.record.close("server")
            self.out.writer.close()
        elif kind == "end_clean":
            await self.out.end()
        elif kind == "bad_json":
            await self.out.write(self.event('{"choices": [{"delta": {"content": "oh'))
            return False
        elif kind == "error_event":
            await self.out.write(self.event(error("the model fell over")))
            await self.out.end()
        return True

    def opening(self) -> bytes:
        role = {"role": "assistant", "content": ""}
        return b"".join(self.chunk(choice_of(role, index)) for index in range(self.n))

    async def stream(self) -> None:
        b, out = self.b, self.out
        await out.head(200, "text/event-stream; charset=utf-8")
        if b.role_first:
            await out.write(self.opening())
        await self.pause(b.delay)
        if b.first_error:
            await self.fault("error_event")
            return
        faults = b.faults(len(self.choices))
        gathered = b"" if b.role_first else self.opening()
        start = time.monotonic()
        for i, choice in enumerate([*self.choices, None]):
            if i in faults:
                await out.write(gathered)
                gathered = b""
                if await self.fault(faults[i]):
                    return
            if choice is None:
                break
            if b.rate:
                await self.pause(start + i / b.rate - time.monotonic())
            gathered += self.chunk(choice)
            self.record.token()
            if i % b.batch == b.batch - 1:
                await out.write(gathered)
                gathered = b""
        await self.ending(gathered)

    async def ending(self, gathered: bytes) -> None:
        """The finish reason, usage and `[DONE]`, as far as they come, and the body's end."""
        b = self.b
        tail = [
            self.envelope("chat.completion.chunk", choices=[choice_of({}, index, self.finish)])
            for index in range(self.n)
        ]
        rest: list[object] = []
        if b.usage and (self.request.get("stream_options") or {}).get("include_usage"):
            rest.append(self.envelope("chat.completion.chunk", choices=[], usage=self.usage()))
        if not b.no_done:
            rest.append("[DONE]")
        events = [*tail, *rest]
        lines = [self.event(e, not b.no_blank or i < len(events) - 1) for i, e in enumerate(events)]
        await self.out.write(gathered + b"".join(lines[: self.n]))
        if b.stall_end:
            await self.pause(3600)
        await self.pause(b.late_done)
        await self.out.write(b"".join(lines[self.n :]))
        await self.out.end()

    def message(self, index: int) -> dict[str, Any]:
        """The tokens of one choice put together."""
        said: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        calls: list[dict[str, Any]] = []
        for choice in self.choices:
            if choice["index"] != index:
                continue
            self.record.token()
            for key, value in choice["delta"].items():
                if key != "tool_calls":
                    said[key] = (said.get(key) or "") + value
                elif "id" in value[0]:
                    entry = {k: v for k, v in value[0].items() if k != "index"}
                    calls.append({**entry, "function": dict(entry["function"])})
                else:
                    calls[-1]["function"]["arguments"] += value[0]["function"]["arguments"]
        return {**said, "tool_calls": calls} if calls else said

    async def plain(self) -> None:
        """One JSON object; a fault comes after half of it."""
        out, kind = self.out, next((k for at, k in self.b.faults(2).items() if at != NEVER), "")
        await self.pause(self.b.delay)
        if self.b.first_error or kind == "error_event":
            await out.whole(500, error("the model fell over"))
            return
        choices = [
            {"index": index, "message": self.message(index), "finish_reason": self.finish}
            for index in range(self.n)
        ]
        usage = {"usage": self.usage()} if self.b.usage else {}
        value = self.envelope("chat.completion", choices=choices, **usage)
        data = json.dumps(value, ensure_ascii=False).encode()
        await out.head(200, "application/json", Content_Length=len(data))
        if not kind:
            await out.write(data)
            return
        await out.write(data[: len(data) // 2])
        if kind == "bad_json":
            await out.write(b"~" * (len(data) - len(data) // 2))
        elif kind == "stall":
            await self.pause(3600)
        else:
            self.record.close("server")
            if kind == "reset":
                rst(out.writer)
            else:
                out.writer.close()


class Upstream:
    """The server: reads requests off sockets, answers them, remembers them."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.turns: dict[str, int] = {}

    async def start(self, host: str, port: int) -> asyncio.Server:
        def connection() -> asyncio.StreamReaderProtocol:
            return asyncio.StreamReaderProtocol(Reader(limit=1 << 24), self.serve)

        loop = asyncio.get_running_loop()
        return await loop.create_server(connection, host, port, backlog=1024)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert isinstance(reader, Reader)
        try:
            while await self.request(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass  # it has gone; the record says so
        finally:
            writer.close()

    async def request(self, reader: Reader, writer: asyncio.StreamWriter) -> bool:
        """Reads one request and answers it. False when the connection is done with."""
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = lines[0].split(" ")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
        headers.pop("", None)
        raw = await reader.readexactly(int(headers.get("content-length", "0")))
        path, _, query = target.partition("?")
        plain = Body(writer, Behaviour())
        if (method, path) != ("POST", "/v1/chat/completions"):
            await self.look(plain, path, urllib.parse.parse_qs(query))
            return True
        body = json.loads(raw)
        record = Record(headers, body)
        self.records.append(record)
        turn = self.turns[body["model"]] = self.turns.get(body["model"], -1) + 1
        try:
            b = Behaviour.of(body["model"], turn)
        except ValueError as wrong:
            await plain.whole(400, error(str(wrong), 400))
            record.close("server")
            return True
        work = asyncio.ensure_future(self.answer(Body(writer, b), record, body, turn))

        def gone() -> None:
            record.close("client")
            work.cancel()

        reader.on_gone = gone
        if reader.at_eof():  # it went before anybody was listening
            gone()
        try:
            await work
        except asyncio.CancelledError:
            writer.transport.abort()
            return False
        finally:
            reader.on_gone = None
            record.close("server")
        return not b.close and not writer.is_closing()

    async def answer(self, out: Body, record: Record, body: dict[str, Any], turn: int) -> None:
        b = out.b
        await asyncio.sleep(b.headers_delay)
        if b.status != 200 and (not b.flaky or turn < b.flaky):
            extra = {"Retry_After": b.retry_after} if b.retry_after else {}
            await out.whole(b.status, error(f"refused with {b.status}", b.status), **extra)
            return
        answer = Answer(out, record, body)
        await (answer.stream() if body.get("stream") else answer.plain())

    async def look(self, out: Body, path: str, query: dict[str, list[str]]) -> None:
        """The model list and the record."""
        seen = [record.seen for record in self.records]
        if path == "/v1/models":
            rows = [
                {"id": name, "object": "model", "created": 1763719200, "owned_by": "tests"}
                for name in ("up-1", "up-2")
            ]
            await out.whole(200, {"object": "list", "data": rows})
        elif path == "/control/log":
            wanted = query.get("model")
            await out.whole(200, [s for s in seen if not wanted or s["model"] == wanted[0]])
        elif path == "/control/open":
            await out.whole(200, sum(s["closed_by"] is None for s in seen))
        else:
            await out.whole(404, error(f"no such path: {path}", 404))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    server = await Upstream().start(options.host, options.port)
    host, port = server.sockets[0].getsockname()[:2]
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    print(f"http://{host}:{port}", flush=True)
    await stop.wait()
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
