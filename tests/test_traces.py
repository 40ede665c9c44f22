"""Traces: what a collector of OpenTelemetry's is told, by a real server, over OTLP."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.clients import Kind, asked, named, start, stop, whole
from tests.inside import in_process
from tests.people import on_socket
from tests.processes import ROOT, Server, UpstreamProcess, until

StartServer = Callable[..., Server]
CHAT = Kind("chat")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Takes spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.url = ""

    async def take(self, request: web.Request) -> web.Response:
        """POST /v1/traces"""
        for resource in ExportTraceServiceRequest.FromString(await request.read()).resource_spans:
            self.services.add(said(resource.resource)["service.name"])
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return web.Response(content_type="application/x-protobuf")

    async def span(self, stream_id: str) -> Span:
        """The span of the request that began this answer, as soon as it is there."""

        def found() -> list[Span]:
            return [s for s in self.spans if said(s).get("rivulet.stream_id") == stream_id]

        await until(found)
        (span,) = found()
        return span

    async def below(self, parent: Span, count: int = 1) -> list[Span]:
        """The spans in this one, as soon as there are so many."""

        def found() -> list[Span]:
            return [span for span in self.spans if span.parent_span_id == parent.span_id]

        await until(lambda: len(found()) >= count)
        return found()


def said(span: Any) -> dict[str, Any]:
    """Its attributes."""
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    """One that listens."""
    application, found = web.Application(), Collector()
    application.router.add_post("/v1/traces", found.take)
    async with in_process(application) as found.url:
        yield found


@pytest.fixture
def traced(server: StartServer, upstream: UpstreamProcess, collector: Collector) -> Server:
    """A server whose environment asks for traces."""
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    model, quick = {"name": "up:", "base_url": upstream.base}, {"backoff": 0.01, "retries": 1}
    return server(env=env, model=model, generation=quick)


async def test_a_request_and_its_model_call(
    traced: Server, collector: Collector, upstream: UpstreamProcess
) -> None:
    """They go on with the client's trace, and the upstream is told of it; the first token is an
    event. No query, and nothing of what is asked and answered.
    """
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "baggage": "not=ours"}
    model = named("tokens=5,delay=0.2")
    seen = await start(traced.url, CHAT, model, headers=headers)
    request = await collector.span(seen.stream_id)
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    assert (request.name, request.kind) == ("POST /api/chat/stream", Span.SPAN_KIND_SERVER)
    assert said(request) == {
        "http.request.method": "POST",
        "http.route": "/api/chat/stream",
        "http.response.status_code": 200,
        "rivulet.request_id": seen.headers["x-request-id"],
        "rivulet.stream_id": seen.stream_id,
    }
    (call,) = await collector.below(request)
    assert (call.name, call.kind) == (f"chat {model}", Span.SPAN_KIND_CLIENT)
    assert said(call) == {"gen_ai.request.model": model, "rivulet.upstream": "default"}
    (first,) = call.events
    assert first.name == "first token"
    assert 0.2e9 <= first.time_unix_nano - call.start_time_unix_nano < 5e9
    sent = upstream.log(model)[0]["headers"]
    assert sent["traceparent"] == f"00-{TRACE}-{call.span_id.hex()}-01"
    assert "baggage" not in sent
    assert collector.services == {"rivulet"}


async def test_each_attempt_is_a_span(traced: Server, collector: Collector) -> None:
    """Those that failed say their code. A request that failed is marked; one for what is not there,
    and one that is stopped, are not; a trace begins where the client brings none.
    """
    seen = await whole(traced.url, "/api/v1/generate", named("status=500"))
    request = await collector.span(seen.stream_id)
    assert not request.parent_span_id and request.status.code == Status.STATUS_CODE_ERROR
    calls = await collector.below(request, 2)
    assert [call.status.message for call in calls] == ["upstream_failed"] * 2
    assert not any(call.events for call in calls)
    async with asked(traced.url, CHAT, named("tokens=1000,rate=20")) as answer:
        await stop(traced.url, answer.headers["x-stream-id"])
        await answer.body()
    request = await collector.span(answer.headers["x-stream-id"])
    assert request.status.code == Status.STATUS_CODE_UNSET
    (call,) = await collector.below(request)
    assert call.status.message == "cancelled"


async def test_the_last_spans_leave_before_the_end(traced: Server, collector: Collector) -> None:
    """Of a WebSocket's handshake too; what is asked over it begins traces of its own."""
    async with on_socket(traced.url, "/ws/traced") as socket:
        told = await socket.call("generate", message="hi", model=named("tokens=3"))
        await socket.hear("stream_end", stream_id=told["stream_id"])
    assert await asyncio.to_thread(traced.stop) == 0  # the collector is to go on meanwhile
    names = {span.name.partition(":")[0]: span for span in collector.spans}
    assert {"GET /ws/{room}", "chat up"} <= names.keys()
    assert not names["chat up"].parent_span_id


async def test_nobody_there_takes_the_traces(server: StartServer) -> None:
    """Answers are as fast as ever, and the end is not held up for long."""
    running = server(env={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"})
    seen = await start(running.url, CHAT, "demo:rate=1000,tokens=5")
    assert seen.ending == "finished"
    assert running.stop(wait=15) == 0


async def test_an_exporter_that_is_not_installed(server: StartServer) -> None:
    """A warning, and a server without traces."""
    running = server(env={"OTEL_TRACES_EXPORTER": "nonesuch"})
    (line,) = running.log_lines("there are no traces")
    assert line["level"] == "warning" and "nonesuch" in line["reason"]
    assert (await start(running.url, CHAT, "demo:rate=1000,tokens=5")).ending == "finished"


@pytest.mark.parametrize("exporter", ["", "none"])
def test_without_traces_nothing_of_them_is_loaded(exporter: str) -> None:
    """Not one module."""
    code = (
        "import sys, app; from streaming.config import Config; app.build(Config());"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    env = {"OTEL_TRACES_EXPORTER": exporter}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env).returncode == 0
