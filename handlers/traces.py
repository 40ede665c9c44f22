"""Traces by OpenTelemetry: a span for a request, and in it one for each model call.

Loaded only where the environment asks for traces, in OpenTelemetry's own words (docs/operating.md):
without them nothing is paid. A generation's task has the context of the request that started it,
so that its calls are parts of that request's trace, also when the request is long over.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from importlib.metadata import entry_points
from threading import Thread

from aiohttp import web
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from handlers.keys import GENERATION, REQUEST_ID
from streaming.errors import UpstreamError
from streaming.models import ModelCall, ModelSource, Piece

CLOSE = 2.0  # seconds for the last spans to leave
_W3C = TraceContextTextMapPropagator()  # and no baggage: a client's is not for the upstream


class Traces:
    """One application's spans, on their way to one exporter. Raises ImportError without it."""

    def __init__(self) -> None:
        os.environ.setdefault("OTEL_SERVICE_NAME", "rivulet")
        self._provider = TracerProvider(shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_exporter()))
        self._tracer = self._provider.get_tracer("rivulet")

    @web.middleware
    async def door(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Before all others: the span of a request, which goes on with its client's trace."""
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else ""
        said = {"http.request.method": request.method, "http.route": route}
        with self._tracer.start_as_current_span(
            f"{request.method} {route}", _W3C.extract(request.headers), SpanKind.SERVER, said
        ) as span:
            response = await handler(request)
            span.set_attribute("http.response.status_code", response.status)
            span.set_attribute("rivulet.request_id", request[REQUEST_ID])
            if (generation := request.get(GENERATION)) is not None:
                span.set_attribute("rivulet.stream_id", generation.id)
            if response.status >= 500:
                span.set_status(StatusCode.ERROR)
            return response

    def source(self, source: ModelSource) -> ModelSource:
        """The same source, each call of which is a span."""
        return _TracedSource(source, self._tracer)

    async def close(self, app: web.Application) -> None:
        """Sends what is left, where the exporter takes it in time."""
        # In a daemon: an exporter that reaches nobody would hold up the end for half a minute.
        closing = Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, CLOSE)


def _exporter() -> SpanExporter:
    name = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    name = {"otlp": "otlp_proto_http"}.get(name, name)
    for found in entry_points(group="opentelemetry_traces_exporter", name=name):
        exporter: SpanExporter = found.load()()
        return exporter
    raise ImportError(f"the exporter {name} is not installed")


class _TracedSource:
    """See Traces.source."""

    def __init__(self, source: ModelSource, tracer: Tracer) -> None:
        self.name = source.name
        self._source = source
        self._tracer = tracer
        self.close = source.close

    async def stream(self, call: ModelCall) -> AsyncGenerator[list[Piece], None]:
        """See ModelSource.stream."""
        said = {"gen_ai.request.model": call.model, "rivulet.upstream": self.name}
        # Never the current one: what is current must not be changed across a `yield`.
        span = self._tracer.start_span(f"chat {call.model}", kind=SpanKind.CLIENT, attributes=said)
        headers: dict[str, str] = {}
        _W3C.inject(headers, set_span_in_context(span))
        spoken = False
        try:
            async with aclosing(self._source.stream(replace(call, headers=headers))) as batches:
                async for pieces in batches:
                    if not spoken:
                        spoken = True
                        span.add_event("first token")
                    yield pieces
                    del pieces
        except UpstreamError as error:
            span.set_status(StatusCode.ERROR, error.code)  # never the message: others wrote it
            raise
        except asyncio.CancelledError:  # stopped, or given up for its silence
            span.set_status(StatusCode.ERROR, "cancelled")
            raise
        finally:
            span.end()
