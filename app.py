"""Rivulet: `build(config)` makes the application, `main` runs it. The only file that wires.

python app.py [--config FILE] [--host HOST] [--port PORT] [--workers N] [--check-config]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from aiohttp import web

from handlers import (
    access,
    channels,
    chat,
    logs,
    metrics,
    openai_api,
    openapi,
    ops,
    rooms,
    streams,
    websocket,
)
from handlers.gate import BACKLOG, FIELDS, LINE_BYTES, Gate
from handlers.keys import (
    AUTH,
    CHANNELS,
    CONFIG,
    DELIVERY,
    GENERATIONS,
    LIMITS,
    METRICS,
    PRESENCE,
    ROOMS,
    STATE,
    TICKETS,
    VIGIL,
    State,
)
from handlers.middleware import doors, name_response
from handlers.vigil import Vigil
from streaming.auth import Auth
from streaming.channels import Channels
from streaming.config import Config, ConfigError, is_demo, load
from streaming.delivery import Delivery
from streaming.demo import DemoModel
from streaming.errors import CannotStart
from streaming.generations import Generations
from streaming.limits import Limits
from streaming.metrics import Metrics
from streaming.models import Models, ModelSource
from streaming.presence import Presence
from streaming.rooms import Rooms
from streaming.tickets import Memory, Tickets
from streaming.upstream import OpenAIUpstream

if TYPE_CHECKING:
    from handlers.traces import Traces
    from streaming.history import History
    from streaming.redis_bridge import RedisBridge

logger = logging.getLogger("rivulet")

KEEPALIVE = 75.0  # seconds; longer than nginx keeps its side, so that it never meets a closed one
HELD = 60.0  # seconds that an instance goes on hearing a room that nobody reads there
CANNOT_START = 2  # the exit status, where somebody has to change something first
WORKER_PAUSE = 0.5  # seconds before a worker that broke is started anew
CUT_WAIT = 2.0  # seconds for cut streams to say their last, then for handlers to return


def build(config: Config) -> web.Application:
    """The application, ready to run or to be mounted in another."""
    app = web.Application()
    traces = _traces()
    if traces is not None:
        app.middlewares.append(traces.door)
        app.on_cleanup.append(traces.close)
    app.middlewares.append(doors)
    app[CONFIG] = config
    app[STATE] = State()
    app[METRICS] = counted = Metrics()
    app[DELIVERY] = Delivery(config.delivery, counted)
    bridge = _bridge(app)
    mirror, kept = None, config.rooms
    if bridge is not None:
        mirror = bridge.mirror
        kept = replace(kept, idle=min(kept.idle, HELD))  # Redis has them
    auth = app[AUTH] = Auth(config.auth)
    shared = bridge.counts if bridge is not None else None
    app[LIMITS] = limits = Limits(config.limits, not auth.open, shared)
    app[TICKETS] = Tickets(auth, bridge.tickets if bridge is not None else Memory())
    models = _models(config, traces)
    app[GENERATIONS] = Generations(config.generation, models, mirror, counted, limits)
    keeper = bridge.rooms if bridge is not None else _history(app)
    app[ROOMS] = Rooms(kept, config.history, keeper, counted)
    app[PRESENCE] = Presence(app[DELIVERY], config.rooms.grace)
    relay = bridge.link if bridge is not None else None
    app[CHANNELS] = Channels(config.delivery, config.limits, relay, counted)
    deliveries = app[DELIVERY], app[CHANNELS].delivery
    address = f"{config.redis.prefix}disconnect"
    app[VIGIL] = vigil = Vigil(auth, app[TICKETS], deliveries, relay, address)
    _run_with(app, vigil)
    surfaces = (
        chat,
        openai_api,
        streams,
        rooms,
        websocket,
        channels,
        access,
        openapi,
        ops,
        metrics,
    )
    for surface in surfaces:
        app.add_routes(surface.routes())
    app.on_response_prepare.append(name_response)
    app.on_shutdown.append(_drain)
    if bridge is not None:
        bridge.join(app[ROOMS], app[GENERATIONS])
    return app


def _bridge(app: web.Application) -> RedisBridge | None:
    if not app[CONFIG].redis.url:
        return None
    from streaming.redis_bridge import RedisBridge  # only who asks for it needs it

    try:
        bridge = RedisBridge(app[CONFIG], app[DELIVERY])
    except ValueError:  # what it says of the URL may be a part of its password
        raise CannotStart(
            "redis.url: cannot be read; special characters of a password are written as %XX"
        ) from None
    app[STATE].needs["bridge_unavailable"] = bridge
    _run_with(app, bridge)
    return bridge


def _history(app: web.Application) -> History | None:
    path = app[CONFIG].history.path
    if not path:
        return None
    from streaming.history import History  # only who asks for it needs it

    history = History(path, app[CONFIG].rooms)
    app[STATE].needs["history_unavailable"] = history
    _run_with(app, history)
    return history


def _run_with(app: web.Application, part: RedisBridge | History | Vigil) -> None:
    """Starts and closes this part with the application."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        await part.start()
        yield
        await part.close()

    app.cleanup_ctx.append(context)


def _traces() -> Traces | None:
    asks = "OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT"
    if next(filter(None, map(os.environ.get, asks)), "none") == "none":
        return None
    try:
        from handlers.traces import Traces  # only who asks for it needs it

        return Traces()
    except ImportError as error:
        logger.warning("there are no traces", extra={"reason": str(error)})
        return None


def _models(config: Config, traces: Traces | None) -> Models:
    model, demo = config.model, DemoModel(config.demo.max_rate, config.demo.max_tokens)

    def source(name: str, base_url: str, api_key: str, model: str) -> ModelSource:
        found: ModelSource = demo
        if base_url or not is_demo(model):
            found = OpenAIUpstream(name, base_url, api_key, config.generation.connect_timeout)
        return found if traces is None else traces.source(found)

    listed = {}
    for upstream in config.upstreams:
        # One source for all its models: they share its connections.
        shared = source(upstream.name, upstream.base_url, upstream.api_key, upstream.models[0])
        for name in upstream.models:
            listed[name] = (shared, upstream.fallbacks)
    default = source("default", model.base_url, model.api_key, model.name)
    return Models(model.name, default, listed)


async def _drain(app: web.Application) -> None:
    """After SIGTERM, with the listeners closed: running answers may finish within the drain window,
    over which WebSockets are closed; then what still streams is cut, so that no client takes it for
    whole, and comes back elsewhere.
    """
    if app[STATE].draining:
        return
    window = app[CONFIG].server.drain
    app[STATE].draining = True
    logger.info("draining", extra={"running": app[GENERATIONS].running, "window": window})
    deliveries = app[DELIVERY], app[CHANNELS].delivery
    await asyncio.gather(app[GENERATIONS].finish(window), app[DELIVERY].drain(window))
    await asyncio.gather(*(d.close(retry=window, patience=CUT_WAIT) for d in deliveries))
    await app[GENERATIONS].close()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server until SIGTERM or SIGINT; the exit status."""
    parser = argparse.ArgumentParser(description="A lean streaming server for AI frontends.")
    parser.add_argument("--config", help="a TOML file (default: config.toml beside app.py)")
    parser.add_argument("--host", help="address to listen on")
    parser.add_argument("--port", type=int, help="port to listen on; 0 lets the system choose")
    parser.add_argument("--workers", type=int, help="processes on that port; needs Redis")
    parser.add_argument("--check-config", action="store_true", help="check it, and do not run")
    arguments = parser.parse_args(argv)
    wanted = {f"server.{key}": getattr(arguments, key) for key in ("host", "port", "workers")}
    try:
        overrides = {key: value for key, value in wanted.items() if value is not None}
        config = load(arguments.config, os.environ, overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return CANNOT_START
    if arguments.check_config:
        try:
            build(config)
        except CannotStart as error:
            print(error, file=sys.stderr)
            return CANNOT_START
        print("the configuration is good")
        return 0
    logs.start()
    host, workers = config.server.host, config.server.workers
    try:
        listener = (_share if workers > 1 else _listen)(host, config.server.port)
    except OSError as error:
        print(f"cannot listen on {host}:{config.server.port}: {error}", file=sys.stderr)
        return 1
    # What is loaded by now stays; and few objects here are in cycles, so that to look for them less
    # often is right: a one-token answer costs an eighth less. But the old ones are looked at too: a
    # connection that lasted is in a cycle of asyncio's, 2 KB that nothing else would take.
    gc.freeze()
    gc.set_threshold(20_000, 5, 2)
    with contextlib.suppress(ValueError, OSError):  # a connection is an open file
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    port = listener.getsockname()[1]
    if workers > 1:
        status = _supervise(workers)
        if status is not None:
            return status
        # One of its own: with one for all, each connection would wake all of them.
        held, listener = listener, _share(host, port)
        held.close()
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    with (
        contextlib.suppress(KeyboardInterrupt),
        asyncio.Runner(loop_factory=lambda: _new_loop(config.server.loop)) as loop,
    ):
        try:
            loop.run(_serve(config, listener, url))
        except CannotStart as error:
            print(error, file=sys.stderr)
            return CANNOT_START
    return 0


async def _serve(config: Config, listener: socket.socket, url: str) -> None:
    """Serves until SIGTERM or SIGINT. As `web.run_app`, which would drain with connections that are
    deaf already: what comes over a WebSocket until it is closed is to be heard.
    """
    app = build(config)
    runner = web.AppRunner(
        app,
        handler_cancellation=True,  # a parked handler learns that its client has gone
        access_log=None,
        shutdown_timeout=CUT_WAIT,
        keepalive_timeout=KEEPALIVE,
        lingering_time=CUT_WAIT,
        max_line_size=LINE_BYTES,
        max_headers=FIELDS,
    )
    await runner.setup()
    assert runner.server is not None
    gate = Gate(app, runner.server)
    gate.open(listener)
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    logger.info("listening", extra={"url": url, "model": config.model.name})
    await told.wait()
    # A second SIGTERM does not give up the drain; a person's second Ctrl-C does.
    asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
    gate.close()
    _close_idle(runner.server)
    await app.shutdown()
    await runner.cleanup()


def _close_idle(server: web.Server) -> None:
    """Closes the connections that wait for a request, so that a proxy which keeps some open asks
    another instance, and not this one that would refuse. aiohttp's own `pre_shutdown` closes those
    at work too: their WebSockets would hear nothing more.
    """
    for connection in server.connections:
        if connection._current_request is None:
            connection.force_close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


def _share(host: str, port: int) -> socket.socket:
    """A socket on a port that others may listen on as well: the kernel deals out connections among
    those that do. This one does not yet.
    """
    shared = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    shared.bind((host, port))
    return shared


def _supervise(workers: int) -> int | None:
    """Forks so many processes, in each of which this returns None; starts one anew that breaks, but
    for one that cannot start, and ends all on SIGTERM or SIGINT. In the first process, then, the
    exit status.
    """
    running: set[int] = set()
    ending = False

    def end(number: int, frame: object) -> None:
        nonlocal ending
        ending = True
        for pid in running:
            os.kill(pid, signal.SIGTERM)

    numbers = (signal.SIGTERM, signal.SIGINT)
    usual = [signal.signal(number, end) for number in numbers]
    while running or (workers and not ending):
        while len(running) < workers and not ending:
            signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # a child is known before it is ended
            pid = os.fork()
            if not pid:
                for number, handler in zip(numbers, usual, strict=True):
                    signal.signal(number, handler)
            running.add(pid)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
            if not pid:
                return None
        pid, status = os.wait()
        running.discard(pid)
        if os.waitstatus_to_exitcode(status) == CANNOT_START:
            workers -= 1  # it has said why, and another would say the same
        elif not ending:
            logger.error("worker ended", extra={"pid": pid, "status": status})
            time.sleep(WORKER_PAUSE)
    return 0 if workers else CANNOT_START


def _new_loop(name: str) -> asyncio.AbstractEventLoop:
    if name == "uvloop":
        import uvloop  # only who asks for it needs it

        return uvloop.new_event_loop()
    return asyncio.new_event_loop()


if __name__ == "__main__":
    sys.exit(main())
