"""GET /openapi.json: each route, what it takes, and every answer it gives. Each is a row of ROWS.

Tests hold it equal to the router, and to what the server answers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import orjson
from aiohttp import web

from handlers.identity import COOKIE, PUBLIC
from handlers.schemas import (
    CHANNEL,
    MODEL,
    POSITION,
    ROOM,
    SCHEMAS,
    STRING,
    USER,
    either,
    named,
    number,
    one_of,
    record,
    ref,
    text,
)
from streaming.dialects import DIALECTS
from streaming.events import JSON

ABOUT = """Streams the answers of models, and shares rooms between people and models.

- Streams are server-sent events unless `Accept` or `format` asks for NDJSON or text. The schema of
  `text/event-stream` is here that of one event, and the schema of `application/x-ndjson` that of
  one line.
- What a client received is resumed with `Last-Event-ID`, on the same path.
- A method that a path does not have is answered with 405 and `Allow`, an unknown path with 404.
- Fields that are null count as absent; unknown ones are ignored, but for OpenAI's, which are passed
  to the model."""


def _parameter(place: str, name: str, schema: JSON, about: str = "") -> JSON:
    required = {"required": True} if place == "path" else {}
    said = {"description": about} if about else {}
    return {"name": name, "in": place, **required, "schema": schema, **said}


REQUEST = ("X-Request-Id", "X-User-Id", "user_id")  # any request may have them
RESUMES = "Last-Event-ID last_event_id "
FRAMED = "format heartbeat "
PARAMETERS: dict[str, JSON] = {
    "X-Request-Id": _parameter(
        "header", "X-Request-Id", text(128, r"^[A-Za-z0-9._:-]+$"), "Comes back in the answer."
    ),
    "X-User-Id": _parameter("header", "X-User-Id", USER, "Who asks, in open mode."),
    "user_id": _parameter("query", "user_id", USER, "The same where no header can be set."),
    "Last-Event-ID": _parameter(
        "header", "Last-Event-ID", POSITION, "The last `id` received: goes on after it."
    ),
    "last_event_id": _parameter("query", "last_event_id", POSITION, "The same in the query."),
    "Idempotency-Key": _parameter(
        "header", "Idempotency-Key", text(255, r"^[!-~]+$"), "A repeated request has one effect."
    ),
    "format": _parameter(
        "query", "format", one_of("sse", "ndjson", "text"), "Counts more than `Accept`."
    ),
    "heartbeat": _parameter(
        "query", "heartbeat", text(32, r"^[A-Za-z0-9_.-]+$"), "Names heartbeats, which one sees."
    ),
    "model": _parameter("query", "model", MODEL),
    "prompt": _parameter("query", "prompt", text()),
    "id": _parameter("path", "id", text(), "As `X-Stream-Id` said."),
    "name": _parameter("path", "model", text(), "Also with `/` in it."),
    "room": _parameter("path", "room", ROOM),
    "channel": _parameter("path", "channel", CHANNEL),
    "dialect": _parameter("query", "dialect", {"enum": [*DIALECTS], "default": "native"}),
    "starting_after": _parameter(
        "query", "starting_after", text(), "An offset or a position of this stream."
    ),
    "before": _parameter("query", "before", POSITION, "The `next` of another page."),
    "limit": _parameter("query", "limit", number(1, 1000, 50)),
    "count": _parameter("query", "count", number(0, 1_000_000, 10)),
    "interval": _parameter("query", "interval", number(0, 3600, 1, "number"), "Seconds."),
    "If-None-Match": _parameter("header", "If-None-Match", STRING),
}

REFUSALS = {
    "400": "The body, the query or a header cannot be read.",
    "401": "Credentials are missing, or not valid.",
    "403": "Not allowed: by grants, or from this origin or host.",
    "404": "There is no such thing, or it is somebody else's.",
    "408": "The body has not come in time.",
    "409": "In conflict with what it is now; of an answer that was stopped, `text` is beside it.",
    "410": "The position cannot be resumed.",
    "413": "Too large.",
    "422": "A field is missing or wrong; `param` names it.",
    "429": "Too many; come back after `Retry-After`.",
    "4XX": "The model's server has refused the request with this status.",
    "502": "The model failed.",
    "503": "Not now; come back after `Retry-After`.",
    "504": "The model took too long.",
}
ALWAYS, GUARDED = "400", "401 403 429 503"  # what every route may refuse, and all but public ones
HEADERS = {
    "401": ("WWW-Authenticate",),
    "429": ("Retry-After", "RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset"),
    "503": ("Retry-After",),
}
STREAM = "X-Stream-Id", "X-Conversation-Id"


def _headers(names: tuple[str, ...]) -> JSON:
    return {name: {"schema": STRING} for name in names}


def _refused(status: str, schema: str) -> JSON:
    said = {"application/json": {"schema": named(schema)}}
    headers = _headers(HEADERS.get(status, ()))
    return {"description": REFUSALS[status], "headers": headers, "content": said}


def _says(schema: str, status: int = 200, about: str = "Done.") -> JSON:
    content = {"application/json": {"schema": named(schema)}}
    return {str(status): {"description": about, "content": content}}


def _streams(*frames: str, text: bool = True, whole: str = "") -> JSON:
    """The answer that is a stream of these frames. text: it can be the bare text too. whole: the
    schema of what it may be as JSON instead.
    """
    frame = either(*map(named, frames), named("Heartbeat"))
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": frame}
    event = record("data", id=STRING, event=STRING, data=either({"const": "[DONE]"}, data))
    media = {"text/event-stream": event, "application/x-ndjson": frame}
    media |= {"text/plain": STRING} if text else {}
    media |= {"application/json": named(whole)} if whole else {}
    content = {name: {"schema": schema} for name, schema in media.items()}
    about = "It comes as it is made, and can be resumed."
    return {"200": {"description": about, "headers": _headers(STREAM), "content": content}}


NOTHING_LEFT = {"204": {"description": "Nothing is left after this position."}}
SWITCHES = {"101": {"description": "A WebSocket; 400 to a request that asks for none."}}
TEXT = {"200": {"description": "As it is.", "content": {"text/plain": {"schema": STRING}}}}


class Row(NamedTuple):
    """One operation. takes: names of PARAMETERS. body: the name of its schema. refuses: statuses
    beside those that every route may answer with.
    """

    tag: str
    operation: str
    summary: str
    answers: Mapping[str, JSON]
    takes: str = ""
    refuses: str = ""
    body: str = ""
    bodiless: bool = False  # it may have none

    def write(self) -> JSON:
        """The operation as the document has it."""
        path = self.operation.partition(" ")[2]
        public = path in PUBLIC
        refuses = f"{ALWAYS} {self.refuses}"
        refuses += "" if public else f" {GUARDED}"
        refuses += " 408" if self.body else ""
        shape = "OpenAI" if path.startswith("/v1/") else ""
        content = {"application/json": {"schema": named(self.body)}}
        body = {"requestBody": {"required": not self.bodiless, "content": content}}
        refused = {status: ref("responses", f"{shape}{status}") for status in refuses.split()}
        return {
            "tags": [self.tag],
            "summary": self.summary,
            "operationId": re.sub(r"\W+", "_", self.operation).strip("_").lower(),
            "parameters": [ref("parameters", name) for name in (*self.takes.split(), *REQUEST)],
            **(body if self.body else {}),
            "responses": {**dict(sorted(refused.items())), **self.answers},
            **({"security": []} if public else {}),
        }


ASKS = f"{RESUMES}{FRAMED}model Idempotency-Key"  # the query of a POST may name the model
ASKS_BY_QUERY = f"prompt {RESUMES}{FRAMED}model Idempotency-Key"
STREAMED, WHOLE = "410 413 422", "409 410 413 422 4XX 502 504"
CONTENT = _streams("ContentFrame")
MAY_STREAM = _streams("ContentFrame", whole="Whole")
BY_QUERY = CONTENT | NOTHING_LEFT
EVENTS = ("ContentFrame", "ChatFrame", "ToolFrame", "NativeFrame", "OpenAIFrame")

ROWS = (
    Row("Answers", "POST /api/v1/generate", "A prompt's answer, whole", MAY_STREAM, ASKS, WHOLE,
        "Prompt"),
    Row("Answers", "POST /api/v1/ai/generate", "The same, or with `stream` as it comes", MAY_STREAM,
        ASKS, WHOLE, "PromptOrStream"),
    Row("Answers", "POST /api/v1/ai/generate/stream", "A prompt's answer as it comes", CONTENT,
        ASKS, STREAMED, "PromptOrStream"),
    Row("Answers", "GET /stream", "The same by query; without a prompt to a default one", BY_QUERY,
        ASKS_BY_QUERY, STREAMED),
    Row("Answers", "POST /stream", "The answer to a prompt or to messages", CONTENT, ASKS, STREAMED,
        "PromptOrMessages"),
    Row("Answers", "GET /chat", "A prompt's answer, one JSON object a line", BY_QUERY,
        ASKS_BY_QUERY, STREAMED),
    Row("Answers", "POST /api/chat/stream", "A message in a conversation, or messages",
        _streams("ChatFrame", "ToolFrame"), ASKS, STREAMED, "Chat"),
    Row("OpenAI", "POST /v1/chat/completions", "As OpenAI's; other fields go to the model",
        _streams("OpenAIFrame", whole="Completion"), ASKS, WHOLE, "OpenAI"),
    Row("OpenAI", "GET /v1/models", "The models that are listed here", _says("Models")),
    Row("OpenAI", "GET /v1/models/{model}", "One of them", _says("Model"), "name", "404"),
    Row("Streams", "GET /api/v1/streams/{id}", "How an answer stands", _says("Status"), "id",
        "404"),
    Row("Streams", "GET /api/v1/streams/{id}/events", "An answer, from anywhere in any dialect",
        _streams(*EVENTS) | NOTHING_LEFT, f"id dialect starting_after {RESUMES}{FRAMED}",
        "404 410 422"),
    Row("Streams", "POST /api/v1/streams/{id}/stop", "Stops it, however often it is called",
        _says("Status"), "id", "404"),
    Row("Rooms", "GET /api/v1/rooms", "The rooms that live, for moderators", _says("Rooms")),
    Row("Rooms", "DELETE /api/v1/rooms/{room}", "Ends a room, for moderators", _says("Deleted"),
        "room", "404 409 422"),
    Row("Rooms", "POST /api/v1/rooms/{room}/messages", "Publishes an event, or a list of them",
        _says("Published", 201), "room Idempotency-Key", "404 413 422", "Publications"),
    Row("Rooms", "GET /api/v1/rooms/{room}/messages", "Looks back, the newest page first",
        _says("Page"), "room before limit", "404 422"),
    Row("Rooms", "GET /api/v1/rooms/{room}/presence", "Who is here", _says("Members"), "room",
        "404 422"),
    Row("Rooms", "GET /api/v1/rooms/{room}/events", "What is said in a room, without end",
        _streams("RoomFrame", text=False), f"room {RESUMES}{FRAMED}", "404 422"),
    Row("Rooms", "GET /ws/{room}", "A WebSocket in a room; `ClientFrame` to, `RoomFrame` from it",
        SWITCHES, "room last_event_id", "404 422"),
    Row("Rooms", "GET /ws", "A WebSocket in any number of rooms", SWITCHES),
    Row("Channels", "GET /api/v1/sse/stream/{channel}", "Events for whoever asks, without end",
        _streams("ChannelEvent", text=False), f"channel {FRAMED}", "422"),
    Row("Channels", "POST /api/v1/sse/publish", "Tells a user of an event, for services",
        _says("Delivered", 202), "", "413 422", "Told"),
    Row("Access", "POST /api/v1/tickets", "A ticket for `EventSource` and browsers' WebSockets",
        _says("Ticket"), "", "413 422", "TicketFor", bodiless=True),
    Row("Access", "POST /api/v1/disconnect", "Ends all connections of a user, for moderators",
        _says("Disconnected"), "", "413 422", "User"),
    Row("Operation", "GET /health", "It is alive", _says("Health")),
    Row("Operation", "GET /ready", "It is ready for clients",
        _says("Ready") | _says("Ready", 503, "Not now, and why.")),
    Row("Operation", "GET /api/heartbeat", "It is alive, and what time it is", _says("Beat")),
    Row("Operation", "POST /api/heartbeat", "The same", _says("Beat")),
    Row("Operation", "GET /metrics", "What it does, for Prometheus, as a service", TEXT),
    Row("Operation", "GET /openapi.json", "This document", _says("Document") | {
        "304": {"description": "As it was."}}, "If-None-Match"),
    Row("Try", "GET /api/stream", "Counts, to try a client or a proxy on",
        _streams("CountFrame") | NOTHING_LEFT, f"count interval {RESUMES}{FRAMED}", "410 422"),
    Row("Try", "GET /echo", "A WebSocket that returns each frame", SWITCHES),
)  # fmt: skip

SCHEMES: dict[str, JSON] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key or a JWT."},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "azure": {"type": "apiKey", "in": "header", "name": "api-key"},
    "cookie": {"type": "apiKey", "in": "cookie", "name": COOKIE},
    "ticket": {
        "type": "apiKey", "in": "query", "name": "ticket",
        "description": "Of a GET, where no header can be set; see `/api/v1/tickets`.",
    },
}  # fmt: skip


def document(prefix: str = "") -> JSON:
    """All of it. prefix: where the application is mounted in another."""
    paths: dict[str, JSON] = {}
    for row in ROWS:
        method, _, path = row.operation.partition(" ")
        paths.setdefault(path, {})[method.lower()] = row.write()
    responses = {
        shape + status: _refused(status, f"{shape}Error")
        for shape in ("", "OpenAI")
        for status in REFUSALS
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Rivulet", "version": "0", "description": ABOUT},
        "servers": [{"url": prefix or "/"}],
        "security": [{}, *({name: []} for name in SCHEMES)],  # {}: in open mode none are needed
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "parameters": PARAMETERS,
            "responses": responses,
            "securitySchemes": SCHEMES,
        },
    }


@cache
def _written(prefix: str) -> tuple[bytes, str]:
    body = orjson.dumps(document(prefix))
    return body, hashlib.sha256(body).hexdigest()[:16]


async def openapi(request: web.Request) -> web.Response:
    """GET /openapi.json"""
    body, tag = _written(request.path.removesuffix("/openapi.json"))
    headers = {"ETag": f'"{tag}"', "Cache-Control": "no-cache"}
    if any(known.value in (tag, "*") for known in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, headers=headers, content_type="application/json")


def routes() -> list[web.RouteDef]:
    """This surface's routes."""
    return [web.get("/openapi.json", openapi, allow_head=False)]
