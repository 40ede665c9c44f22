"""The application inside the test's process, for what cannot be reached from outside."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web


@asynccontextmanager
async def in_process(
    application: web.Application, listener: socket.socket | None = None
) -> AsyncIterator[str]:
    """Its URL, on a real socket."""
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    await web.SockSite(runner, listener or socket.create_server(("127.0.0.1", 0))).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
