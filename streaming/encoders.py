"""Framings: events to bytes. Pure: no state, no clock, no socket.

SSE is the event stream of the HTML standard (section 9.2); NDJSON is one JSON object a line; text
is the bare answer. An `Encoder` is one dialect in one framing; the table is at the end.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial

import orjson

from streaming.dialects import DONE, Dialect, is_text, timestamp
from streaming.events import Event


def _sse(dialect: Dialect, events: Iterable[Event]) -> bytes:
    # orjson escapes every control character, so a JSON object is always one `data:` line.
    out: list[bytes] = []
    for event in events:
        objects = dialect.say(event)
        if objects is None:
            continue
        id = f"id: {event.id}\n".encode() if dialect.ids != "none" else b""
        before = id if dialect.ids == "before" else b""
        for item in objects:
            if item is not DONE:
                if dialect.named:
                    if dialect.ids == "before":
                        item["id"] = str(event.id)
                    named = item["type"] if dialect.named == "object" else event.type
                    before = b"event: %b\n" % named.encode()
                    before = id + before if "id" in item and dialect.ids != "none" else before
                out += (before, b"data: ", orjson.dumps(item), b"\n\n")
            elif dialect.done:
                out.append(b"data: [DONE]\n\n")
        if dialect.ids == "after":
            out += (id, b"\n")
    return b"".join(out)


def _ndjson(dialect: Dialect, events: Iterable[Event]) -> bytes:
    out: list[bytes] = []
    for event in events:
        for item in dialect.say(event) or ():
            if item is DONE:
                continue
            if dialect.named == "event":  # in SSE it stands beside the object
                item["type"] = event.type
            if dialect.ids in ("before", "after"):
                item["id"] = str(event.id)
            out += (orjson.dumps(item), b"\n")
    return b"".join(out)


def text_frame(payload: bytes, first: bytes = b"\x81") -> bytes:
    """One unmasked, unfragmented WebSocket text frame (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        return b"%b%c%b" % (first, size, payload)
    if size < 65536:
        return first + b"\x7e" + size.to_bytes(2) + payload
    return first + b"\x7f" + size.to_bytes(8) + payload


def deflated_frame(payload: bytes) -> bytes:
    """The same, compressed where that makes it shorter (RFC 7692). No message refers to one before
    it, so that one frame serves every connection, whatever was sent on it.
    """
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    deflated = deflate.compress(payload) + deflate.flush(zlib.Z_SYNC_FLUSH)[:-4]
    if len(deflated) >= len(payload):
        return text_frame(payload)
    return text_frame(deflated, b"\xc1")


def _websocket(frame: Callable[[bytes], bytes], dialect: Dialect, events: Iterable[Event]) -> bytes:
    items = (item for event in events for item in dialect.say(event) or ())
    return b"".join([frame(orjson.dumps(item)) for item in items])


def _ndjson_braces(dialect: Dialect, events: Iterable[Event]) -> bytes:
    """For readers that find the end of an object by looking for `}`: none inside strings."""
    out: list[bytes] = []
    for event in events:
        for line in _ndjson(dialect, [event]).splitlines():
            # Flat objects only (content): the last brace of a line is the object's own.
            out += (line[:-1].replace(b"}", b"\\u007d"), b"}\n")
    return b"".join(out)


def _text(dialect: Dialect, events: Iterable[Event]) -> bytes:
    return b"".join(event.data["content"].encode() for event in events if is_text(event))


@dataclass(frozen=True, slots=True)
class Framing:
    """How objects become bytes. comments: the framing has comments, for opening and heartbeats.
    cuts: it has no form for an error, so that a failed stream is cut.
    """

    name: str
    media_type: str
    encode: Callable[[Dialect, Iterable[Event]], bytes]
    comments: bool = False
    cuts: bool = False


SSE = Framing("sse", "text/event-stream", _sse, comments=True)
NDJSON = Framing("ndjson", "application/x-ndjson", _ndjson)
NDJSON_BRACES = Framing("ndjson", "application/x-ndjson", _ndjson_braces)
TEXT = Framing("text", "text/plain", _text, cuts=True)

WEBSOCKET = Framing("websocket", "", partial(_websocket, text_frame))
DEFLATED = Framing("websocket-deflated", "", partial(_websocket, deflated_frame))

FRAMINGS = {f.name: f for f in (SSE, NDJSON, TEXT)}


@dataclass(frozen=True, slots=True)
class Encoder:
    """One dialect in one framing. heartbeat_event: the name of the event that a client asked its
    heartbeats to be; empty for comments.
    """

    dialect: Dialect
    framing: Framing
    heartbeat_event: str = ""

    def encode(self, events: Iterable[Event]) -> bytes:
        """The bytes of these events, perhaps none."""
        return self.framing.encode(self.dialect, events)

    @property
    def opening(self) -> bytes:
        """What goes out before the first event, so that headers and proxies let go at once."""
        return b": stream\n\n" if self.framing.comments and not self.dialect.holds else b""

    def heartbeat(self, time: int) -> bytes:
        """What goes out in a long silence; nothing where the framing has no room for it."""
        name = self.heartbeat_event
        if self.framing is TEXT:
            return b""  # a word in it would be taken for the model's
        if not name:
            return b": heartbeat\n\n" if self.framing.comments else b""
        said = {"timestamp": timestamp(time) if self.dialect.dated else time}
        if self.framing.comments:
            return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(said))
        return orjson.dumps({"type": name, **said}) + b"\n"

    @property
    def cuts(self) -> bool:
        """Whether a stream that did not finish is cut: it must never look finished."""
        return self.framing.cuts or self.dialect.cuts


@lru_cache(maxsize=256)
def encoder(dialect: Dialect, framing: Framing, heartbeat_event: str = "") -> Encoder:
    """The one Encoder of this kind, so that readers of a kind share each encoding."""
    return Encoder(dialect, framing, heartbeat_event)
