"""Clients of every kind: what each asks for, and what it makes of the answer.

A kind is a dialect in a framing over a version of HTTP. Whatever the kind, `Seen` says the same of
an answer: its text, how the client believes it ended, and how the connection did.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.readers import Answer, Ndjson, Parser, Sse, Text, ask

PROMPT = "what is a river?"
DONE = "[DONE]"
DIALECTS = ("content", "chat", "tool", "native", "openai")
MEDIA = {"sse": "text/event-stream", "ndjson": "application/x-ndjson", "text": "text/plain"}
_PARSERS: dict[str, type[Parser[Any]]] = {"sse": Sse, "ndjson": Ndjson, "text": Text}
_numbers = itertools.count()


class Kind(NamedTuple):
    """One kind of streaming client."""

    dialect: str
    framing: str = "sse"
    http: str = "1.1"

    def __str__(self) -> str:
        return f"{self.dialect} {self.framing} HTTP/{self.http}"

    @property
    def cuts(self) -> bool:
        """Whether this client can learn of a failure only by a connection that is cut."""
        return self.framing == "text" or self.dialect == "openai"


KINDS = [Kind(dialect, framing) for dialect in DIALECTS for framing in MEDIA]
OLD_KINDS = [kind._replace(http="1.0") for kind in KINDS]  # HTTP/1.0: no chunks
JSON_PATHS = ("/api/v1/generate", "/api/v1/ai/generate", "/v1/chat/completions")  # in one piece


@dataclass
class Seen:
    """What a client saw. ending: `finished`, `failed`, `cancelled`, or "" for a client that was
    told nothing. ended: of the connection, `end` or `cut`. items: all the objects it got.
    """

    status: int
    headers: dict[str, str]
    items: list[Any]
    text: str
    ending: str
    code: str
    ended: str

    @property
    def stream_id(self) -> str:
        return self.headers["x-stream-id"]


def named(words: str) -> str:
    """A model name for the upstream of the tests (tests/behaviour.py) that nobody else uses."""
    return f"up:id={next(_numbers)},{words}"


def body_of(path: str, prompt: str = PROMPT, **fields: Any) -> dict[str, Any]:
    """A body that asks for this prompt where this path wants it."""
    messages = [{"role": "user", "content": prompt}]
    return ({"messages": messages} if path.startswith("/v1/") else {"prompt": prompt}) | fields


@asynccontextmanager
async def asked(
    url: str, kind: Kind, model: str, headers: dict[str, str] | None = None, **fields: Any
) -> AsyncIterator[Answer]:
    """Starts a generation as a client of this kind does. *native* is only to attach with, so its
    client starts another way, leaves, and attaches.
    """
    accept = {"Accept": MEDIA[kind.framing], **(headers or {})}
    messages = [{"role": "user", "content": PROMPT}]
    requests: dict[str, tuple[str, dict[str, Any]]] = {
        "content": ("/stream", {"prompt": PROMPT}),
        "chat": ("/api/chat/stream", {"message": PROMPT}),
        "tool": ("/api/chat/stream", {"messages": messages}),
        "native": ("/stream", {"prompt": PROMPT}),
        "openai": ("/v1/chat/completions", {"messages": messages, "stream": True}),
    }
    path, body = requests[kind.dialect]
    body = {**body, "model": model, **fields}
    async with ask("POST", url + path, http=kind.http, headers=accept, json_body=body) as answer:
        if kind.dialect != "native":
            yield answer
            return
    async with attached(url, answer.headers["x-stream-id"], kind, headers=headers) as answer:
        yield answer


@asynccontextmanager
async def attached(
    url: str,
    stream_id: str,
    kind: Kind,
    after: str | int = 0,
    headers: dict[str, str] | None = None,
) -> AsyncIterator[Answer]:
    """Reads a generation that there is, from a position."""
    query = f"dialect={kind.dialect}&format={kind.framing}&starting_after={after}"
    path = f"{url}/api/v1/streams/{stream_id}/events?{query}"
    async with ask("GET", path, http=kind.http, headers=headers) as answer:
        yield answer


async def start(url: str, kind: Kind, model: str, **options: Any) -> Seen:
    """Starts a generation and reads it to its end; `options` as in `asked`."""
    async with asked(url, kind, model, **options) as answer:
        return await see(kind, answer)


async def attach(url: str, stream_id: str, kind: Kind, **options: Any) -> Seen:
    """Attaches to a generation and reads it to its end; `options` as in `attached`."""
    async with attached(url, stream_id, kind, **options) as answer:
        return await see(kind, answer)


async def whole(
    url: str, path: str, model: str, headers: dict[str, str] | None = None, **fields: Any
) -> Seen:
    """Asks for an answer in one piece."""
    body = body_of(path, model=model, **fields)
    async with ask("POST", url + path, headers=headers, json_body=body) as answer:
        return await see(Kind("json"), answer)


async def status(url: str, stream_id: str, **headers: str) -> dict[str, Any]:
    """What the server says of a generation; `{"status": 404}` where it knows none."""
    async with ask("GET", f"{url}/api/v1/streams/{stream_id}", headers=headers) as answer:
        said: dict[str, Any] = await answer.json()
        return {**said, "status": answer.status}


async def once(
    url: str, stream_id: str, key: str, wanted: object, **headers: str
) -> dict[str, Any]:
    """The status as soon as it says this."""
    end = time.monotonic() + 30
    while (said := await status(url, stream_id, **headers)).get(key) != wanted:
        assert time.monotonic() < end, said
    return said


async def stop(url: str, stream_id: str, **headers: str) -> Answer:
    """Calls stop; the answer's body has been read."""
    path = f"{url}/api/v1/streams/{stream_id}/stop"
    async with ask("POST", path, headers=headers) as answer:
        await answer.body()
        return answer


async def see(kind: Kind, answer: Answer) -> Seen:
    """Reads the rest of an answer as a client of this kind does."""
    if answer.headers.get("content-type", "").startswith("application/json"):
        return await _see_json(answer)
    items = await answer.read(_PARSERS[kind.framing]())
    if kind.framing == "sse":
        items = [DONE if message.data == DONE else message.json() for message in items]
    text = "".join(text_of(kind, item) for item in items)
    ending, code = _ending(kind, items, answer.ended)
    return Seen(answer.status, answer.headers, items, text, ending, code, answer.ended)


async def _see_json(answer: Answer) -> Seen:
    value = await answer.json()
    ending, code, text = "finished", "", value.get("text", "")
    if "error" in value:
        code = value["error"]["code"]
        ending = "cancelled" if code == "cancelled" else "failed"
    elif "choices" in value:
        text = value["choices"][0]["message"]["content"]
    return Seen(answer.status, answer.headers, [value], text, ending, code, answer.ended)


def text_of(kind: Kind, item: Any) -> str:
    """The answer's text in one item of a stream."""
    if kind.framing == "text":
        return str(item)
    if item == DONE:
        return ""
    match kind.dialect:
        case "native":
            kinds = ("text", "code", "table", "image")
            delta = item["type"] == "delta" and item["data"]["kind"] in kinds
            return str(item["data"]["content"]) if delta else ""
        case "openai":
            choices = item.get("choices") or [{"delta": {}}]
            return choices[0]["delta"].get("content") or ""
        case "chat" if item["type"] != "chunk":
            return ""
    return str(item.get("content", ""))


def _ending(kind: Kind, items: list[Any], ended: str) -> tuple[str, str]:
    """How the answer ended as this client understands it, and the code of the error."""
    if kind.framing == "text":
        return "finished" if ended == "end" else "", ""
    said = [item for item in items if item != DONE]
    last: Any = said[-1] if said else {"type": ""}
    code = ""
    match kind.dialect:
        case "content" if "error" in last:
            code = last["code"]
        case "openai" if "error" in last:
            code = last["error"]["code"]
        case "content" | "openai":
            # Over SSE a whole answer says so; elsewhere its clean end is all there is.
            whole = items[-1:] == [DONE] if kind.framing == "sse" else ended == "end"
            return "finished" if whole else "", ""
        case "chat" if last["type"] == "end":
            cancelled = last["metadata"]["finish_reason"] == "cancelled"
            return "cancelled" if cancelled else "finished", ""
        case "chat" if last["type"] == "error":
            code = last["metadata"]["code"]
        case "tool" if last["type"] == "done":
            return "finished", ""
        case "tool" if last["type"] == "error":
            code = last["error"]["code"]
        case "native" if last["type"] in ("finished", "cancelled"):
            return last["type"], ""
        case "native" if last["type"] == "failed":
            code = last["data"]["error"]["code"]
        case _:
            return "", ""
    return "cancelled" if code == "cancelled" else "failed", code
