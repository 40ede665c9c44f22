"""HTTP/1.1 by hand: just enough of it to count bytes, chunks and marked tokens on a socket."""

import re
import socket
from dataclasses import dataclass

MARK = b"#t="
"""Stands in every token the upstream makes with `t=1`, followed by its clock."""
DIGITS = 20
"""Digits of CLOCK_MONOTONIC nanoseconds after the mark."""

_STAMP = re.compile(MARK + rb"(\d{%d})" % DIGITS)
_STAMPED = len(MARK) + DIGITS


class ChunkedBody:
    """Takes the chunked coding off a body, wherever the reads were cut.

    Attributes:
        chunks: chunks with content seen so far.
        ended: the last chunk has come; nothing may follow.
    """

    __slots__ = ("_last", "_left", "_line", "chunks", "ended")

    def __init__(self) -> None:
        self.chunks = 0
        self.ended = False
        self._line = b""  # the beginning of a size line
        self._left = 0  # of the current chunk, its closing CRLF included
        self._last = False

    def feed(self, data: bytes) -> bytes:
        """The content in `data`. Raises ValueError for what is no chunked coding."""
        if self._line:
            data, self._line = self._line + data, b""
        parts = []
        position, size, left = 0, len(data), self._left
        while position < size:
            if left:
                content = min(left - 2, size - position)
                if content > 0:
                    parts.append(data[position : position + content])
                step = min(left, size - position)
                position += step
                left -= step
                if self._last and not left:
                    self.ended = True
                continue
            if self.ended:
                raise ValueError("bytes after the last chunk")
            end = data.find(b"\r\n", position)
            if end < 0:
                self._line = data[position:]
                break
            length = int(data[position:end], 16)
            position = end + 2
            left = length + 2
            if length:
                self.chunks += 1
            else:
                self._last = True
        self._left = left
        return parts[0] if len(parts) == 1 else b"".join(parts)


class MarkCounter:
    """Counts marks in a text that comes in pieces, each mark once, wherever it was cut."""

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail = b""

    def count(self, piece: bytes) -> int:
        """How many marks became whole with this piece."""
        data = self._tail + piece
        # A tail shorter than the mark can hold none by itself: nothing is counted twice.
        self._tail = data[1 - len(MARK) :]
        return data.count(MARK)

    def stamps(self, piece: bytes) -> list[int]:
        """The clocks of the marks that became whole, digits and all, with this piece."""
        data = self._tail + piece
        size = len(data)
        last = data.rfind(MARK, 0, max(size - DIGITS, 0))
        self._tail = data[max(last + _STAMPED if last >= 0 else 0, size - _STAMPED + 1) :]
        return [int(digits) for digits in _STAMP.findall(data)]


def stamps(text: bytes) -> list[int]:
    """The clocks of all marks in a text."""
    return [int(digits) for digits in _STAMP.findall(text)]


Units = tuple[bytes, bytes, list[bytes]]
"""What whole units hold, the beginning of one that is not whole yet, and pings."""


def frames(data: bytes) -> Units:
    """Takes the framing off what a WebSocket server sent."""
    position, size = 0, len(data)
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    while size - position >= 2:
        length, start = data[position + 1], position + 2
        if length > 125:
            start += 2 if length == 126 else 8
            length = int.from_bytes(data[position + 2 : start])
        if start + length > size:
            break
        parts[data[position] & 15 == 9].append(data[start : start + length])
        position = start + length
    return b"".join(parts[False]), data[position:], parts[True]


def chunks(data: bytes) -> Units:
    """Takes the chunked coding off a body that does not end."""
    position, parts = 0, []
    while (line := data.find(b"\r\n", position)) > 0:
        end = line + 2 + int(data[position:line], 16)
        if end + 2 > len(data):
            break
        parts.append(data[line + 2 : end])
        position = end + 2
    return b"".join(parts), data[position:], []


def blocks(data: bytes) -> Units:
    """Whole events of an SSE body that has no coding."""
    text, end, rest = data.rpartition(b"\n\n")
    return text + end, rest, []


def to_server(opcode: int, payload: bytes) -> bytes:
    """A WebSocket frame of a client, up to 125 bytes, masked with zeros."""
    return bytes((0x80 | opcode, 0x80 | len(payload), 0, 0, 0, 0)) + payload


@dataclass
class Head:
    """The first line and the headers (names in lower case) of a response."""

    status: int
    headers: dict[str, str]

    @classmethod
    def parse(cls, data: bytes) -> "Head":
        """Reads the head without its closing blank line. Raises ValueError when it is not HTTP."""
        first, *lines = data.decode("latin-1").split("\r\n")
        version, status, *_ = first.split(" ", 2)
        if not version.startswith("HTTP/1."):
            raise ValueError(f"not HTTP/1: {first[:80]}")
        pairs = (line.partition(":") for line in lines)
        return cls(int(status), {name.lower(): value.strip() for name, _, value in pairs})

    @property
    def chunked(self) -> bool:
        return self.headers.get("transfer-encoding", "").lower() == "chunked"

    @property
    def keep_alive(self) -> bool:
        return self.headers.get("connection", "").lower() != "close"


def request(method: str, path: str, host: str, body: bytes = b"", *headers: str) -> bytes:
    """The bytes of one request; a body is taken for JSON."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *headers]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def bearer(token: str) -> tuple[str, ...]:
    """The header with this token; none without one."""
    return (f"Authorization: Bearer {token}",) if token else ()


@dataclass
class Exchange:
    """One response read to its end: what came, and in what packing."""

    head: Head
    body: bytes
    wire_bytes: int
    chunks: int
    local_port: int


def exchange(address: tuple[str, int], message: bytes, timeout: float = 60.0) -> Exchange:
    """Sends one request on a connection of its own and reads the answer to its end.

    Raises OSError (also on a cut connection or after `timeout` seconds of silence) and ValueError.
    """
    with socket.create_connection(address, timeout) as sock:
        port = sock.getsockname()[1]
        sock.sendall(message)
        data = b""
        while b"\r\n\r\n" not in data:
            data += _receive(sock)
        top, _, rest = data.partition(b"\r\n\r\n")
        head = Head.parse(top)
        wire = len(data)
        parts = []
        coding = ChunkedBody()
        if head.chunked:
            parts.append(coding.feed(rest))
            while not coding.ended:
                data = _receive(sock)
                wire += len(data)
                parts.append(coding.feed(data))
        else:
            parts.append(rest)
            left = int(head.headers.get("content-length", "0")) - len(rest)
            while left > 0:
                data = _receive(sock)
                wire += len(data)
                left -= len(data)
                parts.append(data)
        return Exchange(head, b"".join(parts), wire, coding.chunks, port)


def _receive(sock: socket.socket) -> bytes:
    data = sock.recv(1 << 18)
    if not data:
        raise ConnectionError("cut before the end of the response")
    return data
