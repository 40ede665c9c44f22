"""python-socketio on aiohttp: one emit to a room, over its WebSocket transport."""

import asyncio
from typing import Any

import socketio  # type: ignore[import-untyped]
from aiohttp import web

from bench.peers.sockets import bound
from bench.upstream import listening

server = socketio.AsyncServer(async_mode="aiohttp")


async def connect(sid: str, environ: dict[str, Any]) -> None:
    await server.enter_room(sid, "room")


async def publish(request: web.Request) -> web.Response:
    """POST /publish"""
    await server.emit("message", await request.json(), room="room")
    return web.Response(status=201)


async def serve() -> None:
    """Serves until the process is ended."""
    app = web.Application()
    app.router.add_post("/publish", publish)
    server.attach(app)
    server.on("connect", connect)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    sock = bound()
    await web.SockSite(runner, sock, backlog=4096).start()
    listening(sock.getsockname()[1])
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve())
