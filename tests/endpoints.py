"""The generation endpoints that stream, as a table: how each is asked, what it speaks."""

from __future__ import annotations

import urllib.parse
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from tests.clients import PROMPT
from tests.readers import Answer, ask


class Endpoint(NamedTuple):
    """One endpoint. takes: the field with the question. framing: where the request asks for none.
    done: over SSE, `[DONE]` ends it. fields: to be sent besides.
    """

    method: str
    path: str
    takes: str
    dialect: str
    framing: str = "sse"
    done: bool = True
    fields: Mapping[str, Any] = {}

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.takes}"

    def asks(self, prompt: str = PROMPT, **fields: Any) -> dict[str, Any]:
        """The fields of a request, of its body or of its query."""
        messages = [{"role": "user", "content": prompt}]
        asked = messages if self.takes == "messages" else prompt
        return {self.takes: asked, **self.fields, **fields}


ENDPOINTS = (
    Endpoint("POST", "/api/v1/ai/generate", "prompt", "content", fields={"stream": True}),
    Endpoint("POST", "/api/v1/ai/generate/stream", "prompt", "content"),
    Endpoint("GET", "/stream", "prompt", "content", "ndjson", done=False),
    Endpoint("POST", "/stream", "prompt", "content"),
    Endpoint("POST", "/stream", "messages", "content"),
    Endpoint("GET", "/chat", "prompt", "content", "ndjson"),
    Endpoint("POST", "/api/chat/stream", "message", "chat", done=False),
    Endpoint("POST", "/api/chat/stream", "messages", "tool"),
    Endpoint("POST", "/v1/chat/completions", "messages", "openai", fields={"stream": True}),
)
RESUMABLE = tuple(endpoint for endpoint in ENDPOINTS if endpoint.dialect != "openai")
GETS = tuple(endpoint for endpoint in ENDPOINTS if endpoint.method == "GET")


def url_of(base: str, path: str, **query: Any) -> str:
    """An URL with these fields in its query; those that are None stay out."""
    fields = {name: value for name, value in query.items() if value is not None}
    return f"{base}{path}" + (f"?{urllib.parse.urlencode(fields)}" if fields else "")


@asynccontextmanager
async def asking(
    url: str,
    endpoint: Endpoint,
    prompt: str = PROMPT,
    *,
    query: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    http: str = "1.1",
    keep_alive: bool = False,
    **fields: Any,
) -> AsyncIterator[Answer]:
    """Asks a question there. `fields` go where the endpoint takes its fields, `query` into the
    query of any endpoint.
    """
    asked = endpoint.asks(prompt, **fields)
    body = asked if endpoint.method == "POST" else None
    target = url_of(url, endpoint.path, **({} if body else asked), **(query or {}))
    async with ask(
        endpoint.method, target, http=http, keep_alive=keep_alive, headers=headers, json_body=body
    ) as answer:
        yield answer


@asynccontextmanager
async def resuming(
    url: str,
    endpoint: Endpoint,
    last_event_id: str,
    *,
    by: str = "header",
    query: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    **request: Any,
) -> AsyncIterator[Answer]:
    """Comes back to an endpoint with a position, in the header or in the query, and nothing else
    but what `request` says.
    """
    sent = {**(headers or {}), **({"Last-Event-ID": last_event_id} if by == "header" else {})}
    asked = {**(query or {}), **({"last_event_id": last_event_id} if by == "query" else {})}
    target = url_of(url, endpoint.path, **asked)
    async with ask(endpoint.method, target, headers=sent, **request) as answer:
        yield answer
