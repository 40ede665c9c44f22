"""GET /metrics: what is counted, in Prometheus' text format. Each metric is a row of ROWS.

Everything is read when it is asked for: numbers of streaming/metrics.py, and the state of the parts
themselves. A label has few values, none of them a client's words.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

from aiohttp import web
from prometheus_client import ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from handlers.identity import check_service
from handlers.keys import CHANNELS, CONFIG, DELIVERY, GENERATIONS, METRICS, ROOMS, STATE
from streaming.delivery import Sink
from streaming.metrics import Histogram


class Row(NamedTuple):
    """One metric. read: its value, or with labels its value for each of what they may be."""

    name: str
    kind: str
    help: str
    read: Callable[[web.Application], Any]
    labels: tuple[str, ...] = ()


def _sinks(app: web.Application) -> Iterator[Sink]:
    for delivery in (app[DELIVERY], app[CHANNELS].delivery):
        yield from delivery


def _connections(app: web.Application) -> Mapping[str, int]:
    return Counter(sink.encoder.framing.name for sink in _sinks(app))


def _subscriptions(app: web.Application) -> int:
    return sum(len(sink.cursors) for sink in _sinks(app))


def _parts(app: web.Application) -> Mapping[str, bool]:
    return {
        code.removesuffix("_unavailable"): need.ready for code, need in app[STATE].needs.items()
    }


ROWS = [
    Row(
        "rivulet_connections",
        "gauge",
        "Streams and WebSockets that are open.",
        _connections,
        ("transport",),
    ),
    Row(
        "rivulet_connection_seconds",
        "histogram",
        "How long those lasted that have ended.",
        lambda app: app[METRICS].connection_seconds,
        ("transport",),
    ),
    Row(
        "rivulet_subscriptions",
        "gauge",
        "Logs that these follow: an answer, a channel, each room of a WebSocket.",
        _subscriptions,
    ),
    Row("rivulet_rooms", "gauge", "Rooms held in memory.", lambda app: len(app[ROOMS])),
    Row(
        "rivulet_events_in_total",
        "counter",
        "Events that came into logs: into the rooms held here, also from Redis and from the "
        "history's file; and into answers, counted at their end.",
        lambda app: {"room": app[METRICS].published, "answer": app[METRICS].generated},
        ("log",),
    ),
    Row(
        "rivulet_events_out_total",
        "counter",
        "Events encoded, once for all who read alike; tokens that wait together are one.",
        lambda app: app[METRICS].encoded,
    ),
    Row(
        "rivulet_deliveries_total",
        "counter",
        "The same, once for each connection that they were written to.",
        lambda app: app[METRICS].deliveries,
    ),
    Row(
        "rivulet_lag_cuts_total",
        "counter",
        "Connections cut because their client was too slow.",
        lambda app: app[METRICS].too_slow,
    ),
    Row(
        "rivulet_recoveries_total",
        "counter",
        "Clients that came back and missed nothing.",
        lambda app: app[METRICS].recoveries,
    ),
    Row(
        "rivulet_gaps_total",
        "counter",
        "Clients that came back too late, and were told of a gap.",
        lambda app: app[METRICS].gaps,
    ),
    Row(
        "rivulet_requests_total",
        "counter",
        "Requests that are over, a WebSocket's handshake among them; 499: the client went first.",
        lambda app: app[METRICS].requests,
        ("route", "status"),
    ),
    Row(
        "rivulet_refused_total",
        "counter",
        "Connections refused before they had a request: overloaded, header_too_large, or "
        "header_timeout, also where too many sent no head.",
        lambda app: app[METRICS].refused,
        ("code",),
    ),
    Row(
        "rivulet_request_seconds",
        "histogram",
        "How long requests took that were answered in one piece.",
        lambda app: app[METRICS].request_seconds,
    ),
    Row(
        "rivulet_generations_running",
        "gauge",
        "Answers that are being made here.",
        lambda app: app[GENERATIONS].running,
    ),
    Row(
        "rivulet_generations_total",
        "counter",
        "Answers that have ended: finished, failed or cancelled.",
        lambda app: app[METRICS].endings,
        ("ending",),
    ),
    Row(
        "rivulet_first_token_seconds",
        "histogram",
        "From the question to the first token, with all retries.",
        lambda app: app[METRICS].first_token,
    ),
    Row(
        "rivulet_token_gap_seconds",
        "histogram",
        "From tokens to the next; those that come within generation.flush_interval are passed on "
        "together, and count as one.",
        lambda app: app[METRICS].token_gap,
    ),
    Row(
        "rivulet_tokens_total",
        "counter",
        "Tokens of answers that have ended, as the upstream counted them, else estimated.",
        lambda app: {
            "prompt": app[METRICS].prompt_tokens,
            "completion": app[METRICS].completion_tokens,
        },
        ("kind",),
    ),
    Row(
        "rivulet_upstream_errors_total",
        "counter",
        "Model calls that failed; the upstream of [model] is called default.",
        lambda app: app[METRICS].upstream_errors,
        ("upstream", "code"),
    ),
    Row(
        "rivulet_retries_total",
        "counter",
        "Model calls made because one before had failed, to a fallback among them.",
        lambda app: app[METRICS].retries,
    ),
    Row(
        "rivulet_part_ready",
        "gauge",
        "1 while the bridge to Redis, or the history's file, works; where it is configured.",
        _parts,
        ("part",),
    ),
    Row("rivulet_draining", "gauge", "1 after SIGTERM.", lambda app: app[STATE].draining),
]


_FAMILIES: Mapping[str, Any] = {  # each takes values in a way of its own
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


def _family(row: Row, app: web.Application) -> Any:
    found = row.read(app)
    values: Mapping[Any, Any] = found if row.labels else {(): found}
    family = _FAMILIES[row.kind](row.name, row.help, labels=row.labels)
    for labels, value in values.items():
        labels = labels if isinstance(labels, tuple) else (labels,)
        if isinstance(value, Histogram):
            bounds = [*map(floatToGoString, value.bounds), "+Inf"]
            buckets = list(zip(bounds, accumulate(value.counts), strict=True))
            family.add_metric(labels, buckets, value.sum)
        else:
            family.add_metric(labels, value)
    return family


class _Collector(Collector):
    def __init__(self, app: web.Application) -> None:
        self._app = app

    def collect(self) -> Iterator[Metric]:
        """All rows, and what the process itself takes."""
        # One of several workers answers, whichever gets the connection.
        several = self._app[CONFIG].server.workers > 1
        worker = {"worker": str(os.getpid())} if several else {}
        families = [_family(row, self._app) for row in ROWS]
        for family in [*families, *ProcessCollector(registry=None).collect()]:
            for sample in family.samples:
                sample.labels.update(worker)
            yield family


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics, for services: OpenMetrics where `Accept` asks for it."""
    check_service(request)
    # Not all that it says: prometheus_client breaks at a version that is no number.
    modern = "application/openmetrics-text"
    asked = modern if modern in request.headers.get("Accept", "") else ""
    encode, content_type = choose_encoder(asked)
    headers = {"Content-Type": content_type, "Cache-Control": "no-store"}
    return web.Response(body=encode(_Collector(request.app)), headers=headers)


def routes() -> list[web.RouteDef]:
    """This surface's routes."""
    return [web.get("/metrics", metrics, allow_head=False)]
