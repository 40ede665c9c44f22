"""Plain aiohttp: a loop of `send_str` over WebSockets, and one of aiohttp-sse's `send`."""

import asyncio

from aiohttp import web
from aiohttp_sse import EventSourceResponse, sse_response

from bench.peers.sockets import bound
from bench.upstream import listening

sockets: set[web.WebSocketResponse] = set()
streams: set[EventSourceResponse] = set()


async def follow(request: web.Request) -> web.WebSocketResponse:
    """GET /ws"""
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    sockets.add(socket)
    try:
        async for _ in socket:
            pass
    finally:
        sockets.discard(socket)
    return socket


async def events(request: web.Request) -> EventSourceResponse:
    """GET /events"""
    async with sse_response(request) as stream:
        streams.add(stream)
        try:
            await stream.wait()
        finally:
            streams.discard(stream)
    return stream


async def publish(request: web.Request) -> web.Response:
    """POST /publish"""
    text = await request.text()
    for socket in list(sockets):
        await socket.send_str(text)
    for stream in list(streams):
        await stream.send(text)
    return web.Response(status=201)


async def serve() -> None:
    """Serves until the process is ended."""
    app = web.Application()
    app.add_routes([web.get("/ws", follow), web.get("/events", events)])
    app.add_routes([web.post("/publish", publish)])
    # A stream whose client has gone must leave the room: `send` to it would raise.
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    sock = bound()
    await web.SockSite(runner, sock, backlog=4096).start()
    listening(sock.getsockname()[1])
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve())
