"""The usual way: FastAPI's connection manager from its documentation, and sse-starlette with a
queue for each client. On uvicorn with uvloop, httptools and websockets, without an access log."""

import asyncio
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from sse_starlette import EventSourceResponse

from bench.peers.sockets import bound
from bench.upstream import listening


class ConnectionManager:
    """Everybody in the room."""

    def __init__(self) -> None:
        self.sockets: list[WebSocket] = []
        self.queues: set[asyncio.Queue[str]] = set()

    async def broadcast(self, text: str) -> None:
        """To each one after the other."""
        for queue in self.queues:
            queue.put_nowait(text)
        for socket in self.sockets:
            await socket.send_text(text)

    async def events(self) -> AsyncIterator[dict[str, str]]:
        """What one SSE client is sent."""
        queue: asyncio.Queue[str] = asyncio.Queue()
        self.queues.add(queue)
        try:
            while True:
                yield {"data": await queue.get()}
        finally:
            self.queues.discard(queue)


manager = ConnectionManager()
app = FastAPI()


@app.websocket("/ws")
async def follow(socket: WebSocket) -> None:
    await socket.accept()
    manager.sockets.append(socket)
    try:
        while True:
            await socket.receive_text()
    except WebSocketDisconnect:
        manager.sockets.remove(socket)


@app.get("/events")
async def events() -> EventSourceResponse:
    return EventSourceResponse(manager.events())


@app.post("/publish", status_code=201)
async def publish(request: Request) -> None:
    await manager.broadcast((await request.body()).decode())


if __name__ == "__main__":
    sock = bound()
    listening(sock.getsockname()[1])  # connections wait in the backlog until uvicorn is up
    config = uvicorn.Config(app, access_log=False, log_level="warning", backlog=4096)
    uvicorn.Server(config).run(sockets=[sock])
