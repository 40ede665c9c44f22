"""The vocabulary of rooms: one JSON object an event, the same on WebSocket, SSE and NDJSON.

An object says its own `id` where it has a position in the room; chunks of a generation have none,
because a client that comes back goes on in the room, and is told the text so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streaming.dialects import Dialect, is_text, timestamp
from streaming.events import JSON, Event

ENDINGS = {"finished": "stream_end", "failed": "stream_error", "cancelled": "stream_cancelled"}

# What only the server says: nobody may publish an event of these types.
RESERVED = frozenset(
    (
        "ack", "authenticated", "error", "gap", "heartbeat", "history", "joined", "left", "pong",
        "presence", "started", "stream_chunk", "stream_start", "user_joined", "user_left",
        "user_typing", *ENDINGS, *ENDINGS.values(),
    )
)  # fmt: skip


def frame(event: Event) -> JSON | None:
    """What followers of a room are told of this event; None where it is nothing."""
    origin, data = event.origin, event.data
    if "stream_id" in origin:  # of a generation's own log: its start and end are the room's to tell
        if not is_text(event):
            return None
        return {
            "type": "stream_chunk",
            "room": origin["room"],
            "stream_id": origin["stream_id"],
            "seq": event.id.offset,
            "content": data["content"],
        }
    room = {"room": origin["room"]}
    if not event.id.epoch:
        return {"type": event.type, **room, **data}
    place = {"id": str(event.id), **room}
    if event.type == "joined":
        messages = [message(said) for said in data["messages"]]
        return {"type": "joined", **place, **data, "messages": messages}
    time = {"timestamp": timestamp(event.time)}
    if event.type == "started":
        told = {"stream_id": data["stream_id"], "userId": data["user_id"], "model": data["model"]}
        return {"type": "stream_start", **place, **told, **time}
    if event.type in ENDINGS:
        return {"type": ENDINGS[event.type], **place, **_ending(data), **time}
    return message(event)


def _ending(data: Mapping[str, Any]) -> JSON:
    told = ("stream_id", "content", "finish_reason", "usage", "model", "error")
    return {name: data[name] for name in told if name in data}


def message(event: Event) -> JSON:
    """A `message` frame, or one of the type that was published; an answer is a message too."""
    data = event.data
    if event.type in ENDINGS:
        beside = {name: value for name, value in _ending(data).items() if name != "content"}
        said = {"userId": "assistant", "content": data["content"], "data": beside}
    else:
        said = {"userId": data["user_id"]}
        said |= {name: data[name] for name in ("content", "data") if name in data}
    type = "message" if event.type in ENDINGS else event.type
    place = {"id": str(event.id), "room": event.origin["room"]}
    return {"type": type, **place, **said, "timestamp": timestamp(event.time)}


def _say(event: Event) -> list[JSON] | None:
    told = frame(event)
    return None if told is None else [told]


ROOMS = Dialect("rooms", _say, ids="own", named="object")
